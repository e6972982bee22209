"""A model without weights has the shapes, the cache and the bytes of the loaded one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from tests.support.tiny_models import COMMON, FAMILIES, tiny_model, tokens
from zsmerge_llm import CacheConfig
from zsmerge_llm.cpu.quantized_linear import quantize_model
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.models.footprint import meta_model, weight_nbytes
from zsmerge_llm.planning.shape import shape_of

CONFIGS = [
    CacheConfig(slots=100),
    CacheConfig(slots=200, stage=16, policy="recency"),
    CacheConfig.paper(64),
    CacheConfig.h2o(64),
]


def held(model: torch.nn.Module) -> int:
    """Bytes of a model's weights and buffers, each counted once."""
    return sum({id(each): each.nbytes for each in (*model.parameters(), *model.buffers())}.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_every_family_are_found_without_weights(family: str) -> None:
    model = tiny_model(family)
    planned = shape_of(meta_model(model.config, torch.float32))
    engine = Engine(model, compile=False)
    assert [replace(spec, device=torch.device("cpu")) for spec in planned.specs] == list(engine.specs)
    assert planned.vocab == engine.vocab_size


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss-sinks", "falcon-mqa"])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.policy}-{config.slots}")
def test_the_planned_cache_is_that_of_the_engine_to_the_byte(family: str, config: CacheConfig) -> None:
    model = tiny_model(family)
    planned = shape_of(meta_model(model.config, torch.float32)).conversation_nbytes(config)
    engine = Engine(model, config, compile=False)
    cache = engine.new_cache()
    empty = cache.nbytes
    engine.read(cache, tokens(300))
    assert cache.logits is not None
    assert planned == empty + cache.logits.nbytes == cache.nbytes


def test_the_exact_cache_counts_as_full_to_the_context_window() -> None:
    model = tiny_model()
    model.config.max_position_embeddings = 600
    engine = Engine(model, CacheConfig.full(), compile=False)
    cache = engine.new_cache()
    for _ in range(2):
        engine.read(cache, tokens(300))
    assert shape_of(meta_model(model.config, torch.float32)).conversation_nbytes(CacheConfig.full()) == cache.nbytes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_planned_weights_are_those_of_the_model_to_the_byte(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    assert sum(weight_nbytes(meta_model(model.config, dtype), dtype).values()) == held(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_planned_packed_weights_are_those_of_the_quantized_model_to_the_byte(family: str, bits: int) -> None:
    model = tiny_model(family)
    planned = weight_nbytes(meta_model(model.config, torch.float32), torch.float32, f"int{bits}")
    quantize_model(model, bits, torch.float32)
    assert sum(planned.values()) == held(model)


def test_tied_weights_count_once() -> None:
    config = AutoConfig.for_model("llama", **COMMON, tie_word_embeddings=True)
    untied = AutoConfig.for_model("llama", **COMMON, tie_word_embeddings=False)
    sizes = [sum(weight_nbytes(meta_model(each, torch.float32), torch.float32).values()) for each in (untied, config)]
    assert sizes[0] - sizes[1] == 97 * 32 * 4


def test_bitsandbytes_keeps_embeddings_and_output_layer() -> None:
    model = meta_model(AutoConfig.for_model("llama", **COMMON), torch.bfloat16)
    linear = sum(layer.weight.numel() for layer in model.model.layers.modules() if isinstance(layer, torch.nn.Linear))
    assert weight_nbytes(model, torch.bfloat16, "nf4")["nf4"] == linear // 2 + 4 * linear // 64
    assert weight_nbytes(model, torch.bfloat16, "int8", packed=False)["bfloat16"] >= 2 * 97 * 32 * 2


def test_a_model_whose_code_needs_data_is_described_by_its_config() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    settings = {**COMMON, "original_max_position_embeddings": 512, "rope_parameters": rope}
    shape = shape_of(meta_model(AutoConfig.for_model("phi3", **settings), torch.float32))
    assert [(spec.kv_heads, spec.key_dim) for spec in shape.specs] == [(2, 8)] * 2


def test_rope_that_follows_the_length_does_not_matter() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    config = AutoConfig.for_model("llama", **COMMON, rope_parameters=rope)
    assert len(shape_of(meta_model(config, torch.float32)).specs) == 2
    assert config.rope_parameters["rope_type"] == "dynamic"
