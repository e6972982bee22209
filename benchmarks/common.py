"""Shared helpers: provenance of a result, medians, peak memory, a text to read, result files and plots."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import DynamicCache

RESULTS = Path(__file__).parent / "results"
TEXTS = Path(__file__).parents[1] / "zsmerge_llm" / "data"


def processor() -> str:
    """Return the processor's name, cores and vector instructions, and the GPU's name where there is one."""
    names = [platform.processor() or platform.machine()]
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line][:1]
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    name, vectors = names[0] if names else platform.machine(), torch.backends.cpu.get_cpu_capability()
    return ", ".join([f"{os.cpu_count()} cores of {name} ({vectors})", *gpu])


def commit() -> str:
    """Return the short hash of the checked-out commit, with a plus where tracked files differ from it."""

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True, check=False)
        return run.stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(git("status", "-s", "-uno"))


def provenance() -> dict[str, Any]:
    """Return what every result file begins with: commit, date, machine and software."""
    return {
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "environment": {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "load_average": os.getloadavg()[0],
        },
    }


def median_seconds(run: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Return the median wall time of `run`, after `warmup` calls that are not timed."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def write(name: str, result: dict[str, Any]) -> Path:
    """Save a result with its provenance as benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**provenance(), **result}, indent=1) + "\n")
    return path


def plot(
    name: str, title: str, x_label: str, y_label: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
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


def reset_peak_rss() -> None:
    """Restart the kernel's count of this process's peak memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Return the peak resident bytes of this process since `reset_peak_rss` (Linux)."""
    return _status("VmHWM")


def resident() -> int:
    """Return the resident bytes of this process (Linux)."""
    return _status("VmRSS")


def trimmed_resident() -> int:
    """Return the resident bytes after the C library has given back what is free in its arenas (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def resident_libraries() -> int:
    """Return the resident bytes of mapped shared libraries (Linux): how many of their pages, the kernel decides."""
    pattern = re.compile(r"^\S+-\S+ \S+ \S+ \S+ \d+ +(?P<path>.*)|^Rss: +(?P<size>\d+) kB")
    size, library = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := pattern.match(line):
            if found["size"] is None:
                library = ".so" in found["path"]
            elif library:
                size += int(found["size"]) * 1024
    return size


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def long_text(path: str | None = None) -> str:
    """Return the text of a file, by default the texts that ship with the package."""
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    return "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(TEXTS.glob("*.txt")))


def repeat_to(ids: list[int], length: int) -> list[int]:
    """Return `length` token ids, starting again from the first where they end."""
    return (ids * (length // len(ids) + 1))[:length]


def full_cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes of keys and values in transformers' full cache."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
