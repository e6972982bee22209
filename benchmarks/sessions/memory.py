"""Peak memory of a process during prefill: zsmerge-llm against transformers' full cache.

    python benchmarks/sessions/memory.py [--model smollm2] [--lengths 4096 8192 ...]

Each length and kind is a process of its own: it loads the model, reads the text (transformers in one pass and in chunks
of 512, zsmerge-llm in its chunks, with a probe and without), and reports the peak of its memory above what it held
before, and the bytes of the cache. Writes results/memory-MODEL.json and .png.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil
import torch
from transformers import DynamicCache

from benchmarks.common import full_cache_bytes, long_text, peak_rss, plot, repeat_to, reset_peak_rss, write
from zsmerge_llm import LLM, CacheConfig

KINDS = ("transformers, one pass", "transformers, chunks of 512", "zsmerge-llm", "zsmerge-llm, probe")


def measure(model: str, kind: str, length: int, text: str | None) -> dict[str, int]:
    """Return the peak of memory above what was held before prefill, and the cache's size, in bytes."""
    llm = LLM(model, cache=CacheConfig(slots=1024))
    ids = repeat_to(llm.tokenizer(long_text(text)).input_ids, length)
    engine = llm.engine
    engine.backend.warm_up()
    engine.read(engine.new_cache(), ids[:64])
    before = psutil.Process().memory_info().rss
    reset_peak_rss()
    if kind.startswith("zsmerge"):
        cache = engine.new_cache()
        engine.read(cache, ids, probe=ids[-32:] if kind.endswith("probe") else None)
        return {"peak": peak_rss() - before, "cache": cache.nbytes}
    engine.model.set_attn_implementation("sdpa")
    full = DynamicCache(config=engine.model.config)
    step = length if kind.endswith("pass") else 512
    with torch.inference_mode():
        for start in range(0, length, step):
            part = torch.tensor([ids[start : start + step]])
            engine.model(part, past_key_values=full, use_cache=True, logits_to_keep=torch.tensor([part.shape[1] - 1]))
    return {"peak": peak_rss() - before, "cache": full_cache_bytes(full)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--full", type=int, default=8192, help="the longest text for transformers")
    parser.add_argument("--text", help="a text file; repeated where it is too short")
    arguments = parser.parse_args()
    result: dict[str, dict[int, Any]] = {kind: {} for kind in KINDS}
    for length in arguments.lengths:
        for kind in KINDS:
            if kind.startswith("transformers") and length > arguments.full:
                continue
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                result[kind][length] = pool.apply(measure, (arguments.model, kind, length, arguments.text))
            print(
                length, kind, {name: f"{size / 1e6:.0f} MB" for name, size in result[kind][length].items()}, flush=True
            )
    name = f"memory-{Path(arguments.model).stem}"
    write(name, {"model": Path(arguments.model).stem, "bytes": result})
    lines = {kind: (list(rows), [row["peak"] / 1e6 for row in rows.values()]) for kind, rows in result.items()}
    plot(name, f"Prefill with {Path(arguments.model).stem}", "tokens", "MB above the loaded model", lines)


if __name__ == "__main__":
    main()
