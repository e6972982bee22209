"""A gate scores the slots of a document by what they hold, whatever their positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import CacheConfig, Engine
from zsmerge_llm.kvcache.cache_state import cache_state, restore_cache
from zsmerge_llm.kvcache.gate import Gate, features, num_features
from zsmerge_llm.kvcache.rope import Rotation

SINK, RECENT, SLOTS = 2, 4, 16
CONFIG = CacheConfig(slots=SLOTS, sink=SINK, recent=RECENT, stage=4).query_agnostic()
FREQUENCIES = torch.tensor([1.0, 0.3, 0.01], dtype=torch.float64)


def gate(weight: Tensor, pairs: Tensor) -> Gate:
    return Gate(weight, torch.zeros(len(weight)), pairs)


def gated(engine: Engine, like: str) -> Engine:
    """Give every layer a gate for which the first dimension of a value decides."""
    none = torch.empty(2, 0, dtype=torch.int64)
    weight = torch.zeros(engine.specs[0].kv_heads, num_features(engine.specs[0].value_dim, 0))
    weight[:, 0] = {"large": 100.0, "small": -100.0}[like]
    engine.specs = tuple(replace(spec, gate=gate(weight, none)) for spec in engine.specs)
    return engine


@given(position=st.integers(0, 100_000), start=st.sampled_from([0, 2]), interleaved=st.booleans(), seed=st.integers(0))
def test_what_a_gate_sees_of_a_key_does_not_depend_on_its_position(
    position: int, start: int, interleaved: bool, seed: int
) -> None:
    torch.manual_seed(seed % 2**32)
    rotation = Rotation(FREQUENCIES, start, interleaved)
    keys, values = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 4)
    pairs = torch.stack(rotation.pairs(torch.arange(8)))
    moved = rotation.rotate(keys, torch.full((1, 2, 5), position))
    seen = features(keys, values, pairs)
    assert seen.shape == (1, 2, 5, num_features(4, 3))
    torch.testing.assert_close(features(moved, values, pairs), seen, atol=1e-4, rtol=1e-4)


def test_a_gate_predicts_no_more_attention_than_there_is() -> None:
    predicted = gate(torch.full((2, num_features(4, 0)), 9.0), torch.empty(2, 0, dtype=torch.int64)).attention(
        torch.zeros(1, 2, 3, 8), torch.ones(1, 2, 3, 4)
    )
    assert predicted.tolist() == torch.ones(1, 2, 3).tolist()


@pytest.mark.parametrize("like", ["large", "small"])
def test_a_document_keeps_the_slots_that_the_gate_scores_highest(like: str) -> None:
    engine, ids = gated(Engine(tiny_model(layers=1), CONFIG, chunk=8, compile=False), like), tokens(40)
    cache, exact = engine.new_cache(), engine.new_cache(CacheConfig.full())
    engine.read(cache, ids)
    engine.read(exact, ids)
    values, layer = exact.layers[0].values[0, :, : len(ids)], cache.layers[0]
    predicted = engine.specs[0].gate.attention(exact.layers[0].keys[:, :, : len(ids)], values[None])[0]
    scores = (predicted + CONFIG.score_floor) * values.norm(dim=-1)
    for head in range(layer.spec.kv_heads):
        ranked = scores[head, SINK : len(ids) - RECENT].argsort(descending=True) + SINK
        kept = set(layer.position[0, head, : layer.num_filled[0]].tolist())
        assert kept >= {*range(SINK), *range(len(ids) - RECENT, len(ids)), *ranked[:4].tolist()}


@pytest.mark.parametrize("settings", [{}, {"score_floor": 0.02}])
def test_a_prompt_with_its_question_is_not_ranked_by_the_gate(settings: dict[str, float]) -> None:
    model, ids = tiny_model(), tokens(60)
    config = CacheConfig(slots=SLOTS, sink=SINK, recent=RECENT, stage=4, **settings)
    plain = Engine(model, config, chunk=8, compile=False)
    before = plain.new_cache()
    plain.read(before, ids, probe=ids[:3])
    after = gated(plain, "large").new_cache()
    plain.read(after, ids, probe=ids[:3])
    for own, other in zip(before.layers, after.layers, strict=True):
        assert torch.equal(own.position, other.position)


def test_a_cache_is_saved_without_its_gate_and_restored_with_the_models() -> None:
    engine = gated(Engine(tiny_model(), CONFIG, compile=False), "large")
    cache = engine.new_cache()
    engine.read(cache, tokens(40))
    tensors, facts = cache_state(cache)
    assert "gate" not in facts["specs"][0]
    assert restore_cache(dict(tensors), facts, specs=engine.specs).layers[0].spec.gate is engine.specs[0].gate
    assert restore_cache(dict(tensors), facts).layers[0].spec.gate is None
