"""Journals whose lists, counts and orders are known, and the scores of answers about them."""

from __future__ import annotations

import pytest

from benchmarks.quality.travel_documents import Question, score, travel_document

TOWNS = ("Marlow", "Brunn", "Norvik")


def test_a_journal_says_each_fact_once_in_the_order_of_its_questions() -> None:
    document = travel_document(seed=3, chapters=5, paragraphs=4)
    towns = document.questions[0].gold
    assert [document.text.count(town) for town in towns] == [1] * 5
    assert sorted(towns, key=document.text.index) == list(towns)
    assert document == travel_document(seed=3, chapters=5, paragraphs=4)
    assert document != travel_document(seed=4, chapters=5, paragraphs=4)


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "wanted"),
    [
        ("list", TOWNS, "Norvik, Marlow and Brunn", 1.0),
        ("list", TOWNS, "Marlow and Jarrow", 0.4),
        ("order", TOWNS, "Marlow, then Brunn, then Norvik", 1.0),
        ("order", TOWNS, "Norvik, then Marlow", 0.0),
        ("count", ("3",), "There were three towns.", 1.0),
        ("count", ("3",), "13", 0.0),
        ("summary", TOWNS, "They saw Brunn.", 1 / 3),
        ("fact", ("baker",), "A Baker.", 1.0),
    ],
)
def test_answers_are_scored_by_what_they_name(kind: str, gold: tuple[str, ...], answer: str, wanted: float) -> None:
    assert score(Question("?", kind, gold), answer) == pytest.approx(wanted)  # type: ignore[arg-type]
