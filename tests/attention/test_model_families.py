"""As long as everything fits the budget, logits equal those of transformers, for every supported family."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.tiny_models import FAMILIES, tiny_model, tokens
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import InputError, UnsupportedModelError

PRESETS = {
    "default": CacheConfig(slots=64, recent=8, stage=4),
    "paper": CacheConfig.paper(64),
    "h2o": CacheConfig.h2o(64),
    "streaming": CacheConfig.streaming(64),
    "full": CacheConfig.full(),
}


def reference_logprobs(family: str, ids: list[int]) -> Tensor:
    """Return log p(ids[t] | ids[:t]) by transformers alone as float32 [T], 0 for the first."""
    with torch.inference_mode():
        logits = tiny_model(family)(torch.tensor([ids])).logits[0].float()
    picked = logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    return torch.cat([torch.zeros(1), picked])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_while_everything_fits(family: str) -> None:
    ids = tokens(60)
    expected = reference_logprobs(family, ids)
    for name, config in PRESETS.items():
        for chunk in (60, 7, 1) if name == "default" else (13,):
            engine = Engine(tiny_model(family), config, chunk=chunk)
            logprobs = engine.logprobs(engine.new_cache(), ids)
            torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_far_beyond_the_budget_every_family_reads_in_constant_memory(family: str) -> None:
    config = CacheConfig(slots=24, recent=6, residual=3, stage=4)
    engine = Engine(tiny_model(family), config, chunk=16)
    cache = engine.new_cache()
    engine.read(cache, tokens(40))
    nbytes = cache.nbytes
    for part in range(6):
        engine.read(cache, tokens(50, seed=part))
        assert cache.nbytes == nbytes
    assert torch.isfinite(cache.logits).all()
    assert cache.seen == 340
    for layer in cache.layers:
        accounted = layer.multiplicity.sum(-1) + layer.dropped
        assert (accounted == 340).all()


def test_a_sliding_window_layer_stays_exact_far_beyond_the_budget() -> None:
    """Every layer has a window of 8 tokens, so 16 slots hold all that it attends to."""
    ids = tokens(300)
    engine = Engine(tiny_model("mistral-sliding"), CacheConfig(slots=16, recent=4, stage=2), chunk=37)
    logprobs = engine.logprobs(engine.new_cache(), ids)
    torch.testing.assert_close(logprobs, reference_logprobs("mistral-sliding", ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gpt_neox_japanese", {"num_attention_heads": 4, "hidden_size": 32, "num_hidden_layers": 2}, "interface"),
        ("bloom", {"n_head": 4, "hidden_size": 32, "n_layer": 2}, "ALiBi"),
        ("falcon", {"alibi": True, "num_attention_heads": 4, "hidden_size": 32}, "ALiBi"),
    ],
)
def test_unsupported_architectures_are_refused_with_the_reason(
    model_type: str, settings: dict[str, object], reason: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, vocab_size=97, pad_token_id=0, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(UnsupportedModelError, match=reason):
        Engine(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_calling_the_model_directly_raises_and_names_a_remedy_that_helps(family: str) -> None:
    model, untouched, ids = tiny_model(family), tiny_model(family), torch.tensor([tokens(12)])
    own_attention = model.config._attn_implementation
    engine = Engine(model)
    remedy = r"close\(\) of the LLM" if family.startswith("falcon") else "set_attn_implementation"
    with pytest.raises(InputError, match=remedy), torch.inference_mode():
        model(ids)
    if family.startswith("falcon"):
        return

    model.set_attn_implementation(own_attention)

    with torch.inference_mode():
        assert torch.equal(model(ids).logits, untouched(ids).logits)
    with pytest.raises(InputError, match='"zsmerge"'):
        engine.read(engine.new_cache(), tokens(4))
    model.set_attn_implementation("zsmerge")
    engine.read(engine.new_cache(), tokens(4))
