"""The paper's geometry: layers of LLaMA2-7B's shapes, full cache against a compressed one, decode rate and memory.

    python benchmarks/speed/kv_cache_geometry.py [--layers 1] [--lengths 4096 18432 54272]

Random weights, bfloat16: 32 heads of 128 (each its own keys and values), hidden size 4,096, as in arXiv 2503.10714,
with few layers, because one of them holds 885 MB of keys and values after 54K tokens. Three caches in one run: full,
5 % of the longest history as slots, and 18,432 slots. Histories are random keys and values written into the caches,
so no time goes into prefill: the time of a decode step depends on how much is held, not on what. All three use the same
matrix kernels, so caches and attention are compared. Writes results/kv-cache-geometry.json and plots. Run it with
nothing else running.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.common import full_cache_bytes, median_seconds, plot, write
from zsmerge_llm import CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.cache import Cache

HEADS, SIZE = 32, 128
STEPS = 15


def model(layers: int, longest: int) -> LlamaForCausalLM:
    """Return layers of LLaMA2-7B's shapes with random weights, and a small vocabulary."""
    config = LlamaConfig(
        hidden_size=HEADS * SIZE, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, vocab_size=1024, max_position_embeddings=2 * longest,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def noise(tokens: int) -> torch.Tensor:
    """Return keys or values bfloat16 [1, heads, tokens, size]: one piece, repeated."""
    return torch.randn(1, HEADS, 512, SIZE).bfloat16().repeat(1, 1, -(-tokens // 512), 1)[:, :, :tokens]


@torch.inference_mode()
def transformers_step(engine: Engine, length: int) -> tuple[float, int]:
    """Return seconds of a decode step of transformers after `length` tokens, and bytes of its keys and values."""
    cache = DynamicCache(config=engine.model.config)
    for layer in range(len(engine.specs)):
        cache.update(noise(length), noise(length), layer)
    engine.model.set_attn_implementation("sdpa")
    token = torch.tensor([[5]])
    seconds = median_seconds(lambda: engine.model(token, past_key_values=cache, use_cache=True), STEPS, warmup=3)
    engine.model.set_attn_implementation("zsmerge")
    return seconds, full_cache_bytes(cache)


def filled(engine: Engine, length: int, slots: int) -> Cache:
    """Return a cache as it is after `length` tokens, with random keys and values."""
    cache = engine.new_cache(CacheConfig(slots=slots, recent=min(64, slots // 4)))
    engine.read(cache, [5])
    used = min(length, slots)
    for layer in cache.layers:
        layer.keys[:, :, :used], layer.values[:, :, :used] = noise(used), noise(used)
        layer.multiplicity[:, :, :used] = 1
        layer.position[:, :, :used] = torch.arange(length - used, length, dtype=torch.int32)
        layer.num_filled = [used]
    cache.lengths = [length]
    return cache


def zsmerge_step(engine: Engine, length: int, slots: int) -> tuple[float, int]:
    """Return seconds of a decode step and bytes of the whole cache: slots, stage, scores and all."""
    cache = filled(engine, length, slots)
    return median_seconds(lambda: engine.read(cache, [5]), STEPS, warmup=3), cache.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 9216, 18432, 36864, 54272])
    arguments = parser.parse_args()
    longest = max(arguments.lengths)
    engine = Engine(model(arguments.layers, longest), compile=True)
    kinds = {"full": None, "5 %": round(0.05 * longest), "18K": 18432}
    result: dict[str, dict[int, Any]] = {kind: {} for kind in kinds}
    for length in arguments.lengths:
        for kind, slots in kinds.items():
            seconds, size = transformers_step(engine, length) if slots is None else zsmerge_step(engine, length, slots)
            result[kind][length] = {"tokens_per_second": 1 / seconds, "cache_bytes": size}
            print(length, kind, f"{1 / seconds:.1f} tokens/s, {size / 1e6:.0f} MB", flush=True)
    last = {kind: result[kind][longest]["tokens_per_second"] for kind in kinds}
    summary = {kind: rate / last["full"] for kind, rate in last.items()}
    print(json.dumps(summary, indent=1))
    write("kv-cache-geometry", {"layers": arguments.layers, "over_full_at_longest": summary, "measured": result})
    for name, unit in (("tokens_per_second", "tokens per second"), ("cache_bytes", "bytes of the cache")):
        lines = {kind: (list(rows), [row[name] for row in rows.values()]) for kind, rows in result.items()}
        title = f"{arguments.layers} layer(s) of LLaMA2-7B's shapes"
        plot(f"kv-cache-geometry-{name.split('_')[0]}", title, "tokens of history", unit, lines)


if __name__ == "__main__":
    main()
