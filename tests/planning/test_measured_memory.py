"""The planned memory of SmolLM2 is within 10 % of the measured peak of a process that reads and decodes."""

from __future__ import annotations

import sys

import pytest

from benchmarks.sessions.planned_memory import Setting, in_own_process

TOLERANCE = 0.1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [1024, 2048])
@pytest.mark.parametrize("chunk", [128, 512])
def test_the_plan_is_within_a_tenth_of_the_measured_peak(dtype: str, slots: int, chunk: int) -> None:
    found = in_own_process(Setting("smollm2", dtype, slots, chunk, length=3 * slots))
    assert abs(found.ratio - 1) < TOLERANCE
