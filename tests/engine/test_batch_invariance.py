"""An answer is the same, bit for bit, whether its conversation decodes alone or beside others."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import pytest
import torch

from tests.support.cpu_kernels import load_kernels
from tests.support.static_backend import StaticBackend
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import CacheConfig, SamplingParams, SchedulingConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.model_runner import ModelRunner
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.grammar import Constraint

CONFIG = CacheConfig(slots=24, sink=2, recent=4, stage=8)
LENGTHS = [5, 40, 90, 23, 60]
LIMIT = 60


class ForcingConstraint:
    """Allow everything, and force three to nine tokens after every fourth."""

    ended = done = shortened = False
    complete = True

    def __init__(self) -> None:
        self._count = 0

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def accept(self, token: int) -> int:
        self._count += 1
        return token

    def forced(self) -> list[int]:
        return [] if self._count % 4 else list(range(3 + self._count // 4 % 7))


def answer(engine: Engine, index: int, ready: Callable[[], Any]) -> tuple[list[int | None], Cache]:
    """Return what a conversation is told, and its cache: drafts in every second answer, forced tokens in the others."""
    cache = engine.new_cache()
    engine.read(cache, tokens(LENGTHS[index], seed=index) * 2)
    constraint: Constraint | None = None if index % 2 else ForcingConstraint()
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    ready()
    decoded = engine.decode(cache, [params], [tokens(LENGTHS[index], seed=index)], constraints=[constraint])
    return list(itertools.chain.from_iterable(decoded)), cache


def assert_same_alone_and_together(engine: Engine) -> None:
    alone = [answer(engine, index, lambda: None) for index in range(len(LENGTHS))]
    barrier = Barrier(len(LENGTHS))
    with ThreadPoolExecutor(len(LENGTHS)) as pool:
        started = [pool.submit(answer, engine, index, partial(barrier.wait, LIMIT)) for index in range(len(LENGTHS))]
        together = [each.result(LIMIT) for each in started]
    for (expected, own), (told, shared) in zip(alone, together, strict=True):
        assert told == expected
        assert own.logits is not None
        assert shared.logits is not None
        assert torch.equal(own.logits, shared.logits)
        for layer, other in zip(own.layers, shared.layers, strict=True):
            assert layer.num_filled == other.num_filled
            used = layer.num_filled[0]
            assert torch.equal(layer.keys[:, :, :used], other.keys[:, :, :used])
            assert torch.equal(layer.score[:, :, :used], other.score[:, :, :used])


@pytest.fixture
def shared_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the rows of each pass."""
    rows: list[int] = []
    run = ModelRunner.run

    def recording(self: ModelRunner, cache: Cache, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(cache.rows)
        return run(self, cache, *args, **kwargs)

    monkeypatch.setattr(ModelRunner, "run", recording)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_kernels_every_answer_and_cache_is_the_same_beside_others(
    dtype: torch.dtype, shared_rows: list[int]
) -> None:
    engine = Engine(tiny_model().to(dtype), CONFIG, compile=False)
    load_kernels(engine)
    assert engine.backend.batch_invariant

    assert_same_alone_and_together(engine)
    assert max(shared_rows) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_kernels_an_answer_is_the_same_on_fewer_threads(dtype: torch.dtype) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            engine = Engine(tiny_model().to(dtype), CONFIG, compile=False)
            load_kernels(engine, prefill=True)
            found.append(answer(engine, 2, lambda: None))
    finally:
        torch.set_num_threads(before)
    (expected, own), (told, other) = found
    assert told == expected
    assert own.logits is not None
    assert other.logits is not None
    assert torch.equal(own.logits, other.logits)


def test_without_kernels_rows_take_turns_where_answers_must_not_depend_on_others(shared_rows: list[int]) -> None:
    engine = Engine(tiny_model().bfloat16(), CONFIG, compile=False, scheduling=SchedulingConfig(batch_invariant=True))
    assert not engine.backend.batch_invariant

    assert_same_alone_and_together(engine)
    assert set(shared_rows) == {1}


def test_steps_in_fixed_memory_have_one_shape_where_answers_must_not_depend_on_others() -> None:
    model = tiny_model().bfloat16()
    engine = Engine(model, CONFIG, backend=StaticBackend(), scheduling=SchedulingConfig(batch_invariant=True))

    assert_same_alone_and_together(engine)


def test_experts_are_not_taken_for_matrices_of_the_kernels() -> None:
    engine = Engine(tiny_model("gpt_oss-sinks"), CONFIG, compile=False)
    load_kernels(engine)

    assert not engine.backend.batch_invariant
