"""What a process holds, and how that and its latencies go on: handles, threads, resident memory, percentiles."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np


def open_resources() -> tuple[int, int]:
    """Return how many handles and threads this process has (Linux)."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return milliseconds by percentile."""
    wanted = (50, 90, 99, 99.9, 100)
    found = np.percentile(seconds, wanted) if seconds else [0.0] * len(wanted)
    return {f"p{percent:g}": round(1000 * float(value), 1) for percent, value in zip(wanted, found, strict=True)}


def megabytes_per_hour(samples: Sequence[tuple[float, int, int, int]]) -> float:
    """Return the slope of resident memory over the second half of the samples."""
    half = samples[len(samples) // 2 :]
    if len(half) < 2:
        return 0.0
    hours, sizes = zip(*((at / 3600, size / 1e6) for at, size, _, _ in half), strict=True)
    return float(np.polyfit(np.array(hours) - hours[0], sizes, 1)[0])
