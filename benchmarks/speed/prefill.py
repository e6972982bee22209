"""Prefill: tokens per second beside transformers with its full cache; memory and speed over 100,000 tokens.

    python benchmarks/speed/prefill.py [--model smollm2] [--text FILE]

Writes results/prefill-MODEL.json and .png. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.common import long_text, median_seconds, peak_rss, plot, repeat_to, reset_peak_rss, write
from zsmerge_llm import LLM, CacheConfig

LENGTHS = (1024, 2048, 4096, 7168)


def tokens(llm: LLM, text: str, count: int) -> list[int]:
    """Return `count` ids of the text, repeated where it is too short."""
    ids = llm.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return repeat_to(ids, count)


def beside_transformers(model: str, text: str, repeats: int) -> list[dict[str, float]]:
    """Return tokens per second of both for several lengths, in turns within one process."""
    llm = LLM(model, cache=CacheConfig(slots=1024))
    engine, rows = llm.engine, []
    engine.backend.warm_up()
    for length in LENGTHS:
        ids = tokens(llm, text, length)
        batch = torch.tensor([ids])

        @torch.inference_mode()
        def full(batch: torch.Tensor = batch) -> None:
            last = torch.tensor([batch.shape[1] - 1])  # given as a number it makes torch copy the whole output matrix
            engine.model(batch, use_cache=True, logits_to_keep=last)

        def ours(ids: list[int] = ids) -> None:
            engine.read(engine.new_cache(), ids)

        def probed(ids: list[int] = ids) -> None:
            engine.read(engine.new_cache(), ids, probe=ids[-64:])

        engine.model.set_attn_implementation("sdpa")
        theirs = median_seconds(full, repeats)
        engine.model.set_attn_implementation("zsmerge")
        plain, with_probe = median_seconds(ours, repeats), median_seconds(probed, repeats)
        rows.append(
            {
                "tokens": length,
                "transformers": length / theirs,
                "zsmerge": length / plain,
                "zsmerge_with_probe": length / with_probe,
                "ratio": theirs / plain,
                "ratio_with_probe": theirs / with_probe,
            }
        )
        print({name: round(value, 2) for name, value in rows[-1].items()}, flush=True)
    return rows


def alone(model: str, text: str, length: int) -> dict[str, object]:
    """Read `length` tokens into 1,024 slots in this process; return peak memory and the seconds of each chunk."""
    llm = LLM(model, cache=CacheConfig(slots=1024))
    engine, ids, seconds = llm.engine, tokens(llm, text, length), []
    engine.backend.warm_up()
    cache = engine.new_cache()
    reset_peak_rss()
    latest = time.perf_counter()

    def record(done: int, total: int) -> None:
        nonlocal latest
        now = time.perf_counter()
        seconds.append(now - latest)
        latest = now

    engine.read(cache, ids, progress=record)
    return {"tokens": length, "peak_rss": peak_rss(), "cache_bytes": cache.nbytes, "chunk_seconds": seconds}


def in_a_process(arguments: argparse.Namespace, length: int) -> dict[str, object]:
    command = [sys.executable, __file__, "--alone", str(length), "--model", arguments.model]
    if arguments.text:
        command += ["--text", arguments.text]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", help="a text file to read; repeated where it is too short")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", type=int, default=100_000, help="tokens of the long read")
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(alone(arguments.model, long_text(arguments.text), arguments.alone)))
        return
    rows = beside_transformers(arguments.model, long_text(arguments.text), arguments.repeats)
    short, long = in_a_process(arguments, 4000), in_a_process(arguments, arguments.long)
    chunks: list[float] = long["chunk_seconds"]  # type: ignore[assignment]
    early, late = statistics.median(chunks[2:5]), statistics.median(chunks[-4:-1])
    growth = (long["peak_rss"] - short["peak_rss"]) / 1e6  # type: ignore[operator]
    summary = {
        "peak_rss_growth_mb": growth,
        "third_chunk_seconds": chunks[2],
        "early_chunk_seconds": early,
        "late_chunk_seconds": late,
        "late_over_early": late / early,
    }
    print(json.dumps(summary))
    name = f"prefill-{Path(arguments.model).stem}"
    write(name, {"model": arguments.model, "speed": rows, "short": short, "long": long, "summary": summary})
    lengths = [row["tokens"] for row in rows]
    series = {
        "transformers, full cache": (lengths, [row["transformers"] for row in rows]),
        "zsmerge, 1,024 slots": (lengths, [row["zsmerge"] for row in rows]),
        "zsmerge, with a probe": (lengths, [row["zsmerge_with_probe"] for row in rows]),
    }
    plot(
        name,
        f"Prefill with {arguments.model}",
        "tokens of the prompt",
        "tokens per second",
        series,
    )


if __name__ == "__main__":
    main()
