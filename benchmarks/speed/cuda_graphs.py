"""Decode steps as CUDA graphs: what a GPU gains once no Python runs between the kernels.

    python benchmarks/speed/cuda_graphs.py [--model smollm2] [--history 4096] [--steps 256]

A cache of constant size goes through the same fill levels of its stage between two compressions. Each is captured once
as a graph of the whole model, for one conversation, and replayed whenever the cache has that fill again; the step that
compresses runs eagerly. Tokens per second in one run: transformers' full cache, the decode loop, compiled layers, and
graphs; and how many tokens graphs and loop have in common. Without CUDA the steps are run instead of captured: the
rate of `graphs` then means nothing, the tokens do. Not measured on a GPU yet. Writes results/cuda-graphs-MODEL.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from benchmarks.common import long_text, repeat_to, write
from benchmarks.speed.decode_and_prefill import transformers_rates
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.attention.interface import forward
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.attention.passes import ForwardPass
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.cache import Cache


class Graphs:
    """The decode steps of one one-row cache, captured for each fill level when it is first met."""

    def __init__(self, engine: Engine, cache: Cache) -> None:
        self.engine, self.cache = engine, cache
        device = engine.device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.seen = torch.tensor(cache.lengths, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.captured: dict[tuple[int, ...], tuple[Callable[[], None], Tensor]] = {}

    def step(self, token: int) -> int:
        """Read one token and return the next one, greedily."""
        cache, layers = self.cache, self.cache.layers
        self.engine.runner.remapper.ensure_positions(cache, [1], 0)
        self.token.fill_(token)
        self.position.fill_(cache.lengths[0])
        self.seen.fill_(cache.lengths[0] + 1)
        state = (cache.position_maps[0].offset, *(layer.num_filled[0] for layer in layers))
        if self.engine.device.type != "cuda" or not all(layer.fits(1) for layer in layers):
            logits = self._forward()
        elif state in self.captured:
            replay, logits = self.captured[state]
            replay()
            for layer in layers:
                layer.num_filled = [layer.num_filled[0] + 1]
        else:
            logits = self._capture(state)
        cache.lengths = [cache.lengths[0] + 1]
        return int(logits[0, -1].argmax())

    def _forward(self) -> Tensor:
        """Run one pass over tensors whose addresses stay: [1, 1, vocab]."""
        layout = PassLayout(1, self.position, None, [1], self.seen)
        step = ForwardPass(self.cache, layout, self.engine.backend)
        rope_position = self.position - self.cache.position_maps[0].offset
        return forward(self.engine.model, step, input_ids=self.token, position_ids=rope_position, logits_to_keep=1)

    def _capture(self, state: tuple[int, ...]) -> Tensor:
        """Run the pass on a side stream as warm-up, then capture it; only the replay counts."""
        before = self.cache.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward()
        torch.cuda.current_stream().wait_stream(side)
        for layer, old in zip(self.cache.layers, before.layers, strict=True):
            layer.num_filled = list(old.num_filled)
            layer.queries.copy_(old.queries)  # recording a token twice would push another out
            layer.query_positions.copy_(old.query_positions)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward()
        self.captured[state] = (graph.replay, logits)
        graph.replay()
        return logits


def by_loop(engine: Engine, cache: Cache, steps: int) -> Iterator[int]:
    """Yield greedy tokens by the engine's decode loop."""
    params = SamplingParams(max_tokens=steps, ignore_eos=True, lookup=False)
    return (token or 0 for (token,) in engine.decode(cache, [params], [[]]))


def by_graphs(engine: Engine, cache: Cache, steps: int) -> Iterator[int]:
    """Yield greedy tokens by graphs."""
    assert cache.logits is not None
    graphs, token = Graphs(engine, cache), int(cache.logits[0].argmax())
    for _ in range(steps):
        yield token
        token = graphs.step(token)


def rate(stream: Iterator[int], skip: int) -> tuple[float, list[int]]:
    """Return tokens per second by the median step, without the first `skip`, and the tokens."""
    tokens, times = [], []
    for token in stream:
        tokens.append(token)
        times.append(time.perf_counter())
    return 1 / statistics.median(b - a for a, b in itertools.pairwise(times[skip:])), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--history", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=512)
    parser.add_argument("--text", help="a text file for the history; repeated where it is too short")
    arguments = parser.parse_args()
    llm = LLM(arguments.model, cache=CacheConfig(slots=1024), compile=False)
    engine, skip = llm.engine, arguments.steps // 2  # by then every fill has been captured
    ids = repeat_to(llm.tokenizer(long_text(arguments.text)).input_ids, arguments.history)
    cache, rates = engine.new_cache(), {}
    engine.read(cache, ids)
    cache.compress_stage()
    with torch.inference_mode():
        rates["transformers"], _ = transformers_rates(engine, ids)
        rates["loop"], looped = rate(by_loop(engine, cache.clone(), arguments.steps), skip)
        rates["graphs"], graphed = rate(by_graphs(engine, cache.clone(), arguments.steps), skip)
        engine.backend.start()
        rates["compiled"], _ = rate(by_loop(engine, cache.clone(), arguments.steps), skip)
    agree = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(looped, graphed, strict=True)))
    result = {"device": str(engine.device), "rates": rates, "same_tokens": agree, "steps": arguments.steps}
    print(result)
    write(f"cuda-graphs-{Path(arguments.model).stem}", {"model": Path(arguments.model).stem, **result})


if __name__ == "__main__":
    main()
