"""Processes that are killed at any time: whatever they had answered is found again, and is equal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kill(folder: Path, kills: int, seconds: float) -> dict[str, int]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.killed_processes", str(folder), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(seconds)], cwd=ROOT, capture_output=True, text=True, timeout=seconds + 400, env=environment
    )
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


def assert_nothing_is_lost(counts: dict[str, int]) -> None:
    assert counts["killed"] > 0
    assert counts["equal"] + counts["newer"] > counts["killed"]
    assert [counts[key] for key in ("failed", "lost", "wrong", "leftovers")] == [0, 0, 0, 0], counts


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_whatever_was_answered_before_a_process_was_killed_is_found_again(tmp_path: Path) -> None:
    assert_nothing_is_lost(kill(tmp_path, 5, 15))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_whatever_was_answered_before_many_processes_were_killed_is_found_again(tmp_path: Path) -> None:
    assert_nothing_is_lost(kill(tmp_path, 25, 30))
