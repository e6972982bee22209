"""Decoding: tokens per second against the length of the history, the number format, and the number of conversations.

    python benchmarks/speed.py [--model smollm2] [--formats bf16 int8 int4] [--llama FILE.gguf]

One run, one process: llama.cpp with the weights of a GGUF file (--llama, needs llama-cpp-python), transformers with its
full cache, and zsmerge-llm with 1,024 slots in each number format, as transformers wrote its layers (eager) and
compiled, after histories of 64 to 32,768 tokens (the others as far as --full); then several conversations of 4,096
tokens decoding in one batch, and in threads; then answers about the demo's document with and without prompt lookup; and
greedy answers to 20 prompts, eager against compiled. `floor` is the bytes of the weights divided by the bandwidth that
a plain sum over memory reaches in this run; `reading_limit` is what reading would reach if it were nothing but products
with the layers' matrices, as fast as PyTorch multiplies large ones in bfloat16 in this run. Writes
results/speed-MODEL.json and .png. Run it with nothing else running.
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
READ = 7168
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
    """Seconds of the quickest of some runs: what the machine can do, whatever else it does now and then."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def bandwidth() -> float:
    """Bytes per second of reading memory, the best of a few sums over 512 MB."""
    block = torch.ones(128 * 1024 * 1024)
    return block.nbytes / fastest(block.sum, 5)


def multiplication() -> float:
    """Multiply-adds per second of bfloat16 matrices, a chunk times one of a layer's size, the best of many."""
    rows, matrix = torch.ones(512, 1024, dtype=torch.bfloat16), torch.ones(4096, 1024, dtype=torch.bfloat16)
    return len(rows) * matrix.numel() / fastest(lambda: torch.nn.functional.linear(rows, matrix), 40)


def steps(run: Any) -> float:
    """Median seconds of one step, after two unmeasured ones."""
    times = []
    for number in range(STEPS + 2):
        started = time.perf_counter()
        run(number)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def histories(engine: Engine, ids: list[int]) -> tuple[dict[int, Cache], float]:
    """The cache after each of HISTORIES, as far as one long text goes; tokens per second of reading the first READ."""
    cache, caches, seconds = engine.new_cache(), {}, {}
    for length in [length for length in HISTORIES if length <= len(ids)]:
        started = time.perf_counter()
        engine.read(cache, ids[cache.seen : length])
        seconds[length] = time.perf_counter() - started
        caches[length] = cache.clone()
    return caches, rate_of(seconds)


def rate_of(seconds: dict[int, float]) -> float:
    """Tokens per second up to READ, from the seconds between one length and the next; 0 where it was not reached."""
    return READ / sum(spent for length, spent in seconds.items() if length <= READ) if READ in seconds else 0.0


def ours(engine: Engine, before: Cache) -> float:
    """Tokens per second on a copy of a cache, by the decode loop that every answer goes through."""
    cache = before.clone()
    cache.compress_stage()
    stream = engine.decode(cache, [SamplingParams(max_tokens=STEPS + 3, ignore_eos=True, lookup=False)], [[]])
    return 1 / steps(lambda _: next(stream))


def about_a_document(engine: Engine, llm: LLM) -> dict[str, float]:
    """Tokens per second of greedy answers to questions about a text, with and without guesses from the prompt."""
    text = files("zsmerge_llm").joinpath("data", "marigold.txt").read_text(encoding="utf-8")[:6000]
    seconds, said = {"with": 0.0, "without": 0.0}, {"with": 0, "without": 0}
    for question in QUESTIONS:
        message = [{"role": "user", "content": f"{text}\n\n{question}"}]
        ids = llm.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        behind = engine.new_cache()
        engine.read(behind, ids)
        for kind in ("without", "with"):
            params = SamplingParams(max_tokens=60, lookup=kind == "with")
            times = []
            for _ in range(3):  # the first one compiles
                started = time.perf_counter()
                answer = list(engine.decode(behind.clone(), [params], [ids]))
                times.append(time.perf_counter() - started)
            said[kind] += len(answer)
            seconds[kind] += min(times[1:])
    return {kind: said[kind] / seconds[kind] for kind in seconds}


@torch.inference_mode()
def theirs(engine: Engine, ids: list[int], rows: int = 1) -> tuple[float, float]:
    """The same for transformers' full cache and SDPA, of `rows` conversations in one batch; then its tokens per second
    of reading one of them."""
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

    rate = rows / steps(follow)
    model.set_attn_implementation("zsmerge")
    return rate, reading


def llama(path: str, ids: list[int], longest: int) -> tuple[dict[int, float], float]:
    """Tokens per second of llama.cpp after each of HISTORIES as far as `longest`, with a full cache; then of reading.

    It runs on as many threads as PyTorch does.
    """
    from llama_cpp import Llama

    lengths, threads = [length for length in HISTORIES if length <= longest], torch.get_num_threads()
    room = max(lengths) + 256
    model = Llama(path, n_ctx=room, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    rates, seconds = {}, {}
    for length in lengths:
        started = time.perf_counter()
        model.eval(ids[model.n_tokens : length])
        seconds[length] = time.perf_counter() - started
        rates[length] = 1 / steps(lambda number: model.eval([ids[number]]))
    return rates, rate_of(seconds)


def reading(engine: Engine, ids: list[int]) -> float:
    """Tokens per second of reading in one go."""
    return len(ids) / median_seconds(lambda: engine.read(engine.new_cache(), ids), 2)


def answers(engine: Engine, ids: list[int]) -> list[list[int]]:
    """Greedy answers to 20 prompts, pieces of a text."""
    said = []
    for start in range(0, 20 * PROMPT, PROMPT):
        cache, params = engine.new_cache(), SamplingParams(max_tokens=STEPS, ignore_eos=True, lookup=False)
        said.append(list(engine.stream(cache, ids[start : start + PROMPT], params)))
    return said


def at_once(engine: Engine, base: Cache, rows: int) -> float:
    """Tokens per second of `rows` conversations that decode in threads of their own."""
    params = SamplingParams(max_tokens=STEPS + 8, ignore_eos=True, lookup=False)
    caches = [base.clone() for _ in range(rows)]

    def talk(cache: Cache) -> list[float]:
        return [time.perf_counter() for _ in engine.decode(cache, [params], [[]])]

    with ThreadPoolExecutor(rows) as pool:
        ticks = list(pool.map(talk, caches))
    begin, end = max(times[3] for times in ticks), min(times[-1] for times in ticks)
    return sum(sum(begin <= tick <= end for tick in times) for times in ticks) / (end - begin)


def in_one_batch(engine: Engine, base: Cache, rows: int) -> float:
    """Tokens per second of `rows` conversations that are decoded as one batch (`LLM.batch`)."""
    batch = Cache.stack([base] * rows)
    params = SamplingParams(max_tokens=STEPS + 3, ignore_eos=True, lookup=False)
    stream = engine.decode(batch, [params] * rows, [[]] * rows)
    return rows / steps(lambda _: next(stream))


def show(what: str, rates: dict[Any, float]) -> None:
    print(what, {kind: round(rate, 1) for kind, rate in rates.items()}, flush=True)


def measure(arguments: argparse.Namespace, text: str) -> dict[str, Any]:
    parts: dict[str, Any] = {
        name: {} for name in ("rates", "reading", "batch", "rows", "weight_bytes", "answers", "same_as_eager")
    }
    result = {"bandwidth": bandwidth(), "multiplication": multiplication(), **parts}
    if arguments.llama:
        ids = repeat_to(LLM(arguments.model).tokenizer(text).input_ids, arguments.full)
        result["rates"]["llama.cpp"], result["reading"]["llama.cpp"] = llama(arguments.llama, ids, arguments.full)
        show("llama.cpp", result["rates"]["llama.cpp"])
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
            result["reading_limit"] = result["multiplication"] / sum(each.numel() for each in weights)
            lengths = [length for length in HISTORIES if length <= arguments.full]
            both = {length: theirs(engine, ids[:length]) for length in lengths}
            rates["transformers bf16"] = {length: rate for length, (rate, _) in both.items()}
            result["reading"]["transformers bf16"] = both[READ][1] if READ in both else 0.0
            result["batch"]["transformers bf16"] = {rows: theirs(engine, ids[:4096], rows)[0] for rows in (1, 8)}
        rates[f"zsmerge {name} eager"] = {length: ours(engine, cache) for length, cache in caches.items()}
        eager = answers(engine, ids)
        engine.fusion.start()
        ours(engine, caches[64])  # compiles
        result["reading"][f"zsmerge {name}"] = reading(engine, ids[:READ])
        same = [mine == other for mine, other in zip(eager, answers(engine, ids), strict=True)]
        result["same_as_eager"][name] = f"{sum(same)} of {len(same)} prompts"
        print(name, "same text compiled as eager:", result["same_as_eager"][name], flush=True)
        rates[f"zsmerge {name}"] = {length: ours(engine, cache) for length, cache in caches.items()}
        result["batch"][name] = {rows: in_one_batch(engine, caches[4096], rows) for rows in BATCH}
        result["rows"][name] = {rows: at_once(engine, caches[4096], rows) for rows in ROWS}
        result["answers"][name] = about_a_document(engine, llm)
        result["answers"][name]["compile_seconds"] = engine.fusion.seconds
        for kind in [kind for kind in rates if name in kind]:
            show(kind, rates[kind])
        show(f"{name} in one batch", result["batch"][name])
        show(f"{name} in threads", result["rows"][name])
        show(f"{name} answers", result["answers"][name])
        del llm, engine, caches
    show(f"reading {READ} tokens", {**result["reading"], "limit": result.get("reading_limit", 0.0)})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--llama", metavar="FILE", help="a GGUF file for llama.cpp")
    parser.add_argument("--full", type=int, default=7168, help="the longest history for transformers' full cache")
    parser.add_argument("--longest", type=int, default=HISTORIES[-1], help="the longest history; at least 4,096")
    parser.add_argument("--text", help="a text file for the history; repeat_to where it is too short")
    arguments = parser.parse_args()
    name = Path(arguments.model).stem
    result = measure(arguments, long_text(arguments.text))
    floor = {kind: size / result["bandwidth"] for kind, size in result["weight_bytes"].items()}
    summary = {
        "floor_tokens_per_second": {kind: 1 / seconds for kind, seconds in floor.items()},
        "rate_at_32768_over_1024": {
            kind: rates[32768] / rates[1024] for kind, rates in result["rates"].items() if 32768 in rates
        },
        "share_of_the_roofline": {  # of weights and a full cache of constant size, behind 4,096 tokens
            kind: result["rates"][f"zsmerge {kind}"][4096] * (size + result["cache_bytes"]) / result["bandwidth"]
            for kind, size in result["weight_bytes"].items()
        },
        "batch_8_over_1": {kind: rates[8] / rates[1] for kind, rates in result["batch"].items()},
        "threads_8_over_1": {kind: rates[8] / rates[1] for kind, rates in result["rows"].items()},
    }
    print(json.dumps(summary, indent=1))
    write(f"speed-{name}", {"model": name, "summary": summary, **result})
    lines = {kind: (list(rates), list(rates.values())) for kind, rates in result["rates"].items()}
    plot(f"speed-{name}", f"Decoding with {name}", "tokens of history", "tokens per second", lines)


if __name__ == "__main__":
    main()
