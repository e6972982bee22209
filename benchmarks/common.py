"""What the benchmarks share: the machine's description, medians, a text to read, and where results go."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

RESULTS = Path(__file__).parent / "results"
BOOK = Path(__file__).parents[1] / "zsmerge_llm" / "data"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": os.getloadavg()[0],
    }


def median_seconds(run: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Median wall time of `run` after `warmup` unmeasured calls."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def write(name: str, result: dict[str, Any]) -> Path:
    """Save a result as benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path


def plot(
    name: str, title: str, x_label: str, y_label: str, lines: dict[str, tuple[Sequence[float], Sequence[float]]]
) -> Path:
    """Save a line plot as benchmarks/results/NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for label, (x, y) in lines.items():
        axes.plot(x, y, marker="o", markersize=3, label=label)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def forget_peak() -> None:
    """Let `peak_rss` count from now on (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Bytes: the most this process has held in memory since `forget_peak` (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def book(path: str | None = None) -> str:
    """A long text: the file given, else the one that ships for the demo. The caller repeats it as needed."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    return "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(BOOK.glob("*.txt")))


def repeated(ids: list[int], count: int) -> list[int]:
    """`count` of the ids, from the beginning again where they end."""
    return (ids * (count // len(ids) + 1))[:count]


def full_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that transformers' full cache holds."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
