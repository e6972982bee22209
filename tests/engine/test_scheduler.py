"""Conversations that decode at the same time share forward passes, and none can tell."""

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


class Counted(Engine):
    """Notes how many rows and tokens each pass had; may be told to fail."""

    def __init__(self, config: CacheConfig) -> None:
        self.passes: list[tuple[int, int]] = []
        self.failing: Callable[[int, int], bool] = lambda rows, passes: False
        with mock.patch("zsmerge_llm.engine.engine.ModelRunner", partial(CountedRunner, self)):
            super().__init__(tiny_model(), config)


class CountedRunner(ModelRunner):
    """Runs the passes of a `Counted` engine."""

    def __init__(self, counted: Counted, *parts: Any) -> None:
        super().__init__(*parts)
        self.counted = counted

    def run(self, cache: Cache, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.counted.passes.append((cache.rows, ids.shape[1]))
        if self.counted.failing(cache.rows, len(self.counted.passes)):
            raise MemoryError("no room")
        return super().run(cache, ids, *args, **kwargs)


def said(engine: Engine, cache: Cache, length: int) -> Iterator[int]:
    params = SamplingParams(max_tokens=length, ignore_eos=True)
    for (token,) in engine.decode(cache, [params], [[]]):
        assert token is not None
        yield token


def read(engine: Engine, length: int, seed: int) -> Cache:
    cache = engine.new_cache()
    engine.read(cache, tokens(length, seed=seed))
    return cache


def at_once(work: list[Callable[[], Any]]) -> list[Any]:
    """Each in a thread of its own, beginning together."""
    barrier = threading.Barrier(len(work))

    def begin(job: Callable[[], Any]) -> Any:
        barrier.wait(LIMIT)
        return job()

    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(LIMIT) for future in [pool.submit(begin, job) for job in work]]


LENGTHS = [(5, 30), (40, 12), (90, 25), (23, 1), (60, 40)]
"""Tokens read and tokens generated, for each conversation."""


def conversations(engine: Engine) -> list[Cache]:
    return [read(engine, length, seed) for seed, (length, _) in enumerate(LENGTHS)]


def alone(engine: Engine) -> tuple[list[list[int]], list[Cache]]:
    caches = conversations(engine)
    return [list(said(engine, cache, new)) for cache, (_, new) in zip(caches, LENGTHS, strict=True)], caches


def together(engine: Engine) -> tuple[list[list[int]], list[Cache]]:
    caches = conversations(engine)
    engine.passes.clear()
    jobs = [
        lambda cache=cache, new=new: list(said(engine, cache, new))
        for cache, (_, new) in zip(caches, LENGTHS, strict=True)
    ]
    return at_once(jobs), caches


@pytest.mark.parametrize("config", [SMALL, MERGING, CacheConfig.paper(24), CacheConfig.streaming(24)])
def test_threads_share_passes_and_say_what_they_say_alone(config: CacheConfig) -> None:
    engine = Counted(config)
    expected, single = alone(engine)
    answers, caches = together(engine)

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


def test_a_conversation_goes_on_alone_and_again_together_after_it_was_in_a_batch() -> None:
    engine = Counted(SMALL)
    expected, single = alone(engine)
    _, caches = together(engine)
    for turn in range(2):
        more = [tokens(7, seed=50 + turn), tokens(9, seed=60 + turn)]
        for cache, same, ids in zip(caches, single, more, strict=False):
            torch.testing.assert_close(engine.read(cache, ids), engine.read(same, ids), atol=1e-4, rtol=1e-4)
        assert at_once([lambda cache=cache: list(said(engine, cache, 9)) for cache in caches]) == [
            list(said(engine, same, 9)) for same in single
        ]
    assert expected[0]


def test_a_reader_that_pauses_holds_up_nobody_and_goes_on_where_it_was() -> None:
    engine = Counted(SMALL)
    expected, _ = alone(engine)
    first, second, third = conversations(engine)[:3]
    slow = said(engine, first, 30)
    beginning = at_once([lambda: [next(slow) for _ in range(4)], lambda: list(said(engine, second, 12))])
    assert beginning[1] == expected[1]
    assert list(said(engine, third, 25)) == expected[2]
    assert [*beginning[0], *slow] == expected[0]


def test_a_stream_that_is_closed_within_a_batch_leaves_the_others_and_its_own_cache_in_order() -> None:
    engine = Counted(SMALL)
    expected, _ = alone(engine)
    caches = conversations(engine)[:3]

    def cut() -> list[int]:
        stream = said(engine, caches[0], 30)
        some = [next(stream) for _ in range(6)]
        stream.close()
        return some

    answers = at_once([cut, *(lambda n=n: list(said(engine, caches[n], LENGTHS[n][1])) for n in (1, 2))])
    assert answers == [expected[0][:6], *expected[1:3]]
    assert caches[0].lengths[0] in (LENGTHS[0][0] + 5, LENGTHS[0][0] + 6)
    same = read(engine, *LENGTHS[0][:1], seed=0)
    done = caches[0].lengths[0] - LENGTHS[0][0]
    logits = [engine.read(same, [token]) for token in expected[0][:done]][-1]
    torch.testing.assert_close(caches[0].logits[0], logits, atol=1e-4, rtol=1e-4)


def test_a_pass_that_fails_for_several_is_tried_again_by_each_and_the_batch_is_not_trusted() -> None:
    engine = Counted(SMALL)
    caches, engine.config = conversations(engine), SMALL
    failed = []

    def once(rows: int, passes: int) -> bool:
        if rows > 1 and passes > 6 and not failed:
            failed.append(rows)
            return True
        return False

    expected, _ = alone(engine)
    engine.passes.clear()
    engine.failing = once

    def attempt(number: int) -> list[int] | str:
        try:
            return list(said(engine, caches[number], LENGTHS[number][1]))
        except MemoryError:
            return "failed"

    answers = at_once([lambda number=number: attempt(number) for number in range(5)])
    assert failed
    assert answers.count("failed") == 1  # the one whose thread made the pass
    assert all(answer in ("failed", right) for answer, right in zip(answers, expected, strict=True))


def test_caches_of_other_settings_decode_beside_a_batch() -> None:
    engine = Counted(SMALL)
    other = [engine.new_cache(CacheConfig.full()), engine.new_cache(CacheConfig.streaming(24))]
    for cache in other:
        engine.read(cache, tokens(40, seed=9))
    expected = [list(said(engine, cache.clone(), 20)) for cache in other]
    few, _ = alone(engine)
    caches = conversations(engine)
    jobs = [lambda cache=cache: list(said(engine, cache, 20)) for cache in other]
    jobs += [lambda n=n: list(said(engine, caches[n], LENGTHS[n][1])) for n in range(3)]
    assert at_once(jobs) == [*expected, *few[:3]]
