"""Conversations that decode at the same time share forward passes, and no answer changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import CacheConfig, Engine, SamplingParams
from zsmerge_llm.engine.model_runner import ModelRunner
from zsmerge_llm.kvcache.cache import Cache

SMALL = CacheConfig(slots=24, sink=2, recent=4, stage=5)
MERGING = CacheConfig(slots=24, sink=2, recent=4, residual=4, alpha=1.0, stage=3, policy="cumulative_attention")
LIMIT = 60


class RecordingEngine(Engine):
    """Record the rows and tokens of each pass, and let those fail for which `failing` is true."""

    def __init__(self, config: CacheConfig) -> None:
        self.passes: list[tuple[int, int]] = []
        self.failing: Callable[[int, int], bool] = lambda rows, passes: False
        with mock.patch("zsmerge_llm.engine.engine.ModelRunner", partial(RecordingRunner, self)):
            super().__init__(tiny_model(), config)


class RecordingRunner(ModelRunner):
    """Run the passes of a `RecordingEngine`."""

    def __init__(self, engine: RecordingEngine, *parts: Any) -> None:
        super().__init__(*parts)
        self.recorder = engine

    def run(self, cache: Cache, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.recorder.passes.append((cache.rows, ids.shape[1]))
        if self.recorder.failing(cache.rows, len(self.recorder.passes)):
            raise MemoryError("no room")
        return super().run(cache, ids, *args, **kwargs)


def generate(engine: Engine, cache: Cache, length: int) -> Iterator[int]:
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    for (token,) in engine.decode(cache, [params], [[]]):
        assert token is not None
        yield token


def read(engine: Engine, length: int, seed: int) -> Cache:
    cache = engine.new_cache()
    engine.read(cache, tokens(length, seed=seed))
    return cache


def run_concurrently(work: list[Callable[[], Any]]) -> list[Any]:
    """Run each function in a thread of its own, started at the same time, and return their results."""
    barrier = threading.Barrier(len(work))

    def run(job: Callable[[], Any]) -> Any:
        barrier.wait(LIMIT)
        return job()

    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(LIMIT) for future in [pool.submit(run, job) for job in work]]


LENGTHS = [(5, 30), (40, 12), (90, 25), (23, 1), (60, 40)]
"""Prompt tokens and generated tokens of each conversation."""


def conversations(engine: Engine) -> list[Cache]:
    return [read(engine, length, seed) for seed, (length, _) in enumerate(LENGTHS)]


def decode_sequentially(engine: Engine) -> tuple[list[list[int]], list[Cache]]:
    caches = conversations(engine)
    return [list(generate(engine, cache, new)) for cache, (_, new) in zip(caches, LENGTHS, strict=True)], caches


def decode_concurrently(engine: Engine) -> tuple[list[list[int]], list[Cache]]:
    caches = conversations(engine)
    engine.passes.clear()
    jobs = [
        lambda cache=cache, new=new: list(generate(engine, cache, new))
        for cache, (_, new) in zip(caches, LENGTHS, strict=True)
    ]
    return run_concurrently(jobs), caches


@pytest.mark.parametrize("config", [SMALL, MERGING, CacheConfig.paper(24), CacheConfig.streaming(24)])
def test_threads_share_passes_and_answers_equal_sequential_ones(config: CacheConfig) -> None:
    engine = RecordingEngine(config)
    expected, single = decode_sequentially(engine)
    answers, caches = decode_concurrently(engine)

    assert answers == expected
    assert max(rows for rows, _ in engine.passes) > 2
    assert len(engine.passes) < sum(new for _, new in LENGTHS) * 0.7
    for cache, same in zip(caches, single, strict=True):
        assert cache.lengths == same.lengths
        assert [layer.num_filled for layer in cache.layers] == [layer.num_filled for layer in same.layers]
        used = cache.layers[1].num_filled[0]
        keys, expected_keys = cache.layers[1].keys[:, :, :used], same.layers[1].keys[:, :, :used]
        torch.testing.assert_close(keys, expected_keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(cache.logits, same.logits, atol=1e-4, rtol=1e-4)


def test_a_conversation_continues_alone_and_in_a_batch_after_it_was_in_a_batch() -> None:
    engine = RecordingEngine(SMALL)
    expected, single = decode_sequentially(engine)
    _, caches = decode_concurrently(engine)
    for turn in range(2):
        more = [tokens(7, seed=50 + turn), tokens(9, seed=60 + turn)]
        for cache, same, ids in zip(caches, single, more, strict=False):
            torch.testing.assert_close(engine.read(cache, ids), engine.read(same, ids), atol=1e-4, rtol=1e-4)
        assert run_concurrently([lambda cache=cache: list(generate(engine, cache, 9)) for cache in caches]) == [
            list(generate(engine, same, 9)) for same in single
        ]
    assert expected[0]


def test_a_stream_that_pauses_does_not_block_others_and_resumes() -> None:
    engine = RecordingEngine(SMALL)
    expected, _ = decode_sequentially(engine)
    first, second, third = conversations(engine)[:3]
    slow = generate(engine, first, 30)
    first_steps = run_concurrently([lambda: [next(slow) for _ in range(4)], lambda: list(generate(engine, second, 12))])
    assert first_steps[1] == expected[1]
    assert list(generate(engine, third, 25)) == expected[2]
    assert [*first_steps[0], *slow] == expected[0]


def test_a_stream_closed_within_a_batch_leaves_the_other_rows_and_its_own_cache_valid() -> None:
    engine = RecordingEngine(SMALL)
    expected, _ = decode_sequentially(engine)
    caches = conversations(engine)[:3]

    def close_early() -> list[int]:
        stream = generate(engine, caches[0], 30)
        tokens = [next(stream) for _ in range(6)]
        stream.close()
        return tokens

    answers = run_concurrently(
        [close_early, *(lambda n=n: list(generate(engine, caches[n], LENGTHS[n][1])) for n in (1, 2))]
    )
    assert answers == [expected[0][:6], *expected[1:3]]
    assert caches[0].lengths[0] in (LENGTHS[0][0] + 5, LENGTHS[0][0] + 6)
    same = read(engine, *LENGTHS[0][:1], seed=0)
    done = caches[0].lengths[0] - LENGTHS[0][0]
    logits = [engine.read(same, [token]) for token in expected[0][:done]][-1]
    torch.testing.assert_close(caches[0].logits[0], logits, atol=1e-4, rtol=1e-4)


def test_when_a_pass_of_a_batch_fails_every_conversation_goes_on_alone() -> None:
    engine = RecordingEngine(SMALL)
    expected, _ = decode_sequentially(engine)
    engine.failing = lambda rows, passes: rows > 1 and passes > 6
    answers, _ = decode_concurrently(engine)

    assert max(rows for rows, _ in engine.passes) > 1
    assert answers == expected


def test_a_conversation_whose_batch_fails_while_the_others_pause_goes_on_alone() -> None:
    engine = RecordingEngine(SMALL)
    expected, _ = decode_sequentially(engine)
    caches = conversations(engine)
    first, second = (generate(engine, caches[at], LENGTHS[at][1]) for at in (0, 2))
    begun = run_concurrently([lambda each=each: [next(each) for _ in range(6)] for each in (first, second)])
    engine.passes.clear()
    engine.failing = lambda rows, passes: rows > 1
    assert [*begun[0], *first] == expected[0]
    assert engine.passes[0][0] == 2
    assert [*begun[1], *second] == expected[2]


def test_a_conversation_whose_own_pass_fails_raises_and_the_others_continue() -> None:
    engine = RecordingEngine(SMALL)
    expected, _ = decode_sequentially(engine)
    caches = conversations(engine)
    bad = caches[2]
    run = engine.runner.run

    def failing(cache: Cache, *args: Any, **kwargs: Any) -> torch.Tensor:
        if cache.rows > 1 or cache is bad:
            raise MemoryError("no room")
        return run(cache, *args, **kwargs)

    def attempt(number: int) -> list[int] | str:
        try:
            return list(generate(engine, caches[number], LENGTHS[number][1]))
        except MemoryError:
            return "failed"

    with mock.patch.object(engine.runner, "run", failing):
        answers = run_concurrently([lambda number=number: attempt(number) for number in range(5)])
    assert answers == ["failed" if number == 2 else expected[number] for number in range(5)]


def test_caches_of_other_configurations_decode_beside_a_batch() -> None:
    engine = RecordingEngine(SMALL)
    other = [engine.new_cache(CacheConfig.full()), engine.new_cache(CacheConfig.streaming(24))]
    for cache in other:
        engine.read(cache, tokens(40, seed=9))
    expected = [list(generate(engine, cache.clone(), 20)) for cache in other]
    in_batch, _ = decode_sequentially(engine)
    caches = conversations(engine)
    jobs = [lambda cache=cache: list(generate(engine, cache, 20)) for cache in other]
    jobs += [lambda n=n: list(generate(engine, caches[n], LENGTHS[n][1])) for n in range(3)]
    assert run_concurrently(jobs) == [*expected, *in_batch[:3]]
