"""`passage_share`: all layers vote for passages, and every head keeps those with the most votes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chat import SHORT, make_llm
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm.attention import passes
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.cache import Cache

CONFIG = CacheConfig(slots=30, sink=2, recent=6, stage=6, observation_window=4, pool_kernel=3, passage_share=0.5)
QUESTION = [7, 8, 9]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model("qwen2"), CONFIG)


def positions(cache: Cache, layer: int, head: int) -> set[int]:
    slots = cache.layers[layer]
    return set(slots.position[0, head][slots.multiplicity[0, head] > 0].tolist())


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.integers(0, 10))
def test_a_passage_has_the_mean_vote_of_its_tokens(votes: list[float], radius: int) -> None:
    smoothed = equations.smooth_votes(torch.tensor(votes), 2 * radius + 1)
    for index, vote in enumerate(smoothed.tolist()):
        passage = votes[max(0, index - radius) : index + radius + 1]
        assert vote == pytest.approx(sum(passage) / len(passage), abs=1e-5)


def question_attention(engine: Engine, ids: list[int]) -> list[torch.Tensor]:
    """Return for each layer, as [H, G, m, T], the attention of `QUESTION`'s m tokens to ids, normalised over ids."""
    cache = engine.new_cache(CacheConfig(slots=200, observation_window=len(QUESTION)))
    engine.read(cache, [*ids, *QUESTION])
    attention = []
    for layer in cache.layers:
        heads, scaling = layer.spec.kv_heads, layer.spec.scaling
        assert scaling is not None
        queries = layer.queries[0].view(heads, -1, *layer.queries.shape[2:])
        bias = torch.zeros(len(ids))
        attention.append(equations.attention_weights(queries[None], layer.keys[:, :, : len(ids)], bias, scaling)[0])
    return attention


def test_half_of_the_context_goes_to_the_passages_that_all_layers_vote_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with votes counted here, at the first compression."""
    monkeypatch.setattr(passes, "PASSAGE_TOKENS", 5)
    ids = tokens(60)
    cache = engine.new_cache()
    engine.read(cache, ids, probe=QUESTION)

    attention = question_attention(engine, ids)
    votes = sum(layer.amax((1, 2)).sum(0) for layer in attention)
    assert isinstance(votes, torch.Tensor)
    votes[:2] = 0
    votes[54:] = 0
    smoothed = [votes[max(0, at - 2) : at + 3].mean().item() for at in range(60)]
    protected = {0, 1, *range(54, 60)}
    passages = protected | set(sorted(set(range(60)) - protected, key=lambda at: (-smoothed[at], at))[:11])
    for index, layer in enumerate(cache.layers):
        for head in range(layer.spec.kv_heads):
            mean = attention[index][head].mean((0, 1))
            pooled = torch.nn.functional.max_pool1d(mean[None], 3, stride=1, padding=1)[0]
            rest = sorted(set(range(60)) - passages, key=lambda token: (-float(pooled[token]), token))
            assert positions(cache, index, head) == passages | set(rest[:11])


def test_with_a_passage_share_of_one_every_head_keeps_the_same_positions(engine: Engine) -> None:
    cache = engine.new_cache(CONFIG.replace(passage_share=1.0))
    for start in range(0, 180, 60):
        engine.read(cache, tokens(180)[start : start + 60], probe=QUESTION)
    kept = [
        positions(cache, index, head) for index, layer in enumerate(cache.layers) for head in range(layer.spec.kv_heads)
    ]
    assert all(each == kept[0] for each in kept)
    assert len(kept[0]) == 30


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt_oss-sinks"])
@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_every_token_is_accounted_for_with_any_chunk_size(family: str, chunk: int) -> None:
    reader = Engine(tiny_model(family), CONFIG, chunk=chunk)
    cache = reader.new_cache()
    reader.read(cache, tokens(150), probe=QUESTION)
    for layer in cache.layers:
        assert (layer.multiplicity.sum(-1) + layer.dropped == 150).all()
        assert max(layer.num_filled) < layer.capacity


def test_short_turns_of_a_chat_are_ranked_by_each_layer_on_its_own() -> None:
    """Passages for its question would evict earlier turns; a long turn with its question still gets passages."""
    kept = []
    for share in (0.0, 1.0):
        reader = Engine(tiny_model("qwen2"), CONFIG.replace(passage_share=share))
        cache = reader.new_cache()
        reader.read(cache, tokens(60)[:25], multi_turn=True)
        reader.read(cache, tokens(60)[25:50], probe=QUESTION, multi_turn=True)
        after_short = [positions(cache, index, 0) for index in range(len(cache.layers))]
        reader.read(cache, tokens(90), probe=QUESTION, multi_turn=True)
        kept.append((after_short, [positions(cache, index, 0) for index in range(len(cache.layers))]))
    assert kept[0][0] == kept[1][0]
    assert kept[0][1] != kept[1][1]


def test_a_layer_of_more_slots_has_more_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of three slots has room for one token besides sink and newest: the one that the other layer votes for."""
    monkeypatch.setattr(passes, "PASSAGE_TOKENS", 1)
    ids, budgets = tokens(60), [(1.9, 0.1), (0.1, 1.9)]
    config = CONFIG.replace(slots=24, recent=1, sink=1, passage_share=1.0)
    for large, uneven in enumerate(budgets):
        reader = Engine(tiny_model("qwen2"), config.replace(layer_budgets=uneven))
        cache = reader.new_cache()
        reader.read(cache, ids, probe=QUESTION)
        votes = question_attention(reader, ids)[large].amax((1, 2)).sum(0)
        expected = 1 + int(votes[1:59].argmax())
        assert positions(cache, 1 - large, 0) == {0, expected, 59}


def test_a_first_prompt_that_does_not_fit_gets_layer_budgets() -> None:
    llm = make_llm()
    long = [{"role": "user", "content": "tell me " * 200 + "what?"}]
    short = [{"role": "user", "content": "hello"}]
    for name, messages in (("long", long), ("short", short)):
        llm.chat(messages, session=name, sampling=SHORT)
        assert (llm.session(name).cache.config.layer_budgets is None) == (name == "short")


def test_prompts_of_a_batch_have_budgets_of_their_own() -> None:
    """Short ones, more than fit into one decode batch, and one that is compressed."""
    llm = make_llm()
    prompts = [f"hello {number}" for number in range(9)] + ["tell me " * 200 + "what?"]
    expected = [llm.complete(prompt, sampling=SHORT) for prompt in prompts]
    results = llm.batch_complete(prompts, sampling=SHORT)
    assert [each.text for each in results] == [each.text for each in expected]
    assert [each.usage.dropped_tokens for each in results[:9]] == [0] * 9
    assert results[9].usage.dropped_tokens > 0
