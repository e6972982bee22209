"""Weights in bfloat16, 8 and 4 bits on a CPU: likelihood, bytes, seconds to load, rates of decoding and prefill.

    python benchmarks/speed/quantized_weights.py --model smollm2 --text book.txt --text articles.txt --tokens 4096

Each mode runs in a process of its own. The likelihood is the mean NLL of a text, read in pieces that fit the cache, so
that nothing is compressed and only the weights differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.common import long_text, peak_rss, reset_peak_rss, write
from zsmerge_llm import LLM, CacheConfig, SamplingParams

MODES = ("bfloat16", "int8", "int4")


def weight_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def private_bytes() -> int:
    """Return the bytes of this process that no file backs (Linux): the system cannot reclaim them."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def negative_log_likelihood(llm: LLM, text: str, tokens: int, piece: int) -> float:
    """Return the mean over the first `tokens` tokens, read in pieces; the first token of each is not predicted."""
    ids = llm.tokenizer(text[: 12 * tokens], add_special_tokens=False).input_ids[:tokens]
    found = [
        llm.engine.logprobs(llm.engine.new_cache(CacheConfig.full()), ids[start : start + piece])[1:]
        for start in range(0, len(ids), piece)
        if len(ids) - start > 1
    ]
    return -float(torch.cat(found).mean())


def decode_rate(llm: LLM, rows: int, new: int) -> float:
    """Return tokens a second of all rows together after a prompt of 64 tokens; the first step is not counted."""
    cache = llm.engine.new_cache(rows=rows)
    prompts = [[(7 * at + row) % 900 + 100 for at in range(64)] for row in range(rows)]
    llm.engine.read_batch(cache, prompts)
    steps = llm.engine.decode(cache, [SamplingParams(max_tokens=new + 1, ignore_eos=True)] * rows, prompts)
    next(steps)
    started = time.perf_counter()
    count = sum(len(step) for step in steps)
    return count / (time.perf_counter() - started)


def prefill_rate(llm: LLM, tokens: int) -> float:
    """Return tokens a second of one chunk of `tokens` tokens, the best of three."""
    ids = [(7 * at) % 900 + 100 for at in range(tokens)]
    seconds = []
    for _ in range(3):
        cache = llm.engine.new_cache()
        started = time.perf_counter()
        llm.engine.read(cache, ids)
        seconds.append(time.perf_counter() - started)
    return tokens / min(seconds)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one mode in this process."""
    torch.zeros(1)
    reset_peak_rss()
    before = private_bytes()
    quantization = None if arguments.alone == "bfloat16" else arguments.alone
    llm = LLM(arguments.model, device="cpu", dtype="bfloat16", quantization=quantization)
    started = time.perf_counter()
    model = llm.engine.model
    result: dict[str, Any] = {
        "mode": arguments.alone,
        "load_seconds": time.perf_counter() - started,
        "weight_bytes": weight_bytes(model),
        "private_bytes": private_bytes() - before,
        "peak_rss_while_loading": peak_rss(),
    }
    texts = arguments.text or [None]
    result["nll"] = {
        Path(text or "demo").stem: negative_log_likelihood(llm, long_text(text), arguments.tokens, arguments.piece)
        for text in texts
    }
    if not arguments.quality_only:
        result["decode"] = {rows: decode_rate(llm, rows, arguments.new) for rows in (1, 4, 8, 16)}
        result["reading"] = {tokens: prefill_rate(llm, tokens) for tokens in (128, 512)}
    return result


def in_a_process(arguments: argparse.Namespace, mode: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--alone", mode, *sys.argv[1:]]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file, a Hub id or a built-in name")
    parser.add_argument("--text", action="append", help="a text file to predict; may be given several times")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each text")
    parser.add_argument("--piece", type=int, default=1024, help="tokens read as one text")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--quality-only", action="store_true", help="no rates: for a machine that is busy")
    parser.add_argument("--alone", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        print(json.dumps(measure(arguments)))
        return
    rows = []
    for mode in arguments.modes:
        row = in_a_process(arguments, mode)
        row["nll_ratio"] = {text: value / rows[0]["nll"][text] for text, value in row["nll"].items()} if rows else None
        rows.append(row)
        print(json.dumps(row), flush=True)
    name = Path(arguments.model).name.removesuffix(".gguf")
    result = {"model": name, "tokens": arguments.tokens, "piece": arguments.piece, "rows": rows}
    write(f"quantized-weights-{name}", result)


if __name__ == "__main__":
    main()
