"""The reserve: a share of the context slots for what nobody has asked yet, kept by a general probe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.talk import SHORT, TIGHT, talker
from tests.tiny import tiny_model, tokens
from zsmerge_llm import policy
from zsmerge_llm.cache import Cache
from zsmerge_llm.config import AHEAD_FLOOR, CacheConfig
from zsmerge_llm.engine import Engine
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.layer import LayerCache

CONFIG = CacheConfig(passages=0.0, slots=30, sink=2, recent=6, stage=6, window=4, pool=3, reserve=0.5, latest=0.0)
GENERAL, QUESTION = tokens(5, seed=7), tokens(4, seed=8)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model("qwen2"), CONFIG, chunk=60, general=lambda: GENERAL)


@pytest.fixture(scope="module")
def blunt() -> Engine:
    return Engine(tiny_model("qwen2"), CONFIG, chunk=60)


def paid(engine: Engine, ids: list[int], probe: list[int], first: int) -> list[torch.Tensor]:
    """[H, T] for each layer: the mean attention of the probe's tokens from `first` on, among `ids` alone."""
    cache = engine.new_cache(CacheConfig(slots=200, window=len(probe) - first))
    engine.read(cache, [*ids, *probe])
    found = []
    for layer in cache.layers:
        keys, queries = layer.keys[:, :, : len(ids)], layer.queries
        grouped = queries.view(1, keys.shape[1], -1, *queries.shape[2:])
        assert layer.spec.scaling is not None
        weights = policy.weights(grouped, keys, torch.zeros(len(ids)), layer.spec.scaling)
        found.append(weights.mean((2, 3))[0])
    return found


def positions(layer: LayerCache, head: int) -> set[int]:
    return {int(at) for at in layer.position[0, head][layer.count[0, head] > 0]}


def test_half_of_the_context_goes_by_the_question_and_half_by_the_general_probe(engine: Engine) -> None:
    """Against a ranking by hand, in the first compression of all."""
    ids = tokens(60)
    cache = engine.new_cache()
    engine.read(cache, ids, probe=QUESTION, reserving=True)
    exact = engine.new_cache(CacheConfig(slots=200))
    engine.read(exact, ids)
    asked = paid(engine, ids, [*GENERAL, *QUESTION], len(GENERAL))
    guessed = paid(engine, ids, GENERAL, 0)
    for at, layer in enumerate(cache.layers):
        for head in range(layer.spec.kv_heads):
            kept = set(range(2)) | set(range(54, 60))
            phrase = torch.nn.functional.max_pool1d(asked[at][head][None], 3, stride=1, padding=1)[0]
            sizes = exact.layers[at].values[0, head, :60].norm(dim=-1)
            others = (guessed[at][head] + AHEAD_FLOOR) * sizes
            for worth, share in ((phrase, 11), (others, 11)):
                best = sorted(set(range(60)) - kept, key=lambda token: (-float(worth[token]), token))
                kept |= set(best[:share])
            assert positions(layer, head) == kept


def test_without_a_reserve_the_general_probe_changes_nothing(engine: Engine, blunt: Engine) -> None:
    config = CONFIG.replace(reserve=0.0)
    caches = [each.new_cache(config) for each in (engine, blunt)]
    for each, cache in zip((engine, blunt), caches, strict=True):
        each.read(cache, tokens(60), probe=QUESTION, reserving=True)
        each.make_room(cache)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(caches[0].layers, caches[1].layers, strict=True))


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt_oss-sinks"])
def test_room_is_made_by_the_general_probe_which_leaves_no_trace(family: str) -> None:
    engines = [Engine(tiny_model(family), CONFIG, general=general) for general in (lambda: GENERAL, None)]
    kept = []
    for each in engines:
        cache = each.new_cache()
        each.read(cache, tokens(33))
        logits = cache.logits.clone()
        each.make_room(cache)
        assert cache.seen == 33
        assert torch.equal(cache.logits, logits)
        assert cache.fits(5)
        for layer in cache.layers:
            assert (layer.position < 33).all()
            assert (layer.count.sum(-1) + layer.dropped == 33).all()
        kept.append([layer.position.clone() for layer in cache.layers])
    assert any(not torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_a_text_with_its_question_is_kept_for_the_question_alone(engine: Engine) -> None:
    """As without any reserve, until room is made for what comes later."""
    config = CONFIG.replace(reserve=0.0)
    alone, plain = engine.new_cache(), engine.new_cache(config)
    for cache in (alone, plain):
        engine.read(cache, tokens(61), probe=QUESTION)
        engine.read(cache, tokens(4, seed=5))
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(alone.layers, plain.layers, strict=True))
    for cache in (alone, plain):
        engine.make_room(cache)
    assert any(not torch.equal(a.position, b.position) for a, b in zip(alone.layers, plain.layers, strict=True))


def test_where_there_is_room_the_general_probe_does_not_look(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(29))
    before = cache.clone()
    engine.make_room(cache)
    assert all(torch.equal(a.guess, b.guess) for a, b in zip(cache.layers, before.layers, strict=True))
    assert not any(layer.guess.any() for layer in cache.layers)


def test_a_slot_keeps_the_best_the_general_probe_ever_paid_it(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(60), probe=QUESTION, reserving=True)
    best = {(at, head, int(p)): float(g) for at, layer in enumerate(cache.layers) for head in range(layer.spec.kv_heads)
            for p, g in zip(layer.position[0, head, :30], layer.guess[0, head, :30], strict=True)}  # fmt: skip
    engine.read(cache, tokens(40, seed=3), probe=QUESTION, reserving=True)
    for at, layer in enumerate(cache.layers):
        for head in range(layer.spec.kv_heads):
            for p, g in zip(layer.position[0, head, :30], layer.guess[0, head, :30], strict=True):
                assert float(g) >= best.get((at, head, int(p)), 0.0)


def test_a_cache_with_a_reserve_is_restored_bit_for_bit(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(60), probe=QUESTION, reserving=True)
    tensors, facts = cache.state()
    restored = Cache.from_state({name: tensor.clone() for name, tensor in tensors.items()}, facts)
    for each in (cache, restored):
        engine.read(each, tokens(20, seed=2), probe=QUESTION, reserving=True)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, restored.layers, strict=True))


def test_conversations_with_a_reserve_go_on_and_are_saved(tmp_path: Path) -> None:
    llm = talker(cache=TIGHT.replace(reserve=0.5))
    said = [{"role": "user", "content": "Tell me about the sea, at length. " * 20}]
    first = llm.chat(said, session="ann", sampling=SHORT)
    assert first.usage.merged_tokens > 0
    said += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And about the land? " * 20}]
    assert llm.chat(said, session="ann", sampling=SHORT).usage.cached_tokens > 0
    assert any(layer.guess.any() for layer in llm.session("ann").cache.layers), "the general probe looked"
    llm.session("ann").save(tmp_path / "ann.zsmerge")
    loaded = talker(cache=TIGHT.replace(reserve=0.5)).load_session(tmp_path / "ann.zsmerge")
    for mine, theirs in zip(loaded.cache.layers, llm.session("ann").cache.layers, strict=True):
        assert torch.equal(mine.guess, theirs.guess)


def test_plain_completion_needs_no_chat_template_for_its_reserve() -> None:
    llm = talker(cache=TIGHT.replace(reserve=0.5))
    llm.tokenizer.chat_template = None
    result = llm.complete("Tell me about the sea, at length. " * 20, sampling=SHORT)
    assert result.usage.merged_tokens > 0


@pytest.mark.parametrize("reserve", [-0.1, 1.1, float("nan"), "half"])
def test_a_reserve_that_is_no_share_is_refused(reserve: object) -> None:
    with pytest.raises(ConfigError, match="reserve"):
        CacheConfig(reserve=reserve)


def test_documents_read_ahead_have_no_question_to_reserve_from() -> None:
    assert CONFIG.ahead().reserve == 0
