"""Texts are split into passages and ranked by BM25; an index that grows turn by turn ranks as one made at once."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat import dialogue
from zsmerge_llm.retrieval import passage_index
from zsmerge_llm.retrieval.passage_index import (
    MAX_TERMS,
    MIN_SHARED,
    NEAR_BY_WORDS,
    TOP,
    UNKNOWN_WEIGHT,
    PassageIndex,
)
from zsmerge_llm.retrieval.passages import (
    MIN_WORDS,
    PASSAGE_WORDS,
    Span,
    split,
    split_spans,
)
from zsmerge_llm.retrieval.questions import Query
from zsmerge_llm.retrieval.terms import TERM, count_words, query_terms, terms
from zsmerge_llm.types import Message

FACT = "The password of the harbour vault is falcon seven."
FILLER = ["Rain fell on the quiet village all day long.", "Nobody in the market sold any bread that week."]


def ranked(passages: Sequence[str], question: str) -> list[int]:
    return indexed(passages).rank(question)


def indexed(texts: Sequence[str]) -> PassageIndex:
    """An index of short texts, each a message and a passage."""
    index = PassageIndex()
    index.find([{"role": "user", "content": text} for text in texts], [])
    return index


@given(st.text(st.sampled_from("ab .,\n!?。é中文"), max_size=900))
def test_passages_are_the_text_in_order_and_none_is_long(text: str) -> None:
    passages = split(text)
    assert re.findall(TERM, " ".join(passages)) == re.findall(TERM, text)
    assert all(len(re.findall(TERM, each)) <= 4 * PASSAGE_WORDS for each in passages)
    at = 0
    for each in passages:
        at = text.index(each, at) + len(each)


def test_a_passage_ends_with_a_sentence_and_a_heading_belongs_to_what_follows() -> None:
    sentence = "One two three four five six seven eight nine ten. "
    first, second = split(f"A heading\n\n{sentence * 8}\n\nAnother heading\n\n{sentence * 5}")
    assert first.startswith("A heading\n\n")
    assert second.startswith("Another heading\n\n")
    assert len(split(sentence * 30)) == 4
    assert all(each.endswith(".") for each in split(sentence * 30))
    assert len(re.findall(TERM, "A heading")) < MIN_WORDS


def test_the_passage_with_the_rarest_common_words_comes_first() -> None:
    passages = [*FILLER, FACT, "The harbour was busy, and the village slept."]
    assert ranked(passages, "What is the password of the vault?")[0] == 2
    assert ranked(passages, "Which PASSWORDS?") == [2]  # other endings, other letters
    assert ranked(["今天下雨。", "密码是七。"], "密码是什么")[0] == 1
    assert ranked(passages, "...") == ranked(["..."], "password") == ranked([], "password") == []


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("List everything that the captain bought.", 4),
        ("In which order has the captain bought his things?", 4),
        ("What has the captain bought in Norvik?", 2),
    ],
)
def test_a_question_for_a_list_finds_what_is_told_in_other_words_too(question: str, found: int) -> None:
    bought = [
        "In Norvik the captain bought a copper kettle from a smith.",
        "In Jarrow the captain bought a fur coat.",
        "At the ford the captain paid nine crowns for a goat.",
        "The captain took a telescope in exchange for his watch.",
    ]
    hills = [f"The road went on through hill number {n} and the weather stayed as it was." for n in range(30)]
    assert set(ranked([*bought, *hills], question)) == set(range(found))


@pytest.mark.parametrize(
    "asked", ["What did they say on May 8?", "What was said on 2023-05-08?", "And on the 8th of May?"]
)
def test_a_date_holds_for_all_passages_below_it(asked: str) -> None:
    things = [f"{first}{last}" for first in ("b", "k", "l", "t") for last in ("oat", "ite", "amp", "own", "ent", "ill")]
    sessions = {
        thing: "\n".join([f"1:56 pm on {day} May, 2023", *(f"Anna: We saw the {thing} near a hill." for _ in range(9))])
        for day, thing in enumerate(things, start=1)
    }
    index = PassageIndex(MIN_WORDS)
    ((ranking,), passages) = index.find([{"role": "user", "content": "\n\n".join(sessions.values())}], [Query(asked)])
    assert len(ranking) > 3
    assert all(things[7] in passages[number].text for number in ranking)


def test_a_heading_holds_for_all_passages_below_it() -> None:
    text = "\n\n".join(
        f"## {name}\n\n{FILLER[0]}\n\nRun the program once.\n\n{FILLER[1]}" for name in ("Linux", "Windows")
    )
    index = PassageIndex(MIN_WORDS // 2)
    ((best, *_),), passages = index.find([{"role": "user", "content": text}], [Query("How is it run on Windows?")])
    assert passages[best].context == "## Windows"
    assert "Run the program" in passages[best].text


def test_stop_words_are_left_out_in_the_language_of_the_question() -> None:
    assert query_terms("When did the war end?") == ["war", "end"]
    assert query_terms("Wie heißt der Kapitän, der die Reise begann?") == ["heißt", "kapit", "reise", "began"]


# -- the incremental index ---------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    re.findall(r"\w+", "harbour vault password falcon market bread rain village tower keeper the of was a")
)
TEXT = st.lists(WORDS, max_size=60).map(lambda words: " ".join(words) + ".")
CHAT = st.lists(TEXT, min_size=1, max_size=12).map(lambda texts: dialogue(*texts))


def reference_passages(messages: Sequence[Message], size: int) -> list[str]:
    """All passages of some messages, split at once."""
    passages: list[str] = []
    for message in messages:
        if message["role"] == "assistant" and passages and count_words(message["content"]) < MIN_WORDS:
            passages[-1] += f"\n\n{message['content']}"
        else:
            passages += split(message["content"], size)
    return passages


def reference_scores(passages: Sequence[str], question: str) -> np.ndarray:
    index = bm25s.BM25()
    index.index([terms(passage) for passage in passages], show_progress=False)
    return index.get_scores(sorted(set(query_terms(question))))


def reference_ranking(passages: Sequence[str], question: str) -> list[int]:
    """The ranking of an index that the library makes at once."""
    sought, kinds = sorted(set(query_terms(question))), [set(terms(passage)) for passage in passages]
    if not sought or not any(kinds):
        return []
    having = {term: sum(term in kind for kind in kinds) for term in sought}
    weight = {term: math.log1p((len(kinds) - n + 0.5) / (n + 0.5)) for term, n in having.items()}
    shared = [sum(weight[term] for term in sought if term in kind) for kind in kinds]
    weights = sorted(weight[term] * (1 if having[term] else UNKNOWN_WEIGHT) for term in sought)
    least = MIN_SHARED * sum(weights[-MAX_TERMS:])
    order = (-reference_scores(passages, question)).argsort(kind="stable").tolist()
    if max(shared[at] for at in order[:TOP]) < least:
        return []
    scores = reference_scores(passages, question)
    enough = [at for at in order if shared[at] >= least / 2]
    return [at for at in enough if scores[at] >= NEAR_BY_WORDS * scores[enough[0]]]


@settings(max_examples=150, deadline=None)
@given(
    chats=st.lists(CHAT, min_size=1, max_size=4), cut=st.integers(0, 12), question=TEXT, size=st.sampled_from([12, 40])
)
def test_an_index_that_follows_a_conversation_ranks_as_one_made_at_once(
    chats: list[list[Message]], cut: int, question: str, size: int
) -> None:
    index, messages = PassageIndex(size), list[Message]()
    for chat in chats:  # each continues a prefix of the one before, as after an edit
        messages = messages[: max(0, len(messages) - cut)] + chat
        (found,), passages = index.find(messages, [Query(question)])
        texts = [passage.text for passage in passages]
        assert texts == reference_passages(messages, size)
        assert found == reference_ranking(texts, question)


@settings(max_examples=150, deadline=None)
@given(passages=st.lists(TEXT, min_size=1, max_size=30), question=TEXT)
def test_scores_are_those_of_the_library_bit_for_bit(passages: list[str], question: str) -> None:
    passages, sought = [FACT, *(each for each in passages if terms(each))], sorted(set(query_terms(question)))
    index = indexed(passages)
    if sought:
        found = [index._passages_with(term) for term in sought]
        assert index._scores(found).tolist() == reference_scores(passages, question).tolist()


def test_only_new_messages_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    split_texts: list[str] = []

    def counting(text: str, size: int, date: str) -> list[Span]:
        split_texts.append(text)
        return split_spans(text, size, date)

    monkeypatch.setattr(passage_index, "split_spans", counting)
    index, messages = PassageIndex(), dialogue(*FILLER, FACT)
    index.find(messages, [Query("password")])
    split_texts.clear()
    later = [*dialogue(*FILLER, FACT), {"role": "assistant", "content": "I see. " * 20}, *dialogue("And the vault?")]
    (found,), passages = index.find(later, [Query("password")])
    assert [passages[number].text for number in found] == [FACT]
    assert split_texts == [message["content"] for message in later[3:]]


# -- when and under which heading something was said -------------------------------------------------------------------

TEN = "One two three four five six seven eight nine ten. "


def contexts(text: str) -> list[str]:
    return [span.context for span in split_spans(text, size=40)]


def test_a_passage_has_the_date_and_the_heading_above_it_unless_it_shows_them() -> None:
    first, second = (
        f"DATE: 1:56 pm on 8 May, 2023\n{TEN * 8}",
        f"Session 2 (2023-05-25)\n{TEN * 4}\n\n## Plans\n{TEN * 8}",
    )
    assert contexts(f"{first}\n{second}") == [
        "",
        "DATE: 1:56 pm on 8 May, 2023",
        "",
        "Session 2 (2023-05-25)",
        "Session 2 (2023-05-25)\n## Plans",
    ]


def test_a_date_in_a_sentence_or_in_a_list_is_not_that_of_what_follows() -> None:
    for line in [
        "I was born on 8 May 2003.",
        "- March 15, 2024: the end",
        "So on 8 May 2023 we all went there by train",
    ]:
        assert set(contexts(f"{TEN * 4}\n\n{line}\n\n{TEN * 8}")) == {""}


def test_the_date_that_a_message_opens_with_is_that_of_the_messages_behind_it() -> None:
    index = PassageIndex()
    chat = dialogue(f"8 May 2023\n{FACT}", "I see. " * 20, FACT, f"9 May 2023\n{FACT}", "Yes. " * 20)
    _, passages = index.find(chat, [Query("password")])
    assert [each.context for each in passages] == ["", "8 May 2023", "8 May 2023", "", "9 May 2023"]
    _, passages = index.find(chat[:3], [Query("password")])
    again, without = (list(index.find(each, [Query("password")])[1]) for each in (chat, chat[:2] + chat[3:]))
    assert again[3:] == without[2:]


def test_a_passage_that_an_answer_has_joined_ends_where_it_did_before_once_that_is_gone() -> None:
    said: list[Message] = [
        {"role": "user", "content": FACT},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "Yes."},
    ]
    index = PassageIndex()
    index.find(said, [])
    other: Message = {
        "role": "assistant",
        "content": "Rain fell on the quiet village all day long, and nobody sold bread.",
    }
    passages = index.find([said[0], other], [])[1]
    assert [passage.text for passage in passages] == [FACT, other["content"]]


def test_a_passage_of_a_dialogue_has_a_reply_up_to_the_end_of_its_paragraph() -> None:
    said = "Anna: Which pastries did you have in the old cafe by the river last week, with Boris and the others?"
    answered = "[10:02] Boris: We had croissants, muffins, and a tart or two, and they were the best of all the summer."

    def replies(text: str) -> list[str]:
        _, passages = (index := PassageIndex(16)).find([{"role": "user", "content": text}], [])
        assert len(index.passages) == len(passages)
        return [passages.reply(number) for number in range(len(passages))]

    assert replies(f"{said}\n{answered}") == [answered, ""]
    assert replies(f"{said}\n\n{answered}") == ["", ""]
    assert replies(f"{said}\nWe had croissants, muffins and a tart or two: the best of all. " + "Yes. " * 9)[0] == ""
    assert replies(f"{said}\nBoris: {'very ' * 200}good.")[0] == ""
    chat = [{"role": "user", "content": said}, {"role": "assistant", "content": "Ann: Yes."}]
    _, passages = PassageIndex(16).find(chat, [])
    assert [passages.reply(number) for number in range(len(passages))] == [""]
