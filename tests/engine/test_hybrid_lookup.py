"""Drafts of prompt lookup for models with recurrent layers, in fixed memory: what is rejected leaves no trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch

from tests.engine.test_prompt_lookup import PARAMS, Oracle
from tests.engine.test_static_decoding import assert_equal_caches, eager_engine, static_engine
from tests.support.presets import SMALL_PRESETS
from tests.support.tiny_models import HYBRIDS, tokens
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.static_decoder import StaticDecoder
from zsmerge_llm.kvcache.cache import Cache

QUICK = ["qwen3_next", "lfm2", "falcon_h1", "jamba"]
SLOW = sorted(set(HYBRIDS) - set(QUICK))


def answer(engine: Engine, config: CacheConfig, lookup: bool) -> tuple[list[int], Cache]:
    """Return an answer to 40 tokens, and the cache after all of it has been read."""
    cache, prompt = engine.new_cache(config), tokens(40)
    said = list(engine.stream(cache, prompt, PARAMS.replace(lookup=lookup)))
    engine.read(cache, [*prompt, *said][cache.seen :])
    return said, cache


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each row had in each step of a static batch."""
    taken: list[int] = []
    step = StaticDecoder.step

    def recording(self: StaticDecoder, ids: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        taken.extend(map(len, ids.values()))
        return step(self, ids)

    monkeypatch.setattr(StaticDecoder, "step", recording)
    return taken


@pytest.mark.parametrize("preset", ["default", "full"])
@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_drafts_that_are_kept_or_rolled_back_change_no_answer_and_no_state_of_a_hybrid(
    family: str, preset: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**SMALL_PRESETS, "full": CacheConfig.full()}[preset]
    plain, expected = answer(eager_engine(config, family), config, lookup=False)
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))
    steps.clear()

    said, cache = answer(static_engine(config, family), config, lookup=True)

    assert said == plain
    assert_equal_caches(cache, expected)
    assert max(steps) == 5  # a token and a draft of four
    assert len(steps) < len(plain) * 0.75


def test_a_draft_of_a_hybrid_is_closed_with_its_stream(steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config, prompt = SMALL_PRESETS["default"], tokens(40)
    one, other = eager_engine(config, "lfm2"), static_engine(config, "lfm2")
    plain = list(one.stream(one.new_cache(), prompt, PARAMS.replace(lookup=False)))
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))
    for taken in (2, 3, 8):
        cache, expected = other.new_cache(), one.new_cache()
        stream = other.stream(cache, prompt, PARAMS)
        yielded = [next(stream) for _ in range(taken)]
        stream.close()
        assert yielded == plain[:taken]
        one.read(expected, [*prompt, *plain][: cache.seen])
        for state, same in zip(cache.states, expected.states, strict=True):
            for name, tensor in state.tensors.items():
                torch.testing.assert_close(tensor, same.tensors[name], atol=1e-4, rtol=1e-4)
    assert max(steps) == 5


def test_a_draft_is_dropped_where_another_conversation_took_a_row_meanwhile(
    steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, prompt = SMALL_PRESETS["default"], tokens(40)
    plain, _ = answer(eager_engine(config, "lfm2"), config, lookup=False)
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))
    engine = static_engine(config, "lfm2")
    monkeypatch.setattr(type(engine._static_scheduler), "fits", lambda self, group: True)
    monkeypatch.setattr(StaticDecoder, "takes_draft", property(lambda self: False))
    cache = engine.new_cache()

    assert list(engine.stream(cache, prompt, PARAMS)) == plain
    assert max(steps) == 1
