"""Which questions are about a whole document, how much notes may take, and what a file may say of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsmerge_llm.retrieval.section_notes import (
    INTRODUCTION,
    NoteBudget,
    SectionNotes,
    asks_about_whole,
    check_notes,
    notes_for,
    notes_from,
)

NOTES = SectionNotes("names", ("Ada sails.", "Odile waits."))


@pytest.mark.parametrize(
    "question",
    [
        *("Summarize the text.", "Give me an overview of this.", "How many ships are there?", "List all the ships."),
        *(
            "In which order did they arrive?",
            "What is this book about?",
            "Name every town.",
            "What are the main ideas?",
        ),
        *("How often does it rain?", "Which was bought in total?", "Recap the story chronologically."),
        "Find all variables that are 5.",
    ],
)
def test_summaries_lists_counts_and_orders_are_about_the_whole(question: str) -> None:
    assert asks_about_whole(question)


@pytest.mark.parametrize(
    "question",
    ["Who signed it?", "When did the Marigold sail?", "What is the trade of Mina Sato?", "Where is the tower?", "Why?"],
)
def test_questions_about_a_fact_are_not(question: str) -> None:
    assert not asks_about_whole(question)
    assert notes_for(NOTES, question) == ""


def test_notes_stand_before_a_question_in_their_order() -> None:
    block = notes_for(NOTES, "List all the names.")
    assert block.startswith(INTRODUCTION)
    assert block.index("Ada") < block.index("Odile")
    assert block.endswith("\n\n")
    assert notes_for(None, "List all the names.") == notes_for(SectionNotes("names"), "List all the names.") == ""


@given(st.integers(1, 100_000))
def test_a_section_and_all_notes_fit_into_the_cache(slots: int) -> None:
    budget = NoteBudget.of(slots)
    assert 1 <= budget.section_tokens <= max(1, slots // 2)
    assert 1 <= budget.note_tokens <= max(1, budget.total // 4)
    assert budget.total <= slots // 2


@pytest.mark.parametrize(
    "saved",
    [
        *(
            None,
            [],
            {"a": 1},
            {"instruction": "x"},
            {"instruction": 1, "texts": []},
            {"instruction": "x", "texts": "y"},
        ),
        *({"instruction": "x", "texts": [1]}, {"instruction": "x", "texts": ["\ud800"]}),
        {"instruction": "x", "texts": [], "more": 1},
    ],
)
def test_what_is_no_notes_is_refused(saved: Any) -> None:
    with pytest.raises(ValueError, match=r"notes|note|surrogates"):
        check_notes(saved)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.text(st.characters(exclude_categories=["Cs"])))
def test_notes_are_the_same_after_they_were_saved(texts: list[str], instruction: str) -> None:
    saved: dict[str, Any] = {"instruction": instruction, "texts": texts}
    check_notes(saved)
    assert notes_from(saved) == SectionNotes(instruction, tuple(texts))
    check_notes({})
    assert notes_from({}) is None
