"""What all layers look at is kept by all of them, with what stands around it."""

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
    own = cache.layers[layer]
    return {int(at) for at in own.position[0, head][own.multiplicity[0, head] > 0]}


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), st.integers(0, 10))
def test_a_passage_is_worth_the_mean_vote_of_its_tokens(votes: list[float], reach: int) -> None:
    found = equations.smooth_votes(torch.tensor(votes), 2 * reach + 1)
    for at, worth in enumerate(found.tolist()):
        around = votes[max(0, at - reach) : at + reach + 1]
        assert worth == pytest.approx(sum(around) / len(around), abs=1e-5)


def paid(engine: Engine, ids: list[int]) -> list[torch.Tensor]:
    """What the question pays to ids in each layer, among ids alone: [H, G, m, T]."""
    cache = engine.new_cache(CacheConfig(slots=200, observation_window=len(QUESTION)))
    engine.read(cache, [*ids, *QUESTION])
    found = []
    for layer in cache.layers:
        heads, scaling = layer.spec.kv_heads, layer.spec.scaling
        assert scaling is not None
        queries = layer.queries[0].view(heads, -1, *layer.queries.shape[2:])
        bias = torch.zeros(len(ids))
        found.append(equations.attention_weights(queries[None], layer.keys[:, :, : len(ids)], bias, scaling)[0])
    return found


def test_half_of_the_context_goes_to_the_passages_that_all_layers_vote_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a count by hand, in the first compression of all."""
    monkeypatch.setattr(passes, "PASSAGE_TOKENS", 5)
    ids = tokens(60)
    cache = engine.new_cache()
    engine.read(cache, ids, probe=QUESTION)

    attention_paid = paid(engine, ids)
    votes = sum(layer.amax((1, 2)).sum(0) for layer in attention_paid)
    assert isinstance(votes, torch.Tensor)
    votes[:2] = 0
    votes[54:] = 0
    around = [votes[max(0, at - 2) : at + 3].mean().item() for at in range(60)]
    anyway = {0, 1, *range(54, 60)}
    chosen = anyway | set(sorted(set(range(60)) - anyway, key=lambda at: (-around[at], at))[:11])
    for at, layer in enumerate(cache.layers):
        for head in range(layer.spec.kv_heads):
            mean = attention_paid[at][head].mean((0, 1))
            own = torch.nn.functional.max_pool1d(mean[None], 3, stride=1, padding=1)[0]
            rest = sorted(set(range(60)) - chosen, key=lambda token: (-float(own[token]), token))
            assert positions(cache, at, head) == chosen | set(rest[:11])


def test_all_of_it_may_go_to_passages_and_then_every_head_keeps_the_same(engine: Engine) -> None:
    cache = engine.new_cache(CONFIG.replace(passage_share=1.0))
    for start in range(0, 180, 60):
        engine.read(cache, tokens(180)[start : start + 60], probe=QUESTION)
    held = [positions(cache, at, head) for at, layer in enumerate(cache.layers) for head in range(layer.spec.kv_heads)]
    assert all(each == held[0] for each in held)
    assert len(held[0]) == 30


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt_oss-sinks"])
@pytest.mark.parametrize("chunk", [5, 16, 64])
def test_every_token_is_counted_however_a_text_is_cut(family: str, chunk: int) -> None:
    reader = Engine(tiny_model(family), CONFIG, chunk=chunk)
    cache = reader.new_cache()
    reader.read(cache, tokens(150), probe=QUESTION)
    for layer in cache.layers:
        assert (layer.multiplicity.sum(-1) + layer.dropped == 150).all()
        assert max(layer.num_filled) < layer.capacity


def test_a_short_turn_of_a_chat_asks_each_layer_alone() -> None:
    """Passages for its question would cost what was said before; a long text with its question still gets them."""
    held = []
    for passages in (0.0, 1.0):
        reader = Engine(tiny_model("qwen2"), CONFIG.replace(passage_share=passages))
        cache = reader.new_cache()
        reader.read(cache, tokens(60)[:25], multi_turn=True)
        reader.read(cache, tokens(60)[25:50], probe=QUESTION, multi_turn=True)
        short = [positions(cache, at, 0) for at in range(len(cache.layers))]
        reader.read(cache, tokens(90), probe=QUESTION, multi_turn=True)
        held.append((short, [positions(cache, at, 0) for at in range(len(cache.layers))]))
    assert held[0][0] == held[1][0]
    assert held[0][1] != held[1][1]


def test_a_layer_of_more_slots_has_more_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of three slots has room for one token besides sink and newest: the one that the other votes for."""
    monkeypatch.setattr(passes, "PASSAGE_TOKENS", 1)
    ids, shares = tokens(60), [(1.9, 0.1), (0.1, 1.9)]
    config = CONFIG.replace(slots=24, recent=1, sink=1, passage_share=1.0)
    for large, uneven in enumerate(shares):
        reader = Engine(tiny_model("qwen2"), config.replace(layer_budgets=uneven))
        cache = reader.new_cache()
        reader.read(cache, ids, probe=QUESTION)
        votes = paid(reader, ids)[large].amax((1, 2)).sum(0)
        wanted = 1 + int(votes[1:59].argmax())
        assert positions(cache, 1 - large, 0) == {0, wanted, 59}


def test_a_first_prompt_that_does_not_fit_is_shared_out_among_the_layers() -> None:
    llm = make_llm()
    long = [{"role": "user", "content": "tell me " * 200 + "what?"}]
    short = [{"role": "user", "content": "hello"}]
    for name, messages in (("long", long), ("short", short)):
        llm.chat(messages, session=name, sampling=SHORT)
        assert (llm.session(name).cache.config.layer_budgets is None) == (name == "short")


def test_prompts_of_a_batch_keep_their_own_budgets() -> None:
    """Short ones, of which there are more than one step takes, and one that has to be compressed."""
    llm = make_llm()
    prompts = [f"hello {number}" for number in range(9)] + ["tell me " * 200 + "what?"]
    alone = [llm.complete(prompt, sampling=SHORT) for prompt in prompts]
    together = llm.batch_complete(prompts, sampling=SHORT)
    assert [each.text for each in together] == [each.text for each in alone]
    assert [each.usage.dropped_tokens for each in together[:9]] == [0] * 9
    assert together[9].usage.dropped_tokens > 0
