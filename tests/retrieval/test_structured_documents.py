"""In tables, logs, contracts, configurations and code, the record that an identifier names is found, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.quality import structured_documents
from benchmarks.quality.sources import Sources
from tests.support.templates import template
from zsmerge_llm.retrieval.excerpts import Excerpts
from zsmerge_llm.retrieval.named_passages import numbers
from zsmerge_llm.retrieval.passage_search import PassageSearch
from zsmerge_llm.retrieval.passages import Passage, query_terms, split, terms
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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("user88@example.com", "user81@example.com"),
        ("clause 12.3", "clause 3.12"),
        ("version 2.13.4", "version 2.13.40"),
        ("at 10:16", "at 16:10"),
        ("host 10.0.12.7", "host 10.0.7.12"),
        ("load_batch_index", "load_batch_queue"),
        ("LoadBatchIndex", "LoadBatchQueue"),
        ("order 12345678", "order 12345679"),
    ],
)
def test_identifiers_are_told_apart_by_all_of_their_letters(one: str, other: str) -> None:
    assert {*query_terms(one)} - {*terms(other)}
    assert {*query_terms(other)} - {*terms(one)}


@pytest.mark.parametrize(
    ("written", "asked"),
    [("iPhone", "iphone"), ("token_limit", "token limit"), ("TokenLimit", "token limit"), ("2.13.4", "2.13"),
     ("User88", "user88"), ("__init__", "init"), ("compresses", "compressed"), ("COMPRESSED", "compress")],
)  # fmt: skip
def test_other_ways_of_writing_a_word_share_a_term_with_it(written: str, asked: str) -> None:
    assert {*terms(written)} & {*query_terms(asked)}


def test_plain_words_are_found_by_their_first_letters_alone() -> None:
    assert terms("The lighthouse's keeper, naïve: 灯台 ÜBERALL") == [
        "the", "light", "s", "keepe", "naïve", "灯", "台", "übera",
    ]  # fmt: skip


def test_a_number_of_several_parts_is_one_that_names_something() -> None:
    assert numbers("Is 7.2 of user88 at 10:16 of 3 or 2026-11-03?") == {"7.2", "user88", "10:16", "2026", "2026-11-03"}
    assert numbers("What is worker_12 of load_batch?") == {"worker_12"}


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
