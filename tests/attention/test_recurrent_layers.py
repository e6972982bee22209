"""Models with recurrent layers: their states are read, copied, saved and rolled back beside the slots."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.support.tiny_models import HYBRIDS, tiny_model, tokens
from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import InputError, UnsupportedModelError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.cache_state import cache_state, restore_cache

ROOMY = CacheConfig(slots=128, recent=8, stage=4)
TIGHT = CacheConfig(slots=24, recent=6, residual=3, stage=4)
families = pytest.mark.parametrize("family", HYBRIDS)


def assert_equal_caches(left: Cache, right: Cache) -> None:
    ours, facts = cache_state(left)
    theirs, other_facts = cache_state(right)
    assert facts == other_facts
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def reference_logits(family: str, ids: list[int], prompt: int) -> Tensor:
    """Return the logits after ids[:prompt] and after each later token, [n, vocab], by transformers without a cache."""
    with torch.inference_mode():
        return tiny_model(family)(torch.tensor([ids]), use_cache=False).logits[0, prompt - 1 :]


@pytest.mark.parametrize("family", sorted(set(HYBRIDS) - {"bamba"}))  # whose own cache is wrong in transformers 5.24
def test_the_reference_equals_transformers_own_cache(family: str) -> None:
    ids, model = tokens(60), tiny_model(family)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        parts = [ids[:50], *([each] for each in ids[50:])]
        logits = torch.stack([model(torch.tensor([part]), past_key_values=cache).logits[0, -1] for part in parts])
    torch.testing.assert_close(logits, reference_logits(family, ids, 50), atol=1e-4, rtol=1e-4)


@families
@pytest.mark.parametrize("chunk", [50, 7, 1])
def test_logits_equal_those_of_transformers_while_everything_fits(family: str, chunk: int) -> None:
    ids = tokens(60)
    expected = reference_logits(family, ids, 50)
    for config in (ROOMY, CacheConfig.full()):
        engine = Engine(tiny_model(family), config, chunk=chunk)
        cache = engine.new_cache()
        found = [engine.read(cache, ids[:50]), *(engine.read(cache, [each]) for each in ids[50:])]
        torch.testing.assert_close(torch.stack(found), expected, atol=3e-4, rtol=3e-4)  # delta nets: sums of 64 steps


@families
def test_memory_stays_flat_far_beyond_the_budget(family: str) -> None:
    engine = Engine(tiny_model(family), TIGHT, chunk=16)
    cache = engine.new_cache()
    engine.read(cache, tokens(40))
    nbytes = cache.nbytes
    for part in range(6):
        engine.read(cache, tokens(50, seed=part), probe=tokens(5))
        assert cache.nbytes == nbytes
    assert torch.isfinite(cache.logits).all()
    assert sum(state.nbytes for state in cache.states) > 0
    for layer in cache.layers:
        assert (layer.multiplicity.sum(-1) + layer.dropped == 340).all()


@families
def test_a_padded_batch_equals_its_rows_alone(family: str) -> None:
    engine = Engine(tiny_model(family), TIGHT, chunk=16)
    prompts = [tokens(37, seed=1), tokens(9, seed=2), tokens(23, seed=3)]
    batch = engine.new_cache(rows=3)
    together = engine.read_batch(batch, prompts)
    sampling = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True) for count in (4, 9, 6)]
    answers = list(zip(*engine.decode(batch, sampling, prompts), strict=True))
    for row, prompt in enumerate(prompts):
        alone = engine.new_cache()
        torch.testing.assert_close(together[row], engine.read(alone, prompt), atol=1e-4, rtol=1e-4)
        answer = [token for (token,) in engine.decode(alone, [sampling[row]], [prompt])]
        assert [token for token in answers[row] if token is not None] == answer


@families
def test_a_probe_leaves_no_trace_in_a_state(family: str) -> None:
    engine = Engine(tiny_model(family), TIGHT, chunk=64)
    asked, plain = engine.new_cache(), engine.new_cache()
    for cache in (asked, plain):
        engine.read(cache, tokens(24))
    before = [state.clone() for state in asked.states]
    engine.query_attention(asked, tokens(7, seed=4))
    for state, old in zip(asked.states, before, strict=True):
        assert all(torch.equal(tensor, old.tensors[name]) for name, tensor in state.tensors.items())

    engine.read(asked, tokens(12, seed=5), probe=tokens(7, seed=4))
    engine.read(plain, tokens(12, seed=5))
    first, other = asked.states[0].tensors, plain.states[0].tensors  # only what was read before it decides
    assert all(torch.allclose(tensor, other[name], atol=1e-4) for name, tensor in first.items())


@families
def test_a_rejected_draft_is_rolled_back(family: str) -> None:
    engine = Engine(tiny_model(family), ROOMY)
    drafted, plain = engine.new_cache(), engine.new_cache()
    for cache in (drafted, plain):
        engine.read(cache, tokens(30))
    step, logits = engine.runner.speculate(drafted, tokens(4, seed=6))
    engine.runner.keep(drafted, step, logits, 2)
    engine.read(plain, tokens(4, seed=6)[:2])

    assert drafted.lengths == plain.lengths
    after = tokens(3, seed=7)
    torch.testing.assert_close(engine.read(drafted, after), engine.read(plain, after), atol=1e-4, rtol=1e-4)


@families
def test_copies_are_independent_and_a_saved_cache_goes_on_bit_for_bit(family: str) -> None:
    engine = Engine(tiny_model(family), TIGHT, chunk=16)
    cache = engine.new_cache()
    engine.read(cache, tokens(70))
    branch = cache.clone()
    untouched = cache.clone()
    tensors, facts = cache_state(cache)
    saved = restore_cache({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(facts)))

    engine.read(branch, tokens(9, seed=1))

    assert_equal_caches(cache, untouched)
    assert_equal_caches(saved, untouched)
    assert torch.equal(engine.read(saved, tokens(9, seed=1)), branch.logits[0].float())
    assert_equal_caches(saved, branch)


@families
def test_an_exception_within_a_layer_leaves_the_model_usable(family: str) -> None:
    engine = Engine(tiny_model(family), ROOMY)
    other = Engine(engine.model, TIGHT)  # a second engine on the same model
    ids = tokens(20)
    with pytest.raises(InputError, match="belongs to a zsmerge-llm engine"), torch.inference_mode():
        engine.model(torch.tensor([ids]))
    expected = reference_logits(family, ids, 20)[0]
    torch.testing.assert_close(engine.read(engine.new_cache(), ids), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.read(other.new_cache(), ids), expected, atol=1e-4, rtol=1e-4)
    engine.close()
    other.close()
    with torch.inference_mode():
        assert torch.equal(engine.model(torch.tensor([ids])).logits[0, -1], expected)


def test_a_model_without_any_attention_is_refused_by_name() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=2, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match="No layer of MambaForCausalLM attends"):
        Engine(AutoModelForCausalLM.from_config(config))
