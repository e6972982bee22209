"""Planned memory against the measured peak of a process that reads a long text and decodes.

    python benchmarks/sessions/planned_memory.py [--model smollm2] [--dtypes float32 bfloat16] [--slots 1024 2048]

Each setting is a process of its own. What it holds once torch and transformers are imported is the baseline, without
what the C library keeps free. It loads the model, reads the text with a probe, decodes, and reports the peak above the
baseline, from the loaded model on, and that while loading. Pages of shared libraries do not count: how many of them are
resident differs by 40 MB between kernels and file systems. Linux only. Writes results/planned-memory-MODEL.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel  # noqa: F401 - part of the baseline

from benchmarks.common import (
    long_text,
    peak_rss,
    repeat_to,
    reset_peak_rss,
    resident_libraries,
    trimmed_resident,
    write,
)

PROBE_TOKENS, NEW_TOKENS = 32, 32


@dataclass(frozen=True)
class Setting:
    """One process. compile: as for `LLM`."""

    model: str
    dtype: str
    slots: int
    chunk: int
    length: int
    quantization: str | None = None
    compile: bool = False


@dataclass(frozen=True)
class Measured:
    """Bytes above the baseline: planned, measured from the loaded model on, and the peak while loading."""

    planned: int
    measured: int
    loading: int
    workspace: int

    @property
    def ratio(self) -> float:
        """Planned over measured."""
        return self.planned / self.measured


def measure(setting: Setting) -> Measured:
    """Plan, load, read and decode. To be called in a fresh process."""
    baseline, libraries = trimmed_resident(), resident_libraries()
    reset_peak_rss()
    from zsmerge_llm import CacheConfig, Engine, SamplingParams
    from zsmerge_llm.models.loader import load
    from zsmerge_llm.planning import plan

    config = CacheConfig(slots=setting.slots)
    options: dict[str, Any] = {"dtype": setting.dtype, "quantization": setting.quantization}
    loaded = load(setting.model, **options)
    loading = peak_rss() - baseline - (resident_libraries() - libraries)
    engine = Engine(loaded.model, config, setting.chunk, setting.compile)
    ids = repeat_to(loaded.tokenizer(long_text()).input_ids, setting.length)
    reset_peak_rss()
    cache = engine.new_cache()
    engine.read(cache, ids, probe=ids[-PROBE_TOKENS:])
    for _ in engine.decode(cache, [SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)], [ids]):
        pass
    measured = peak_rss() - baseline - (resident_libraries() - libraries)
    made = plan(setting.model, cache=config, chunk=setting.chunk, compile=setting.compile, **options)
    return Measured(made.total_nbytes - made.turn_nbytes, measured, loading, made.workspace_nbytes)


def in_own_process(setting: Setting) -> Measured:
    """Measure a setting in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (setting,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--slots", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--chunks", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--length", type=int, default=6144)
    parser.add_argument("--quantization")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for dtype in arguments.dtypes:
        for slots in arguments.slots:
            for chunk in arguments.chunks:
                options = (arguments.length, arguments.quantization, arguments.compile)
                setting = Setting(arguments.model, dtype, slots, chunk, *options)
                found = in_own_process(setting)
                rows.append({**asdict(setting), **asdict(found)})
                sizes = " ".join(f"{name} {size / 1e6:6.1f} MB" for name, size in asdict(found).items())
                print(f"{dtype:8} {slots:5} slots, chunks of {chunk:4}: {sizes}, ratio {found.ratio:.3f}", flush=True)
    suffix = f"-{arguments.quantization}" if arguments.quantization else ""
    name = f"planned-memory-{Path(arguments.model).stem}{suffix}{'-compiled' if arguments.compile else ''}"
    write(name, {"rows": rows})


if __name__ == "__main__":
    main()
