"""Every number format gives what transformers gives with the same weights, on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.models.loader import load

pytestmark = pytest.mark.slow
PROMPT = "The capital of France is"
ON_CPU = {"": "cpu"}
INT8 = {"load_in_8bit": True}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def _own_cache() -> None:
    """Use the machine's cache folder, with the real model: it is neither fetched nor converted for each test."""


def folder() -> Path:
    source = load("smollm2").source
    assert source is not None
    return source


def reference(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> PreTrainedModel:
    """SmolLM2 as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder(), dtype=dtype, local_files_only=True, **settings)


def greedy(model: PreTrainedModel, ids: list[int], count: int) -> list[int]:
    found = model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return found[0, len(ids) :].tolist()


def logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1].float()


@pytest.mark.parametrize(
    ("settings", "theirs", "tolerance"),
    [
        ({"dtype": "float32"}, {"dtype": torch.float32}, 1e-3),
        ({"dtype": "bfloat16"}, {"dtype": torch.bfloat16}, 0.5),
        ({"dtype": "float16"}, {"dtype": torch.float16}, 0.1),
        ({"dtype": "float32", "device_map": ON_CPU}, {"dtype": torch.float32, "device_map": ON_CPU}, 1e-3),
        (
            {"quantization": "nf4", "dtype": "bfloat16"},
            {"quantization_config": BitsAndBytesConfig(**NF4), "device_map": ON_CPU},
            0.5,
        ),
        (
            {"quantization": "int8", "dtype": "bfloat16", "device_map": ON_CPU},
            {"quantization_config": BitsAndBytesConfig(**INT8), "device_map": ON_CPU},
            0.5,
        ),
    ],
    ids=["float32", "bfloat16", "float16", "float32-device_map", "nf4", "int8-bitsandbytes"],
)
def test_a_number_format_has_the_logits_and_the_answer_of_transformers(
    settings: dict[str, Any], theirs: dict[str, Any], tolerance: float
) -> None:
    llm, model = LLM("smollm2", compile=False, cache=CacheConfig(slots=256), **settings), reference(**theirs)
    ids = llm.tokenizer.encode(PROMPT)
    count = 2 if "quantization" in settings else 8  # bitsandbytes takes seconds a pass on some processors
    for _ in range(2):  # a second time, behind everything that the first request set in motion
        cache = llm.engine.new_cache()
        torch.testing.assert_close(llm.engine.read(cache, ids), logits(model, ids), atol=tolerance, rtol=0)
        result = llm.complete(PROMPT, sampling=SamplingParams(max_tokens=count, ignore_eos=True))
        assert result.text == llm.tokenizer.decode(greedy(model, ids, count))
    assert "Paris" in result.text


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_have_the_logits_of_their_dequantized_matrices(bits: int, tmp_path: Path) -> None:
    """transformers' own model, with each linear layer's weight replaced by what the packed layer multiplies with.

    Of the first two layers: an int4 matrix is dequantized by multiplying it with all unit vectors.
    """
    model = reference(torch.float32, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    llm = LLM(tmp_path, tokenizer=folder(), quantization=f"int{bits}", dtype="float32", compile=False)
    ids = llm.tokenizer.encode(PROMPT)
    packed = dict(llm.engine.model.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(packed[name], "dequantized_weight"):
                module.weight = torch.nn.Parameter(packed[name].dequantized_weight())
        embedding = packed[name_of_embedding(llm.engine.model)]
        rows = embedding(torch.arange(embedding.num_embeddings))
        model.get_input_embeddings().weight = torch.nn.Parameter(rows)
    given = llm.engine.read(llm.engine.new_cache(), ids)
    torch.testing.assert_close(given, logits(model, ids), atol=0.05, rtol=0)


def name_of_embedding(model: PreTrainedModel) -> str:
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())


@pytest.mark.parametrize("settings", [NF4, INT8], ids=["nf4", "int8"])
def test_a_quantized_model_object_answers_as_transformers_and_its_owner_as_before(settings: dict[str, Any]) -> None:
    model = reference(quantization_config=BitsAndBytesConfig(**settings), device_map=ON_CPU)
    tokenizer = load("smollm2").tokenizer
    ids = tokenizer.encode(PROMPT)
    before = greedy(model, ids, 3)
    with LLM(model, tokenizer=tokenizer, compile=True) as llm:
        result = llm.complete(PROMPT, sampling=SamplingParams(max_tokens=3, ignore_eos=True))
        assert result.text == tokenizer.decode(before)
    assert greedy(model, ids, 3) == before


def test_a_lora_adapter_on_a_real_model_has_the_logits_and_the_answer_of_transformers() -> None:
    """Compiled, and with an adapter that changes the logits by far more than the tolerance."""
    torch.manual_seed(0)
    base = reference(torch.float32)
    tokenizer = load("smollm2").tokenizer
    ids = tokenizer.encode(PROMPT)
    plain = logits(base, ids)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    expected, answer = logits(model.get_base_model(), ids), greedy(model.get_base_model(), ids, 8)
    assert (expected - plain).abs().max() > 1
    with LLM(model, tokenizer=tokenizer, compile=True) as llm:
        assert llm.engine.backend.disabled_reason is None
        given = llm.engine.read(llm.engine.new_cache(), ids)
        torch.testing.assert_close(given, expected, atol=1e-2, rtol=0)
        result = llm.complete(PROMPT, sampling=SamplingParams(max_tokens=8, ignore_eos=True))
        assert result.text == tokenizer.decode(answer)
    assert greedy(model.get_base_model(), ids, 8) == answer
