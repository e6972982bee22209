"""A user's own eviction policy ranks the slots; the cache does everything else."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import CacheConfig, Engine, SamplingParams
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.kvcache.cache_state import cache_state, restore_cache
from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.policies import BUILT_IN, EvictionPolicy, RankingContext
from zsmerge_llm.kvcache.slots import AttentionInputs

SINK, RECENT, SLOTS = 2, 4, 16


class SmallKeys(EvictionPolicy):
    """Keep the keys of the smallest norm (Knorm, arXiv 2406.11430)."""

    name = "small-keys"

    def rank(self, view: KVView, context: RankingContext) -> Tensor:
        return -view.keys.float().norm(dim=-1)


class PassRecorder(SmallKeys):
    """Record the number of tokens of each pass that it observes, per layer."""

    def __init__(self) -> None:
        self.passes: list[int] = []

    def observe(self, view: KVView, inputs: AttentionInputs) -> None:
        self.passes.append(inputs.keys.shape[2])


def config(policy: object, **settings: int) -> CacheConfig:
    return CacheConfig(slots=SLOTS, sink=SINK, recent=RECENT, stage=4, policy=policy, **settings)


def test_what_a_policy_ranks_lowest_is_evicted_and_sinks_and_recent_tokens_never_are() -> None:
    engine, ids = Engine(tiny_model(), config(SmallKeys()), compile=False), tokens(20)
    cache, exact = engine.new_cache(), engine.new_cache(CacheConfig.full())
    engine.read(cache, ids)
    engine.read(exact, ids)
    for layer, full in zip(cache.layers, exact.layers, strict=True):
        norms = full.keys[0, :, : len(ids)].norm(dim=-1)
        for head in range(layer.spec.kv_heads):
            protected = {*range(SINK), *range(len(ids) - RECENT, len(ids))}
            ranked = sorted(set(range(len(ids))) - protected, key=lambda at: float(norms[head, at]))
            kept = layer.position[0, head][layer.multiplicity[0, head] > 0].tolist()
            assert set(kept) == protected | set(ranked[: SLOTS - len(protected)])


@pytest.mark.parametrize("residual", [0, 3])
def test_rows_of_a_batch_with_a_custom_policy_equal_single_rows(residual: int) -> None:
    engine = Engine(tiny_model(), config(SmallKeys(), residual=residual), chunk=8, compile=False)
    rows = [tokens(length, seed=length) for length in (7, 30, 41)]
    batch = engine.new_cache(rows=3)
    logits = engine.read_batch(batch, rows)
    for row, expected in zip(rows, logits, strict=True):
        torch.testing.assert_close(engine.read(engine.new_cache(), row), expected, atol=1e-4, rtol=1e-4)
    assert all((layer.multiplicity.sum(-1) + layer.dropped).T.tolist() for layer in batch.layers)


@pytest.mark.parametrize("compile", [False, True])
def test_a_policy_observes_every_pass_and_every_decode_step(compile: bool) -> None:
    policy = PassRecorder()
    engine = Engine(tiny_model(), config(policy), chunk=8, compile=compile)
    policy.passes.clear()
    generated = list(engine.stream(engine.new_cache(), tokens(20), SamplingParams(max_tokens=5, ignore_eos=True)))
    layers = len(engine.specs)
    assert len(generated) == 5
    assert policy.passes == [num_tokens for num_tokens in (8, 8, 4, 1, 1, 1, 1) for _ in range(layers)]


def test_a_cache_with_a_policy_object_is_saved_by_name_and_restored_with_the_object() -> None:
    policy = SmallKeys()
    engine = Engine(tiny_model(), config(policy), compile=False)
    cache = engine.new_cache()
    engine.read(cache, tokens(40))
    tensors, metadata = cache_state(cache.clone())
    metadata = json.loads(json.dumps(metadata))
    assert metadata["config"]["policy"] == "small-keys"
    restored = restore_cache(dict(tensors), metadata, policy)
    assert restored.config == cache.config
    assert torch.equal(engine.read(restored, tokens(9)), engine.read(cache, tokens(9)))
    with pytest.raises(ConfigError, match="small-keys"):
        restore_cache(dict(tensors), metadata)


def test_built_in_policies_are_found_by_name() -> None:
    assert set(BUILT_IN) == {"observation_window", "cumulative_attention", "recency"}
    assert all(CacheConfig(policy=name).policy_name == name for name in BUILT_IN)
