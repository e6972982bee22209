"""Decoding and prefill: tokens per second by length of history, weight format and number of conversations.

    python benchmarks/speed/decode_and_prefill.py [--model smollm2] [--formats bf16 int8 int4]

One run, one process: transformers with its full cache, and zsmerge-llm with 1,024 slots in each format, eager and
compiled, after histories of 64 to 32,768 tokens (transformers up to --full); then several conversations of 4,096 tokens
in one batch and in threads, answers about a document with and without prompt lookup, and greedy answers to 20 prompts,
eager against compiled. `peers` compares with other systems.

`floor_tokens_per_second` is the bandwidth of a plain sum over memory, divided by the bytes of the weights.
`reading_limit` is the prefill rate if it were nothing but the layers' matrix products, at PyTorch's bfloat16 rate for
large ones. Writes results/decode-and-prefill-MODEL.json and .png. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import DynamicCache

from benchmarks.common import long_text, median_seconds, plot, repeat_to, write
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.cache import Cache

HISTORIES = (64, 1024, 4096, 7168, 16384, 32768)
PREFILL = 7168
STEPS = 24
PROMPT = 150
ROWS = (1, 2, 4, 8, 16)
BATCH = (1, 2, 4, 8)
QUESTIONS = (
    "Who is the captain of the Marigold?",
    "Summarise the log in three sentences.",
    "List all the people named, as JSON with name and role.",
    "Quote the sentence that mentions the cat.",
    "What was the cargo and where did the ship go?",
)
FORMATS = {"bf16": None, "int8": "int8", "int4": "int4"}


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of some runs: what the machine can do when nothing else disturbs it."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def bandwidth() -> float:
    """Return bytes per second of reading memory, the best of a few sums over 512 MB."""
    block = torch.ones(128 * 1024 * 1024)
    return block.nbytes / fastest(block.sum, 5)


def gemm_rate() -> float:
    """Return multiply-adds per second in bfloat16, a chunk times a matrix of a layer's size, the best of many."""
    rows, matrix = torch.ones(512, 1024, dtype=torch.bfloat16), torch.ones(4096, 1024, dtype=torch.bfloat16)
    return len(rows) * matrix.numel() / fastest(lambda: torch.nn.functional.linear(rows, matrix), 40)


def step_seconds(run: Any) -> float:
    """Return the median seconds of one step, after two that are not timed."""
    times = []
    for number in range(STEPS + 2):
        started = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def histories(engine: Engine, ids: list[int]) -> tuple[dict[int, Cache], float]:
    """Return the cache after each of HISTORIES that the text reaches, and the rate of prefill up to PREFILL."""
    cache, caches, seconds = engine.new_cache(), {}, {}
    for length in [length for length in HISTORIES if length <= len(ids)]:
        started = time.perf_counter()
        engine.read(cache, ids[cache.seen : length])
        seconds[length] = time.perf_counter() - started
        caches[length] = cache.clone()
    return caches, prefill_rate(seconds)


def prefill_rate(seconds: dict[int, float]) -> float:
    """Return tokens per second up to PREFILL, from the seconds between lengths; 0 where it was not reached."""
    return PREFILL / sum(spent for length, spent in seconds.items() if length <= PREFILL) if PREFILL in seconds else 0.0


def decode_rate(engine: Engine, before: Cache) -> float:
    """Return tokens per second on a copy of a cache, by the decode loop that every answer uses."""
    cache = before.clone()
    cache.compress_stage()
    stream = engine.decode(cache, [SamplingParams(max_tokens=STEPS + 3, ignore_eos=True, lookup=False)], [[]])
    return 1 / step_seconds(lambda _: next(stream))


def prompt_lookup_rates(engine: Engine, llm: LLM) -> dict[str, float]:
    """Return tokens per second of greedy answers to questions about a text, with and without prompt lookup."""
    text = files("zsmerge_llm").joinpath("data", "marigold.txt").read_text(encoding="utf-8")[:6000]
    seconds, generated = {"with": 0.0, "without": 0.0}, {"with": 0, "without": 0}
    for question in QUESTIONS:
        message = [{"role": "user", "content": f"{text}\n\n{question}"}]
        ids = llm.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        prompt = engine.new_cache()
        engine.read(prompt, ids)
        for kind in ("without", "with"):
            params = SamplingParams(max_tokens=60, lookup=kind == "with")
            times = []
            for _ in range(3):  # the first one compiles
                started = time.perf_counter()
                answer = list(engine.decode(prompt.clone(), [params], [ids]))
                times.append(time.perf_counter() - started)
            generated[kind] += len(answer)
            seconds[kind] += min(times[1:])
    return {kind: generated[kind] / seconds[kind] for kind in seconds}


@torch.inference_mode()
def transformers_rates(engine: Engine, ids: list[int], rows: int = 1) -> tuple[float, float]:
    """Return tokens per second of transformers with its full cache and SDPA: of decoding `rows` conversations in one
    batch, and of prefill of one of them."""
    model, cache = engine.model, DynamicCache(config=engine.model.config)
    last = torch.tensor([0])

    def step(tokens: torch.Tensor) -> torch.Tensor:
        last[0] = tokens.shape[1] - 1
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=last).logits.argmax(-1)

    model.set_attn_implementation("sdpa")
    started = time.perf_counter()
    token = step(torch.tensor([ids]))
    reading = len(ids) / (time.perf_counter() - started)
    cache.batch_repeat_interleave(rows)
    token = token.repeat(rows, 1)

    def follow(_: int) -> None:
        nonlocal token
        token = step(token)
        token.tolist()

    rate = rows / step_seconds(follow)
    model.set_attn_implementation("zsmerge")
    return rate, reading


def prefill(engine: Engine, ids: list[int]) -> float:
    """Return tokens per second of prefill."""
    return len(ids) / median_seconds(lambda: engine.read(engine.new_cache(), ids), 2)


def greedy_answers(engine: Engine, ids: list[int]) -> list[list[int]]:
    """Return greedy answers to 20 prompts, pieces of a text."""
    answers = []
    for start in range(0, 20 * PROMPT, PROMPT):
        cache, params = engine.new_cache(), SamplingParams(max_tokens=STEPS, ignore_eos=True, lookup=False)
        answers.append(list(engine.stream(cache, ids[start : start + PROMPT], params)))
    return answers


def threads_rate(engine: Engine, base: Cache, rows: int) -> float:
    """Return tokens per second of `rows` conversations that decode in threads of their own."""
    params = SamplingParams(max_tokens=STEPS + 8, ignore_eos=True, lookup=False)
    caches = [base.clone() for _ in range(rows)]

    def run(cache: Cache) -> list[float]:
        return [time.perf_counter() for _ in engine.decode(cache, [params], [[]])]

    with ThreadPoolExecutor(rows) as pool:
        ticks = list(pool.map(run, caches))
    begin, end = max(times[3] for times in ticks), min(times[-1] for times in ticks)
    return sum(sum(begin <= tick <= end for tick in times) for times in ticks) / (end - begin)


def batch_rate(engine: Engine, base: Cache, rows: int) -> float:
    """Return tokens per second of `rows` conversations that are decoded as one batch (`LLM.batch`)."""
    batch = Cache.stack([base] * rows)
    params = SamplingParams(max_tokens=STEPS + 3, ignore_eos=True, lookup=False)
    stream = engine.decode(batch, [params] * rows, [[]] * rows)
    return rows / step_seconds(lambda _: next(stream))


def show(name: str, rates: dict[Any, float]) -> None:
    print(name, {kind: round(rate, 1) for kind, rate in rates.items()}, flush=True)


def measure(arguments: argparse.Namespace, text: str) -> dict[str, Any]:
    parts: dict[str, Any] = {
        name: {} for name in ("rates", "reading", "batch", "rows", "weight_bytes", "answers", "same_as_eager")
    }
    result = {"bandwidth": bandwidth(), "gemm_rate": gemm_rate(), **parts}
    for name in arguments.formats:
        llm = LLM(arguments.model, cache=CacheConfig(slots=1024), quantization=FORMATS[name], compile=False)
        engine, rates = llm.engine, result["rates"]
        tensors = [*engine.model.parameters(), *engine.model.buffers()]
        result["weight_bytes"][name] = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
        ids = repeat_to(llm.tokenizer(text).input_ids, arguments.longest)
        caches, result["reading"][f"zsmerge {name} eager"] = histories(engine, ids)
        result["cache_bytes"] = caches[4096].nbytes
        if name == "bf16":
            weights = [each for each in engine.model.get_decoder().layers.parameters() if each.dim() == 2]
            result["reading_limit"] = result["gemm_rate"] / sum(each.numel() for each in weights)
            lengths = [length for length in HISTORIES if length <= arguments.full]
            both = {length: transformers_rates(engine, ids[:length]) for length in lengths}
            rates["transformers bf16"] = {length: rate for length, (rate, _) in both.items()}
            result["reading"]["transformers bf16"] = both[PREFILL][1] if PREFILL in both else 0.0
            batch = {rows: transformers_rates(engine, ids[:4096], rows)[0] for rows in (1, 8)}
            result["batch"]["transformers bf16"] = batch
        rates[f"zsmerge {name} eager"] = {length: decode_rate(engine, cache) for length, cache in caches.items()}
        eager = greedy_answers(engine, ids)
        started = time.perf_counter()
        engine.backend.start()
        decode_rate(engine, caches[64])  # compiles
        compile_seconds = time.perf_counter() - started
        result["reading"][f"zsmerge {name}"] = prefill(engine, ids[:PREFILL])
        same = [mine == other for mine, other in zip(eager, greedy_answers(engine, ids), strict=True)]
        result["same_as_eager"][name] = f"{sum(same)} of {len(same)} prompts"
        print(name, "same text compiled as eager:", result["same_as_eager"][name], flush=True)
        rates[f"zsmerge {name}"] = {length: decode_rate(engine, cache) for length, cache in caches.items()}
        result["batch"][name] = {rows: batch_rate(engine, caches[4096], rows) for rows in BATCH}
        result["rows"][name] = {rows: threads_rate(engine, caches[4096], rows) for rows in ROWS}
        result["answers"][name] = prompt_lookup_rates(engine, llm)
        result["answers"][name]["compile_seconds"] = compile_seconds
        for kind in [kind for kind in rates if name in kind]:
            show(kind, rates[kind])
        show(f"{name} in one batch", result["batch"][name])
        show(f"{name} in threads", result["rows"][name])
        show(f"{name} answers", result["answers"][name])
        del llm, engine, caches
    show(f"prefill of {PREFILL} tokens", {**result["reading"], "limit": result.get("reading_limit", 0.0)})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--full", type=int, default=7168, help="the longest history for transformers' full cache")
    parser.add_argument("--longest", type=int, default=HISTORIES[-1], help="the longest history; at least 4,096")
    parser.add_argument("--text", help="a text file for the history; repeated where it is too short")
    arguments = parser.parse_args()
    name = Path(arguments.model).stem
    result = measure(arguments, long_text(arguments.text))
    floor = {kind: size / result["bandwidth"] for kind, size in result["weight_bytes"].items()}
    summary = {
        "floor_tokens_per_second": {kind: 1 / seconds for kind, seconds in floor.items()},
        "rate_at_32768_over_1024": {
            kind: rates[32768] / rates[1024] for kind, rates in result["rates"].items() if 32768 in rates
        },
        "share_of_the_roofline": {  # bytes of weights and cache over bandwidth, after 4,096 tokens
            kind: result["rates"][f"zsmerge {kind}"][4096] * (size + result["cache_bytes"]) / result["bandwidth"]
            for kind, size in result["weight_bytes"].items()
        },
        "batch_8_over_1": {kind: rates[8] / rates[1] for kind, rates in result["batch"].items()},
        "threads_8_over_1": {kind: rates[8] / rates[1] for kind, rates in result["rows"].items()},
    }
    print(json.dumps(summary, indent=1))
    write(f"decode-and-prefill-{name}", {"model": name, "summary": summary, **result})
    lines = {kind: (list(rates), list(rates.values())) for kind, rates in result["rates"].items()}
    plot(f"decode-and-prefill-{name}", f"Decoding with {name}", "tokens of history", "tokens per second", lines)


if __name__ == "__main__":
    main()
