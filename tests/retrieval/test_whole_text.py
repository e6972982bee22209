"""Questions how often words are in a text get the counts, and questions for all people in it get its names."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chat import Chat, dialogue, make_llm
from tests.support.templates import template
from zsmerge_llm import CacheConfig
from zsmerge_llm.retrieval.passage_search import PassageSearch
from zsmerge_llm.retrieval.whole_text import (
    COUNTED,
    DEFAULT_MOST,
    MAX_MOST,
    MAX_NAMES,
    NAMED,
    asks_for_people,
    names_in,
    whole_text_block,
)

TEXT = "The ferry waits. A ferry-man waits, too: THE ferry's bell rings, and Old Anna's ferry waits. 7 7 7 7 7"
PEOPLE = (
    "By noon Ilona Brandt came to Marlow. At night the judge, Piet de Vries, left Marlow. "
    "Marlow's gate fell. Nobody saw Ilona Brandt. The ferry waits. \u201cThe ferry?\u201d said the cook."
)


@pytest.mark.parametrize(
    ("question", "counted"),
    [
        ("What are the 2 most common words in the above list?", "waits (3), the (2)"),
        ("Which two words appear most often?", "waits (3), the (2)"),
        ("Ignore the dots. What are the three most frequently appeared words?", "waits (3), the (2), ferry (2)"),
        ("What is the one most used word of this text?", "waits (3)"),
        ('How many times does the word "Ferry" appear in the text?', '"Ferry" (4 times)'),
        ("How often is Anna mentioned?", '"Anna" (1 time)'),
        ("How often has the phrase \u201cthe ferry\u201d been used?", '"the ferry" (2 times)'),
        ("How many times does whale occur?", '"whale" (0 times)'),
        ("How often is 'white whale' mentioned?", '"white whale" (0 times)'),
    ],
)
def test_words_are_counted_where_a_question_asks_for_that(question: str, counted: str) -> None:
    assert whole_text_block(question, [TEXT], len, 9999) == f"{COUNTED} {counted}\n\n"


@pytest.mark.parametrize(
    "question",
    [
        *("How often does the ferry run?", "What is the most common mistake?", "How many words did she say?"),
        "How many times did Anna say that the whale appeared?",
        *("Who waits most often at the ferry?", "What is the ferry's most frequent destination?", "Count the towns."),
    ],
)
def test_other_questions_get_no_counts(question: str) -> None:
    assert whole_text_block(question, [TEXT], len, 9999) == ""


@given(st.lists(st.text(alphabet="ab c", max_size=30), max_size=6), st.integers(0, 99))
def test_the_most_frequent_words_are_those_of_all_texts_together(texts: list[str], most: int) -> None:
    block = whole_text_block(f"What are the {most} most common words?", texts, len, 9999)
    frequencies = sorted(Counter(word for text in texts for word in text.split()).values(), reverse=True)
    shown = [int(each.split("(")[1].rstrip(")\n")) for each in block.split(", ")] if block else []
    assert shown == frequencies[: min(most or DEFAULT_MOST, MAX_MOST)]


@pytest.mark.parametrize(
    "question",
    [
        *("List all the persons whom the caravan met.", "Who are the main characters?", "Name all people in the book."),
        *("Which people are mentioned? List all of them.", "Give the names of all who signed."),
    ],
)
def test_a_question_for_all_people_gets_the_names_in_the_text(question: str) -> None:
    assert asks_for_people(question)
    block = whole_text_block(question, [PEOPLE], len, 9999)
    assert block == f"{NAMED} Marlow, Ilona Brandt, Piet de Vries\n\n"


@pytest.mark.parametrize(
    "question",
    ["How many people came?", "Who is the captain?", "List all the towns.", "What do people eat?", "Is everyone well?"],
)
def test_a_question_for_something_else_gets_no_names(question: str) -> None:
    assert not asks_for_people(question)
    assert whole_text_block(question, [PEOPLE], len, 9999) == ""


def test_names_are_fewer_where_there_is_less_room_and_none_where_every_noun_has_a_capital() -> None:
    many = " ".join(f"Then came Anna{chr(97 + at % 26)}{chr(97 + at // 26)} here." for at in range(60))
    assert len(names_in([many])) == 60
    blocks = [whole_text_block("List all people.", [many], len, most) for most in (9999, 400, 99)]
    assert [block.count("Anna") for block in blocks] == [MAX_NAMES, MAX_NAMES // 2, 0]
    assert names_in(["Im Hafen der Stadt liegt das Schiff der Brüder, und ihr Hund bewacht die Ladung."]) == []


def test_counts_stand_right_before_the_question_and_within_the_limit() -> None:
    asked = "Which 3 words appear most often?"
    messages = dialogue("rain " * 40 + "sun " * 30 + "bread " * 20, "I see.", asked)
    search = PassageSearch(template("smollm2"), 96)
    asking = search.augment(messages, slots=200)[-1]["content"]
    assert asking == f"{COUNTED} rain (40), sun (30), bread (20)\n\n{asked}"  # passages would distract
    assert search.augment(messages, slots=8) == messages  # there is no room


@pytest.mark.parametrize("known", [False, True])
def test_a_document_is_counted_to_its_end_though_it_has_a_question_of_its_own(known: bool) -> None:
    """A solved example in a text is not what is asked: not behind a document, and not in a long prompt."""
    text = f"sun rain sun\nQuestion: Which word appears most often? Answer: sun\nNow another:\n{'bread rain ' * 90}"
    question = "Which 2 words appear most often?"
    llm = make_llm(cache=CacheConfig(slots=128, recent=16, stage=16, observation_window=8))
    if known:
        answer = Chat(llm, "prompt").ask(f"{text}\n\n{question}")
    else:
        answer = Chat(llm, llm.read_document(text=text, name="list")).ask(question)
    read = llm.tokenizer.decode(llm.session(answer.session).tokens)
    assert f"{COUNTED} rain (91), bread (90)\n\n{question}" in read
