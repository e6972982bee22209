"""Models whose positions end, or change, at their window: an exact cache says so, others go on if they can."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.tiny_models import COMMON, VOCAB, tokens
from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ContextLimitError

WINDOW = 96
COMPRESSED = CacheConfig(slots=32, recent=8, stage=4)


def model_of(model_type: str, **settings: object) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.25)
    return model


def gpt2() -> PreTrainedModel:
    return model_of("gpt2", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=WINDOW)


def longrope() -> PreTrainedModel:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rotary = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": WINDOW, **factors}
    own = {"original_max_position_embeddings": WINDOW, "rope_parameters": rotary, "sliding_window": None}
    return model_of("phi3", **{**COMMON, **own})


def dynamic_ntk() -> PreTrainedModel:
    rotary = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return model_of("llama", **{**COMMON, "max_position_embeddings": WINDOW, "rope_parameters": rotary})


@pytest.mark.parametrize("make", [gpt2, longrope, dynamic_ntk])
def test_an_exact_cache_reads_to_the_end_of_the_window_and_no_further(make: object) -> None:
    model = make()  # type: ignore[operator]
    ids = tokens(WINDOW)
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0, -1].float()
    engine = Engine(model, CacheConfig.full(), chunk=40, compile=False)
    cache = engine.new_cache()

    torch.testing.assert_close(engine.read(cache, ids), expected, atol=1e-4, rtol=1e-4)
    before = cache.nbytes
    with pytest.raises(ContextLimitError, match=f"no further than {WINDOW}"):
        engine.read(cache, [5])
    assert (cache.seen, cache.nbytes) == (WINDOW, before)


@pytest.mark.parametrize("make", [gpt2, longrope])
def test_an_answer_ends_with_an_error_where_the_window_ends(make: object) -> None:
    engine = Engine(make(), CacheConfig.full(), compile=False)  # type: ignore[operator]
    cache = engine.new_cache()
    prompt = tokens(WINDOW - 5)
    engine.read(cache, prompt)
    decoding = engine.decode(cache, [SamplingParams(max_tokens=20, ignore_eos=True)], [prompt])
    with pytest.raises(ContextLimitError):
        list(decoding)
    assert cache.seen == WINDOW


@pytest.mark.parametrize("make", [longrope, dynamic_ntk])
def test_a_compressed_cache_goes_on_by_the_frequencies_within_the_window(make: object) -> None:
    engine = Engine(make(), COMPRESSED, chunk=16, compile=False)  # type: ignore[operator]
    cache = engine.new_cache()
    logits = engine.read(cache, tokens(4 * WINDOW))
    assert torch.isfinite(logits).all()
    assert engine.context_window == WINDOW
    assert cache.position_maps[0].offset > 0


def test_learned_positions_end_in_a_compressed_cache_too() -> None:
    engine = Engine(gpt2(), COMPRESSED, chunk=16, compile=False)
    with pytest.raises(ContextLimitError, match="no rotary positions"):
        engine.read(engine.new_cache(), tokens(2 * WINDOW))
