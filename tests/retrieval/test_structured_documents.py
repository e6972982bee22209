"""In tables, logs, contracts, configurations and code, the record that an identifier names is found, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import structured_documents
from benchmarks.quality.sources import Sources
from tests.support.templates import template
from zsmerge_llm.retrieval.excerpts import Excerpts
from zsmerge_llm.retrieval.passage_search import PassageSearch
from zsmerge_llm.retrieval.passages import Passage, split
from zsmerge_llm.retrieval.questions import Query

BUDGET = 384


@pytest.fixture(scope="module")
def search() -> PassageSearch:
    return PassageSearch(template("smollm2"), BUDGET)


@pytest.mark.parametrize("kind", structured_documents.TASKS)
def test_a_question_that_names_a_record_finds_the_value_in_it(search: PassageSearch, kind: str) -> None:
    sources = Sources(Path(), lambda text: len(text) // 3)
    (document,) = structured_documents.records(sources, [3000], 1, questions=10, tasks=[kind])
    for asked in document["qa"]:
        found = search.search([{"role": "user", "content": document["context"]}], [Query(asked["q"])], BUDGET)
        assert asked["a"][0] in "\n".join(found), asked["q"]


def test_a_passage_does_not_end_inside_of_an_indented_record() -> None:
    records = [{"id": number, "name": "Anna Stone", "address": {"city": "Oslo", "zip": 1000}} for number in range(40)]
    for passage in split(json.dumps(records, indent=1), 16):
        assert passage.count('"id"') == passage.count('"zip"'), passage


def test_what_is_left_of_the_budget_shows_more_of_the_best_passage() -> None:
    passage = Passage("\n".join(["The key is here.", *(f"Line {number}." for number in range(20))]))

    def shown(max_tokens: int) -> str:
        excerpts = Excerpts(lambda _: passage, lambda _: {"key": 1.0}, lambda each: len(each.text.split()))
        return excerpts.choose([0], [0], {0}, max_tokens)[0].text

    assert [shown(most).count("Line") for most in (4, 6, 8, 12, 43, 200)] == [0, 1, 2, 4, 4, 20]
