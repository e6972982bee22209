"""What the engine does on a GPU, beside transformers: decoding, batches, reading, memory, the first token of a turn.

    python benchmarks/gpu.py [--geometry 7b 0.5b] [--model NAME] [--seconds 420]

Random weights in the geometry of LLaMA2-7B and Qwen2.5-0.5B, bfloat16, 1,024 slots: no download. Every row is measured
in this run, on this card: decode steps captured as graphs, the same over compiled layers, and step by step; one
conversation behind 4K, 54K and 128K tokens; batches of 8 and 16; reading in chunks of 512 and 2,048 tokens with the
peak memory above the weights; the first token of a 200-token turn behind 100K. Peers: transformers' DynamicCache,
StaticCache with `torch.compile(mode="reduce-overhead")`, and continuous batching. With --model (a real one), whether
greedy answers on the GPU are those of the CPU, in float32.

Parts that would begin after --seconds are left out, and listed. Writes results/gpu-GEOMETRY.json, and prints a table.
`--tiny` runs everything with tiny sizes, also on a CPU (then without graphs), to check the script itself.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from benchmarks.common import median_seconds, write
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.gpu.backend import GPUBackend
from zsmerge_llm.kvcache.cache import Cache

GEOMETRIES: dict[str, dict[str, Any]] = {
    "7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "0.5b": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
    },
}
POSITIONS = 262_144
STEPS = 128
PROMPTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time, in a lighthouse,")


@dataclass(frozen=True)
class Sizes:
    """What is measured. histories, texts: tokens. chunks: of a pass. rows: conversations of a batch."""

    slots: int = 1024
    histories: tuple[int, ...] = (4096, 54_000, 128_000)
    texts: tuple[int, ...] = (4096, 16_384, 54_000)
    chunks: tuple[int, ...] = (512, 2048)
    rows: tuple[int, ...] = (8, 16)
    turn: int = 200
    behind: int = 100_000
    steps: int = STEPS


TINY = Sizes(slots=96, histories=(200,), texts=(400,), chunks=(32, 128), rows=(2,), turn=20, behind=300, steps=8)


@dataclass
class Report:
    """Rows of the table as they are measured, and the parts that there was no time for."""

    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, what: str, unit: str, measure: Callable[[], float], **more: Any) -> None:
        """Measure one row, print it, and free its memory; a failure is a row too."""
        if time.perf_counter() > self.deadline:
            self.left_out.append(what)
            return
        row: dict[str, Any] = {"what": what, "unit": unit}
        try:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            before = allocated()
            row |= {"value": round(measure(), 2), "peak_mb": round((peak() - before) / 1e6), **more}
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        self.rows.append(row)
        print(f"{what:68} {row.get('value', row.get('error'))!s:>10} {unit}  +{row.get('peak_mb', 0)} MB", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_model(geometry: str, device: str) -> PreTrainedModel:
    """A model of random weights, bfloat16."""
    config = AutoConfig.for_model(**GEOMETRIES[geometry], max_position_embeddings=POSITIONS)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.02)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


class StepByStep(GPUBackend):
    """The GPU's backend without graphs: what they gain, and what runs where there is no GPU."""

    def capture(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        return run

    def default_chunk(self, specs: Any) -> int:
        return 512


def engine_of(model: PreTrainedModel, sizes: Sizes, chunk: int = 512, graphs: bool = True) -> Engine:
    """An engine on a model, with graphs where the device has them."""
    kind = GPUBackend if graphs and torch.cuda.is_available() else StepByStep
    backend = kind(model, model.config.num_hidden_layers, False, MAX_DRAFT_TOKENS)
    return Engine(model, CacheConfig(slots=sizes.slots), chunk=chunk, compile=False, backend=backend)


def ids(model: PreTrainedModel, count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, model.config.vocab_size - 5, (count,), generator=generator).tolist()


# -- ours --------------------------------------------------------------------------------------------------------------


def decode_rate(engine: Engine, cache: Cache, steps: int) -> float:
    """Tokens per second of all rows together, tokens handed to the caller one by one, over two runs."""
    params = SamplingParams(max_tokens=steps + 9, ignore_eos=True, lookup=False)
    rates = []
    for _ in range(2):
        stream = engine.decode(cache, [params] * cache.rows, [[]] * cache.rows)
        for _ in range(8):
            next(stream)
        synchronize()
        started = time.perf_counter()
        for _ in range(steps):
            next(stream)
        rates.append(cache.rows * steps / (time.perf_counter() - started))
        for _ in stream:
            pass
    return max(rates)


def ours(report: Report, model: PreTrainedModel, sizes: Sizes) -> None:
    """Decoding, batches, reading and the first token of a turn."""
    with closing(engine_of(model, sizes, chunk=sizes.chunks[-1])) as engine:
        first = engine.new_cache()
        for history in sizes.histories:
            cache = engine.new_cache()
            engine.read(cache, ids(model, history))
            decoding(report, engine, cache, sizes, f"behind {history}, graphs")
            first = cache if history == sizes.histories[0] else first
        batches(report, engine, first, sizes, "graphs")
        turn, behind = ids(model, sizes.turn, seed=1), engine.new_cache()
        engine.read(behind, ids(model, sizes.behind))
        report.add(
            f"first token of a {sizes.turn}-token turn behind {sizes.behind}",
            "ms",
            lambda: 1000 * median_seconds(lambda: first_token(engine, behind.clone(), turn), 5, warmup=2),
        )
        print("not captured because:", engine.backend.disabled_reason)
    with closing(engine_of(model, sizes, graphs=False)) as plain:
        decoding(report, plain, first, sizes, "step by step")
    for chunk in sizes.chunks:
        with closing(engine_of(model, sizes, chunk=chunk)) as reading:
            for length in sizes.texts:
                report.add(f"read {length}, chunks of {chunk}", "tokens/s", partial(read_rate, reading, length))
    with closing(engine_of(model, sizes)) as compiled:
        compiled.backend.start()
        decoding(report, compiled, first, sizes, "graphs over compiled layers")
        batches(report, compiled, first, sizes, "graphs over compiled layers")
        print("not compiled because:", compiled.backend.disabled_reason)


def decoding(report: Report, engine: Engine, cache: Cache, sizes: Sizes, how: str) -> None:
    report.add(f"decode, one conversation, {how}", "tokens/s", lambda: decode_rate(engine, cache.clone(), sizes.steps))


def batches(report: Report, engine: Engine, cache: Cache, sizes: Sizes, how: str) -> None:
    for rows in sizes.rows:
        batch = Cache.stack([cache] * rows)
        report.add(f"decode, batch of {rows}, {how}", "tokens/s", partial(decode_rate, engine, batch, sizes.steps))


def read_rate(engine: Engine, length: int) -> float:
    text = ids(engine.model, length)
    return length / median_seconds(lambda: read(engine, text), 2)


def read(engine: Engine, text: list[int]) -> None:
    engine.read(engine.new_cache(), text, probe=text[-32:])
    synchronize()


def first_token(engine: Engine, cache: Cache, turn: list[int]) -> None:
    next(engine.stream(cache, turn, SamplingParams(max_tokens=2, ignore_eos=True), probe=turn[-32:]))
    synchronize()


# -- peers -------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def dynamic_rate(model: PreTrainedModel, history: int, rows: int, steps: int) -> float:
    """Tokens per second of transformers' full cache."""
    cache, device = DynamicCache(config=model.config), model.device
    prompt = torch.tensor([ids(model, history)] * rows, device=device)
    for part in prompt.split(2048, dim=1):
        token = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def step() -> None:
        nonlocal token
        token = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
        token.tolist()

    return rows / median_seconds(step, steps, warmup=4)


@torch.inference_mode()
def static_rate(model: PreTrainedModel, history: int, steps: int) -> float:
    """Tokens per second of transformers' StaticCache with `reduce-overhead`."""
    cache = StaticCache(config=model.config, max_cache_len=history + steps + 64)
    prompt = torch.tensor([ids(model, history)], device=model.device)
    for part in prompt.split(2048, dim=1):
        token = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    mode = {"mode": "reduce-overhead"} if torch.cuda.is_available() else {"backend": "eager"}
    forward = torch.compile(model.forward, **mode)

    def step() -> None:
        forward(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1).tolist()

    return 1 / median_seconds(step, steps, warmup=6)


@torch.inference_mode()
def transformers_reading(model: PreTrainedModel, length: int) -> float:
    """Tokens per second of reading into transformers' full cache, in passes of 2,048."""
    text = torch.tensor([ids(model, length)], device=model.device)

    def run() -> None:
        cache = DynamicCache(config=model.config)
        for part in text.split(2048, dim=1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        synchronize()

    return length / median_seconds(run, 2)


def continuous_rate(model: PreTrainedModel, history: int, rows: int, steps: int) -> float:
    """Tokens per second of transformers' continuous batching, reading left out: two lengths of answer are compared."""
    from transformers import GenerationConfig

    prompts = [ids(model, history, seed=row) for row in range(rows)]

    def seconds(new: int) -> float:
        settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, use_cuda_graph=True)
        started = time.perf_counter()
        model.generate_batch(prompts, generation_config=settings)
        return time.perf_counter() - started

    seconds(4)
    return rows * steps / (seconds(steps + 4) - seconds(4))


def peers(report: Report, model: PreTrainedModel, sizes: Sizes) -> None:
    """transformers on the same model."""
    model.set_attn_implementation("sdpa")
    history, rows, few = sizes.histories[0], sizes.rows[0], max(8, sizes.steps // 4)
    name = "transformers, DynamicCache"
    report.add(f"{name}, behind {history}", "tokens/s", lambda: dynamic_rate(model, history, 1, few))
    report.add(f"{name}, batch of {rows}", "tokens/s", lambda: dynamic_rate(model, history, rows, few))
    for length in sizes.texts:
        report.add(f"{name}, read {length}", "tokens/s", partial(transformers_reading, model, length))
    name = "transformers, StaticCache + reduce-overhead"
    report.add(f"{name}, behind {history}", "tokens/s", lambda: static_rate(model, history, few))
    if torch.cuda.is_available():
        name = "transformers, continuous batching"
        report.add(f"{name}, {rows}", "tokens/s", lambda: continuous_rate(model, history, rows, few))


# -- a real model ------------------------------------------------------------------------------------------------------


def same_answers(name: str) -> Iterator[tuple[str, bool]]:
    """Yield each prompt, and whether its greedy answer on the GPU is the CPU's, in float32."""
    config, params = CacheConfig(slots=96, recent=16, stage=16), SamplingParams(max_tokens=100, ignore_eos=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llms = [LLM(name, device=each, dtype="float32", cache=config, compile=False) for each in (device, "cpu")]
    for prompt in PROMPTS:
        one, other = (llm.complete(prompt, sampling=params).text for llm in llms)
        yield prompt, one == other


def bandwidth() -> float:
    """Bytes per second of a copy on the device, read and written."""
    size = 2**30 if torch.cuda.is_available() else 2**24
    source, target = (torch.empty(size, dtype=torch.uint8, device=_device()) for _ in range(2))

    def copy() -> None:
        target.copy_(source)
        synchronize()

    return 2 * size / median_seconds(copy, 10, warmup=3)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", nargs="+", default=["7b", "0.5b"], choices=[*GEOMETRIES])
    parser.add_argument("--model", help="a real model, for greedy answers on the GPU and the CPU")
    parser.add_argument("--seconds", type=float, default=420)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to check the script")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --tiny checks the script on a CPU")
    started = time.perf_counter()
    names, sizes = (["tiny"], TINY) if options.tiny else (options.geometry, Sizes())
    for index, name in enumerate(names):
        deadline = started + options.seconds * (index + 1) / len(names)
        report = Report(deadline)
        model = random_model(name, _device())
        weights = sum(weight.nbytes for key, weight in model.named_parameters() if "embed" not in key)
        limit = bandwidth() / weights
        print(f"\n{name}: {weights / 1e9:.1f} GB of weights, read at most {limit:.0f} times a second", flush=True)
        ours(report, model, sizes)
        peers(report, model, sizes)
        result = {
            "geometry": name,
            "slots": sizes.slots,
            "bandwidth_limit_tokens_per_second": round(limit, 1),
            "rows": report.rows,
            "left_out": report.left_out,
        }
        if not options.tiny:
            print("saved", write(f"gpu-{name}", result))
        if report.left_out:
            print("no time for:", *report.left_out, sep="\n  ")
        del model
        gc.collect()
    if options.model:
        for prompt, same in same_answers(options.model):
            print(f"{'same' if same else 'DIFFERENT'}: {prompt!r}")


if __name__ == "__main__":
    main()
