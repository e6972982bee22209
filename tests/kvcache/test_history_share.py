"""The reserve: a share of the context slots for what a conversation has looked at so far, whatever is asked now."""

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
from zsmerge_llm.kvcache.cache import Cache
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


def paid(engine: Engine, ids: list[int], newest: int) -> list[torch.Tensor]:
    """[H, T] for each layer: the mean attention of the `newest` tokens of `ids`, each to what stands before it."""
    cache = engine.new_cache(CacheConfig(slots=200, observation_window=newest))
    engine.read(cache, ids)
    found = []
    for layer in cache.layers:
        keys, queries = layer.keys[:, :, : len(ids)], layer.queries
        grouped = queries.view(1, keys.shape[1], -1, *queries.shape[2:])
        assert layer.spec.scaling is not None
        hidden = torch.full((newest, len(ids)), float("-inf")).triu(len(ids) - newest + 1)
        weights = equations.attention_weights(grouped, keys, hidden, layer.spec.scaling)
        found.append(weights.mean((2, 3))[0])
    return found


def positions(layer: LayerCache, head: int) -> set[int]:
    return {int(at) for at in layer.position[0, head][layer.multiplicity[0, head] > 0]}


def test_half_of_the_context_goes_by_the_question_and_half_by_what_the_conversation_looked_at(engine: Engine) -> None:
    """Against a ranking by hand, in the first compression of all."""
    ids = tokens(60)
    cache = engine.new_cache()
    engine.read(cache, ids, probe=QUESTION, multi_turn=True)
    exact = engine.new_cache(CacheConfig(slots=200))
    engine.read(exact, ids)
    asked = [each[:, :60] for each in paid(engine, [*ids, *QUESTION], len(QUESTION))]
    looked = paid(engine, ids, CONFIG.observation_window)
    for at, layer in enumerate(cache.layers):
        for head in range(layer.spec.kv_heads):
            kept = set(range(2)) | set(range(54, 60))
            phrase = torch.nn.functional.max_pool1d(asked[at][head][None], 3, stride=1, padding=1)[0]
            sizes = exact.layers[at].values[0, head, :60].norm(dim=-1)
            others = (looked[at][head] + QUERY_AGNOSTIC_FLOOR) * sizes
            for worth, share in ((phrase, 11), (others, 11)):
                best = sorted(set(range(60)) - kept, key=lambda token: (-float(worth[token]), token))
                kept |= set(best[:share])
            assert positions(layer, head) == kept


def test_without_a_reserve_nothing_is_accumulated(engine: Engine) -> None:
    cache = engine.new_cache(CONFIG.replace(history_share=0.0))
    engine.read(cache, tokens(61), probe=QUESTION, multi_turn=True)
    cache.compress_stage()
    assert not any(layer.cumulative_attention.any() for layer in cache.layers)


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt_oss-sinks"])
def test_making_room_between_two_turns_leaves_no_trace_but_the_room(family: str) -> None:
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


def test_a_text_with_its_question_is_kept_for_the_question_alone(engine: Engine) -> None:
    """As without any reserve, until room is made for what comes later."""
    config = CONFIG.replace(history_share=0.0)
    alone, plain = engine.new_cache(), engine.new_cache(config)
    for cache in (alone, plain):
        engine.read(cache, tokens(61), probe=QUESTION)
        engine.read(cache, tokens(4, seed=5))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(alone.layers, plain.layers, strict=True))
    for cache in (alone, plain):
        cache.compress_stage()
    assert any(not torch.equal(a.position, b.position) for a, b in zip(alone.layers, plain.layers, strict=True))


def test_where_there_is_room_none_is_made(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(29))
    before = cache.clone()
    cache.compress_stage()
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.cumulative_attention, old.cumulative_attention)
        assert not layer.dropped.any()
        assert not layer.multi_turn.any()


def test_what_a_slot_is_paid_adds_up_with_each_turn(engine: Engine) -> None:
    """Turns that fit count as well: of a chat, what was looked at all along is kept."""
    cache = engine.new_cache(CONFIG.replace(slots=60, stage=60))
    before = [torch.zeros_like(layer.cumulative_attention) for layer in cache.layers]
    for turn in range(3):
        engine.read(cache, tokens(30, seed=turn), multi_turn=True)
        for layer, old in zip(cache.layers, before, strict=True):
            used = 30 * turn
            assert bool((layer.cumulative_attention[:, :, : used + 30] > old[:, :, : used + 30]).all())
            # The mean of queries whose attention sums up to one.
            assert torch.allclose((layer.cumulative_attention - old).sum(-1), torch.ones(()), atol=1e-4)
        before = [layer.cumulative_attention.clone() for layer in cache.layers]


def test_making_room_behind_a_turn_does_not_count_its_tokens_twice(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(33), multi_turn=True)
    before = cache.clone()
    cache.compress_stage()
    for layer, old in zip(cache.layers, before.layers, strict=True):
        assert layer.dropped.any()
        for head in range(layer.spec.kv_heads):
            stayed = layer.position[0, head, : CONFIG.slots].long()
            assert torch.equal(
                layer.cumulative_attention[0, head, : CONFIG.slots], old.cumulative_attention[0, head, stayed]
            )


def test_a_long_turn_does_not_make_the_conversation_forget_what_it_looked_at(engine: Engine) -> None:
    """What was paid most before a long turn is held after it, though the turn's own question looks elsewhere."""
    cache = engine.new_cache(CONFIG.replace(history_share=1.0))
    engine.read(cache, tokens(28), multi_turn=True)
    best = [layer.cumulative_attention * layer.values.norm(dim=-1) for layer in cache.layers]
    engine.read(cache, tokens(50, seed=3), probe=QUESTION, multi_turn=True)
    for layer, worth in zip(cache.layers, best, strict=True):
        for head in range(layer.spec.kv_heads):
            assert int(worth[0, head, 2:22].argmax()) + 2 in positions(layer, head)


def test_a_cache_with_a_reserve_is_restored_bit_for_bit(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(60), probe=QUESTION, multi_turn=True)
    tensors, facts = cache.state()
    restored = Cache.from_state({name: tensor.clone() for name, tensor in tensors.items()}, facts)
    for each in (cache, restored):
        engine.read(each, tokens(20, seed=2), probe=QUESTION, multi_turn=True)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, restored.layers, strict=True))


def test_conversations_with_a_reserve_go_on_and_are_saved(tmp_path: Path) -> None:
    llm = make_llm(cache=SMALL_CACHE.replace(history_share=0.5))
    said = [{"role": "user", "content": "Tell me about the sea, at length. " * 20}]
    first = llm.chat(said, session="ann", sampling=SHORT)
    assert first.usage.dropped_tokens > 0
    said += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And about the land? " * 20}]
    assert llm.chat(said, session="ann", sampling=SHORT).usage.cached_tokens > 0
    assert any(layer.cumulative_attention.any() for layer in llm.session("ann").cache.layers)
    llm.session("ann").save(tmp_path / "ann.zsmerge")
    loaded = make_llm(cache=SMALL_CACHE.replace(history_share=0.5)).load_session(tmp_path / "ann.zsmerge")
    for mine, theirs in zip(loaded.cache.layers, llm.session("ann").cache.layers, strict=True):
        assert torch.equal(mine.cumulative_attention, theirs.cumulative_attention)


def test_plain_completion_needs_no_chat_template_for_its_reserve() -> None:
    llm = make_llm(cache=SMALL_CACHE.replace(history_share=0.5))
    llm.tokenizer.chat_template = None
    result = llm.complete("Tell me about the sea, at length. " * 20, sampling=SHORT)
    assert result.usage.dropped_tokens > 0


@pytest.mark.parametrize("reserve", [-0.1, 1.1, float("nan"), "half"])
def test_a_reserve_that_is_no_share_is_refused(reserve: object) -> None:
    with pytest.raises(ConfigError, match="history_share"):
        CacheConfig(history_share=reserve)


def test_documents_read_ahead_have_no_question_to_reserve_from() -> None:
    assert CONFIG.query_agnostic().history_share == 0
