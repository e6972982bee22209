"""Of passages that say the same of a question the newest is read again, or the oldest where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.quality import updates
from tests.support.chat import dialogue
from tests.support.evaluation_data import calm_sea
from tests.support.templates import template
from zsmerge_llm.retrieval.passage_index import PassageIndex
from zsmerge_llm.retrieval.passage_search import PassageSearch
from zsmerge_llm.retrieval.passages import split_spans
from zsmerge_llm.retrieval.questions import Query, search_text
from zsmerge_llm.retrieval.recency import asked_time, asks_for_state, in_time, without_time
from zsmerge_llm.types import Message

WEATHER = ("Rain fell on the quiet village all day long.", "Nobody in the market sold any bread that week.")


@pytest.mark.parametrize(
    ("question", "time"),
    [
        ("What is the price of tar now?", "newest"),
        ("Which version do we currently use?", "newest"),
        ("What was the latest status of job_17?", "newest"),
        ("Who was the last one to leave?", "newest"),
        ("What was my original budget?", "oldest"),
        ("What did it cost at first?", "oldest"),
        ("How much was it in the beginning?", "oldest"),
        ("Name the towns from the first to the last.", None),
        ("What is the price of tar?", None),
        ("Who knows the firstborn?", None),
    ],
)
def test_a_question_asks_for_what_was_said_last_or_first_or_for_neither(question: str, time: str | None) -> None:
    assert asked_time(question) == time


def test_a_question_in_the_present_tense_asks_for_what_is_so() -> None:
    assert asks_for_state("What's my budget?")
    assert asks_for_state("Do I have a dog?")
    assert not asks_for_state("What was my budget?")
    assert not asks_for_state("Which town did they leave when it is said that it rained?")


def test_words_for_a_time_are_left_out_and_nothing_else() -> None:
    assert without_time("What is the latest price of tar now?") == "What is the   price of tar  ?"


@given(ranked=st.lists(st.integers(0, 30), unique=True), alike=st.sets(st.integers(0, 30)), newest=st.booleans())
def test_of_passages_that_are_alike_the_two_newest_or_oldest_and_the_best_are_left_and_come_first(
    ranked: list[int], alike: set[int], newest: bool
) -> None:
    alike &= set(ranked)
    found = in_time(ranked, alike, "newest" if newest else "oldest")
    kept = dict.fromkeys([*sorted(alike, reverse=newest)[:2], *ranked[:1]])
    assert found == [*kept, *(each for each in ranked if each not in alike and each not in kept)]


def prices(count: int) -> list[str]:
    told = [
        f"The harbour master announced that a barrel of tar costs {100 + number} guilders." for number in range(count)
    ]
    return [text for each in told for text in (*WEATHER, each)]


def best(texts: Sequence[str], question: str) -> str:
    messages: list[Message] = [{"role": "user", "content": text} for text in texts]
    (ranked,), passages = PassageIndex().find(messages, [Query(question)])
    return passages[ranked[0]].text


def test_the_newest_of_many_equal_passages_is_best_where_a_question_asks_for_now_and_the_oldest_for_first() -> None:
    assert "111" in best(prices(12), "How much does a barrel of tar cost now?")
    assert "100" in best(prices(12), "How much did a barrel of tar cost at first?")
    assert "100" in best(prices(12), "How much did a barrel of tar cost?")


def test_the_newest_comes_second_where_a_question_is_in_the_present_tense() -> None:
    messages: list[Message] = [{"role": "user", "content": text} for text in prices(12)]
    (ranked,), passages = PassageIndex().find(messages, [Query("How many guilders is a barrel of tar?")])
    assert ["100" in passages[ranked[0]].text, "111" in passages[ranked[1]].text] == [True, True]


def test_a_newer_passage_that_says_less_of_what_is_asked_does_not_come_first() -> None:
    texts = [*WEATHER, "The password of the harbour vault is falcon seven.", *WEATHER, "The vault is in the harbour."]
    assert "falcon" in best(texts, "What is the current password of the harbour vault?")


def test_a_word_for_a_time_need_not_be_in_the_text() -> None:
    texts = [*WEATHER * 3, "job_17 failed", *WEATHER * 3, "job_17 returned", *WEATHER * 3, "job_17 failed"]
    messages = dialogue(*texts)
    for word in ("last", "latest", "current", "first", "original"):
        assert PassageIndex(12).find(messages, [Query(f"What is the {word} state of job_17?")])[0][0], word


@pytest.mark.parametrize("name", list(updates.TASKS))
@pytest.mark.parametrize("limit", [128, 256])
def test_of_a_fact_that_changes_the_value_that_is_asked_for_is_looked_up(name: str, limit: int, tmp_path: Path) -> None:
    (record,) = updates.records(calm_sea(tmp_path), [4000], 1, 12, tasks=[name])
    messages = record.get("messages") or [{"role": "user", "content": record["context"]}]
    search = PassageSearch(template("smollm2"), limit)
    for asked in record["qa"]:
        found = search.search(messages, [Query(search_text(asked["q"]))], limit)
        assert asked["a"][0] in "\n".join(found), asked["q"]


def test_the_first_line_of_a_log_is_no_date_of_the_lines_behind_it() -> None:
    lines = [f"2024-03-01 08:{minute:02d} job_{minute} started" for minute in range(60)]
    assert {span.context for span in split_spans("\n".join(lines), 40)} == {""}
    dated = "\n".join(["2024-03-01", *(line[11:] for line in lines)])
    assert {span.context for span in split_spans(dated, 40)} == {"", "2024-03-01"}
