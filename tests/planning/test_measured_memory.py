"""The planned memory of SmolLM2 is within 10 % of the measured peak of a process that reads and decodes."""

from __future__ import annotations

import sys
from functools import cache

import pytest

from benchmarks.sessions.planned_memory import Setting, in_own_process

TOLERANCE = 0.1


@cache
def make_files(dtype: str) -> None:
    """Let a process convert the model and find its digest, which leaves memory with the allocator: 300 MB more."""
    in_own_process(Setting("smollm2", dtype, slots=128, chunk=128, length=256))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "slots", "chunk"),  # each two values of two settings meet once
    [("float32", 1024, 128), ("float32", 2048, 512), ("bfloat16", 1024, 512), ("bfloat16", 2048, 128)],
)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(dtype: str, slots: int, chunk: int) -> None:
    make_files(dtype)
    found = in_own_process(Setting("smollm2", dtype, slots, chunk, length=2 * slots))
    assert abs(found.ratio - 1) < TOLERANCE
