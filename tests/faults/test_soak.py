"""Many threads for long, in too little memory, with cancelling, branches and restarts: no answer is wrong or lost.

The slow suite soaks for half a minute: some five restarts, and every conversation has been on disk several times.
`python benchmarks/reliability/soak.py --minutes 60` goes on for longer and measures latencies and the slope of memory.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import pytest

from benchmarks.reliability.soak import make_llm, measure

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="handles and threads are those of Linux")
GROWTH_MB = 50
"""Most resident memory that may come in the second half of a run, beside what the C library holds in its arenas."""


def assert_nothing_is_wrong_or_left(found: dict[str, Any]) -> None:
    counts = found["counts"]
    wanted = ("wrong", "lost", "other types", "unexpected errors")
    assert [counts[name] for name in wanted] == [0, 0, 0, 0], found
    assert counts["most on disk"] > 0
    assert counts["restarts"]
    assert found["handles"]["after"] <= found["handles"]["before"], found
    assert found["native_threads"]["after"] <= found["native_threads"]["before"], found
    assert found["leftovers"] == []


@pytest.mark.slow
def test_threads_that_cancel_and_branch_get_the_answers_of_a_single_one_across_restarts() -> None:
    found = measure(partial(make_llm, "tiny"), threads=6, seconds=6, restart_seconds=1.5, memory=4, scripts=4)

    assert_nothing_is_wrong_or_left(found)
    assert found["counts"]["compared"] > 10


@pytest.mark.slow
def test_thirty_two_threads_get_the_answers_of_a_single_one_for_half_a_minute() -> None:
    found = measure(partial(make_llm, "tiny"), threads=32, seconds=30, restart_seconds=5)
    print(found)

    assert_nothing_is_wrong_or_left(found)
    assert found["counts"]["compared"] > 32, "not even one answer a thread"
    memory = found["resident_mb"]
    assert memory["trimmed_at_the_end"] - memory["trimmed_at_half"] < GROWTH_MB, memory
