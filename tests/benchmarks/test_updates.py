"""Texts in which facts change: what their questions ask for, and that a chat says what its text says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.quality import updates
from benchmarks.quality.sources import Sources
from tests.support.evaluation_data import calm_sea


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return calm_sea(tmp_path)


@pytest.mark.parametrize("name", list(updates.TASKS))
def test_facts_that_change_are_asked_for_by_their_last_and_first_values(name: str, sources: Sources) -> None:
    record = updates.TASKS[name](sources, "0", 3000, 4)
    between = re.escape(updates.KINDS[name].told.partition("{thing}")[2].partition("{value}")[0])
    for number, asked in enumerate(record["qa"]):
        known = [*updates.GOODS, *re.findall(r"job_\d+", asked["q"])]
        thing = next(each for each in known if each in asked["q"])
        told = re.findall(rf"\b{thing}{between}(\d+)", record["context"])
        assert len(set(told)) == updates.VALUES
        assert asked["a"] == [told[0] if number % 2 else told[-1]]


def test_a_chat_of_facts_that_change_says_all_that_its_text_says(sources: Sources) -> None:
    record = updates.TASKS["chat"](sources, "0", 3000, 4)
    said = " ".join(each["content"] for each in record["messages"])
    assert all(unit in said for unit in record["context"].split("\n"))
    assert [each["role"] for each in record["messages"]] == ["user", "assistant"] * (len(record["messages"]) // 2)
