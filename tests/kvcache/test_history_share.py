"""`history_share`: the part of the context slots that is ranked by the attention of all turns, not of the question."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.chat import SHORT, SMALL_CACHE, make_llm
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm.config import QUERY_AGNOSTIC_FLOOR, CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.cache_state import cache_state, restore_cache
from zsmerge_llm.kvcache.layer_cache import LayerCache

CONFIG = CacheConfig(
    passage_share=0.0,
    slots=30,
    sink=2,
    recent=6,
    stage=6,
    observation_window=4,
    pool_kernel=3,
    history_share=0.5,
    recent_share=0.0,
)
QUESTION = tokens(4, seed=8)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model("qwen2"), CONFIG, chunk=60)


def attention_mass(engine: Engine, ids: list[int], newest: int) -> list[torch.Tensor]:
    """Return for each layer, as [H, T], the mean causal attention of the `newest` tokens of `ids` to all of `ids`."""
    cache = engine.new_cache(CacheConfig(slots=200, observation_window=newest))
    engine.read(cache, ids)
    masses = []
    for layer in cache.layers:
        keys, queries = layer.keys[:, :, : len(ids)], layer.queries
        grouped = queries.view(1, keys.shape[1], -1, *queries.shape[2:])
        assert layer.spec.scaling is not None
        hidden = torch.full((newest, len(ids)), float("-inf")).triu(len(ids) - newest + 1)
        weights = equations.attention_weights(grouped, keys, hidden, layer.spec.scaling)
        masses.append(weights.mean((2, 3))[0])
    return masses


def positions(layer: LayerCache, head: int) -> set[int]:
    return set(layer.position[0, head][layer.multiplicity[0, head] > 0].tolist())


def test_half_of_the_context_is_ranked_by_the_question_and_half_by_the_cumulative_attention(engine: Engine) -> None:
    """Compared with a ranking computed here, at the first compression."""
    ids = tokens(60)
    cache = engine.new_cache()
    engine.read(cache, ids, probe=QUESTION, multi_turn=True)
    exact = engine.new_cache(CacheConfig(slots=200))
    engine.read(exact, ids)
    by_question = [each[:, :60] for each in attention_mass(engine, [*ids, *QUESTION], len(QUESTION))]
    by_window = attention_mass(engine, ids, CONFIG.observation_window)
    for index, layer in enumerate(cache.layers):
        for head in range(layer.spec.kv_heads):
            kept = set(range(2)) | set(range(54, 60))
            pooled = torch.nn.functional.max_pool1d(by_question[index][head][None], 3, stride=1, padding=1)[0]
            norms = exact.layers[index].values[0, head, :60].norm(dim=-1)
            weighted = (by_window[index][head] + QUERY_AGNOSTIC_FLOOR) * norms
            for score in (pooled, weighted):
                ranked = sorted(set(range(60)) - kept, key=lambda token: (-float(score[token]), token))
                kept |= set(ranked[:11])
            assert positions(layer, head) == kept


def test_without_a_history_share_no_attention_is_accumulated(engine: Engine) -> None:
    cache = engine.new_cache(CONFIG.replace(history_share=0.0))
    engine.read(cache, tokens(61), probe=QUESTION, multi_turn=True)
    cache.compress_stage()
    assert not any(layer.cumulative_attention.any() for layer in cache.layers)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt_oss-sinks"])
def test_compressing_between_two_turns_keeps_logits_and_accounts_for_every_token(family: str) -> None:
    engine = Engine(tiny_model(family), CONFIG)
    cache = engine.new_cache()
    engine.read(cache, tokens(33))
    logits = cache.logits.clone()
    cache.compress_stage()
    assert cache.seen == 33
    assert torch.equal(cache.logits, logits)
    assert cache.fits(5)
    for layer in cache.layers:
        assert (layer.position < 33).all()
        assert (layer.multiplicity.sum(-1) + layer.dropped == 33).all()


def test_a_prompt_with_its_question_is_ranked_by_the_question_only(engine: Engine) -> None:
    """As without a history share, until the stage is compressed for later turns."""
    config = CONFIG.replace(history_share=0.0)
    cache_with, cache_without = engine.new_cache(), engine.new_cache(config)
    for cache in (cache_with, cache_without):
        engine.read(cache, tokens(61), probe=QUESTION)
        engine.read(cache, tokens(4, seed=5))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache_with.layers, cache_without.layers, strict=True))
    for cache in (cache_with, cache_without):
        cache.compress_stage()
    assert any(
        not torch.equal(a.position, b.position) for a, b in zip(cache_with.layers, cache_without.layers, strict=True)
    )


def test_compressing_a_cache_with_room_changes_nothing(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(29))
    before = cache.clone()
    cache.compress_stage()
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.cumulative_attention, old.cumulative_attention)
        assert not layer.dropped.any()
        assert not layer.multi_turn.any()


def test_the_attention_of_every_turn_is_accumulated(engine: Engine) -> None:
    """Also that of turns at which nothing is evicted."""
    cache = engine.new_cache(CONFIG.replace(slots=60, stage=60))
    before = [torch.zeros_like(layer.cumulative_attention) for layer in cache.layers]
    for turn in range(3):
        engine.read(cache, tokens(30, seed=turn), multi_turn=True)
        for layer, old in zip(cache.layers, before, strict=True):
            filled = 30 * turn
            assert bool((layer.cumulative_attention[:, :, : filled + 30] > old[:, :, : filled + 30]).all())
            # each query's attention sums to one, and so does the mean over queries
            assert torch.allclose((layer.cumulative_attention - old).sum(-1), torch.ones(()), atol=1e-4)
        before = [layer.cumulative_attention.clone() for layer in cache.layers]


def test_compressing_after_a_turn_does_not_accumulate_its_attention_twice(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(33), multi_turn=True)
    before = cache.clone()
    cache.compress_stage()
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert layer.dropped.any()
        for head in range(layer.spec.kv_heads):
            kept = layer.position[0, head, : CONFIG.slots].long()
            assert torch.equal(
                layer.cumulative_attention[0, head, : CONFIG.slots], old.cumulative_attention[0, head, kept]
            )


def test_a_long_turn_keeps_the_slot_of_the_highest_cumulative_attention(engine: Engine) -> None:
    """Though the turn's own question attends to other tokens."""
    cache = engine.new_cache(CONFIG.replace(history_share=1.0))
    engine.read(cache, tokens(28), multi_turn=True)
    scores = [layer.cumulative_attention * layer.values.norm(dim=-1) for layer in cache.layers]
    engine.read(cache, tokens(50, seed=3), probe=QUESTION, multi_turn=True)
    for layer, score in zip(cache.layers, scores, strict=True):
        for head in range(layer.spec.kv_heads):
            assert int(score[0, head, 2:22].argmax()) + 2 in positions(layer, head)


def test_a_cache_with_a_history_share_is_restored_bit_for_bit(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(60), probe=QUESTION, multi_turn=True)
    tensors, metadata = cache_state(cache)
    restored = restore_cache({name: tensor.clone() for name, tensor in tensors.items()}, metadata)
    for reader in (cache, restored):
        engine.read(reader, tokens(20, seed=2), probe=QUESTION, multi_turn=True)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, restored.layers, strict=True))


def test_sessions_with_a_history_share_continue_and_are_saved(tmp_path: Path) -> None:
    llm = make_llm(cache=SMALL_CACHE.replace(history_share=0.5))
    messages = [{"role": "user", "content": "Tell me about the sea, at length. " * 20}]
    first = llm.chat(messages, session="ann", sampling=SHORT)
    assert first.usage.dropped_tokens > 0
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And about the land? " * 20}]
    assert llm.chat(messages, session="ann", sampling=SHORT).usage.cached_tokens > 0
    assert any(layer.cumulative_attention.any() for layer in llm.session("ann").cache.layers)
    llm.session("ann").save(tmp_path / "ann.zsmerge")
    loaded = make_llm(cache=SMALL_CACHE.replace(history_share=0.5)).load_session(tmp_path / "ann.zsmerge")
    for restored, original in zip(loaded.cache.layers, llm.session("ann").cache.layers, strict=True):
        assert torch.equal(restored.cumulative_attention, original.cumulative_attention)


def test_completion_with_a_history_share_needs_no_chat_template() -> None:
    llm = make_llm(cache=SMALL_CACHE.replace(history_share=0.5))
    llm.tokenizer.chat_template = None
    result = llm.complete("Tell me about the sea, at length. " * 20, sampling=SHORT)
    assert result.usage.dropped_tokens > 0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "half"])
def test_a_history_share_outside_zero_to_one_is_refused(share: object) -> None:
    with pytest.raises(ConfigError, match="history_share"):
        CacheConfig(history_share=share)


def test_query_agnostic_configurations_have_no_history_share() -> None:
    assert CONFIG.query_agnostic().history_share == 0
