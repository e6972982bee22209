"""GGUF files of Qwen3.5 and Gemma 4: hybrids, layers of several shapes, mixtures, and their vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.tiny_folders import load_tiny, logits
from tests.support.gguf_writer import EXPERTS, GEMMA4_VOCABULARY, random_model, write_gguf
from zsmerge_llm.errors import CorruptModelError, UnsupportedModelError
from zsmerge_llm.models import gguf

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
QWEN35 = {
    **{"num_hidden_layers": 4, "layer_types": [*["linear_attention"] * 3, "full_attention"], "head_dim": 32},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2], "mrope_interleaved": True},
}
GEMMA4 = {
    **{"num_hidden_layers": 6, "head_dim": 16, "global_head_dim": 32, "sliding_window": 8, "rms_norm_eps": 1e-6},
    **{"vocab_size": len(GEMMA4_VOCABULARY), "tie_word_embeddings": True, "hidden_size_per_layer_input": 0},
    **{"layer_types": ["sliding_attention", "full_attention"] * 3, "final_logit_softcapping": 30.0},
}
GEMMA4_WIDE = {
    **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8},
    "vocab_size_per_layer_input": len(GEMMA4_VOCABULARY),
}
GEMMA4_MOE = {
    **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
}
MODELS = {
    "qwen35": ("qwen35", QWEN35),
    "qwen35-as-many-heads": ("qwen35", {**QWEN35, "linear_num_value_heads": 2}),
    "qwen35moe": (
        "qwen35moe",
        {**QWEN35, **EXPERTS, "tie_word_embeddings": True, "shared_expert_intermediate_size": 48},
    ),
    "gemma4": ("gemma4", GEMMA4),
    "gemma4-shared-keys": ("gemma4", {**GEMMA4, **GEMMA4_WIDE}),
    "gemma4-experts": ("gemma4", {**GEMMA4, **GEMMA4_MOE}),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path: Path, name: str) -> None:
    architecture, changes = MODELS[name]
    model = random_model(architecture, **changes)
    file = write_gguf(tmp_path / "tiny.gguf", model, architecture)
    planned, loaded = gguf.read_config(file), load_tiny(file)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)
    assert (type(planned), planned.vocab_size) == (type(model.config), model.config.vocab_size)
    assert loaded.model.num_parameters() == model.num_parameters()


def test_layers_that_draft_several_tokens_are_left_out_of_a_qwen35_model(tmp_path: Path) -> None:
    model = random_model("qwen35", **QWEN35)
    drafting = {
        "blk.4.nextn.eh_proj.weight": np.ones((64, 128), np.float32),
        "blk.4.attn_norm.weight": np.ones(64, np.float32),
    }
    fields = {"nextn_predict_layers": 1, "block_count": 5}
    file = write_gguf(tmp_path / "tiny.gguf", model, "qwen35", extra=drafting, fields=fields)
    torch.testing.assert_close(logits(load_tiny(file).model), logits(model), rtol=1e-4, atol=1e-4)


def test_quantized_weights_of_a_qwen35_file_are_put_in_order_after_dequantization(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, dequantize, quantize

    model = random_model("qwen35", **QWEN35)
    names = ("attn_qkv", "attn_gate", "ssm_out")
    kinds = {f"blk.{layer}.{name}.weight": "Q8_0" for layer in range(3) for name in names}
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", model, "qwen35", kinds=kinds)).model
    found, whole = (each.model.layers[1].linear_attn for each in (loaded, model))
    for part in ("in_proj_qkv", "in_proj_z", "out_proj"):
        rounding = (getattr(found, part).weight - getattr(whole, part).weight).abs().max()
        assert 0 < rounding < 0.01, part
    kind = GGMLQuantizationType.Q8_0
    exact = dequantize(quantize(whole.in_proj_qkv.weight[:64].detach().numpy(), kind), kind)
    torch.testing.assert_close(found.in_proj_qkv.weight[:64], torch.from_numpy(exact), rtol=2**-10, atol=1e-6)


def test_keys_that_no_layer_of_a_gemma_4_model_uses_are_left_out(tmp_path: Path) -> None:
    model = random_model("gemma4", **{**GEMMA4, **GEMMA4_WIDE})
    unused = {"blk.4.attn_k.weight": np.ones((32, 64), np.float32), "blk.5.attn_k_norm.weight": np.ones(32, np.float32)}
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", model, "gemma4", extra=unused))
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


def test_experts_of_a_gemma_4_file_whose_halves_are_stored_apart_are_joined(tmp_path: Path) -> None:
    model = random_model("gemma4", **{**GEMMA4, **GEMMA4_MOE})
    file = write_gguf(tmp_path / "tiny.gguf", model, "gemma4", split_experts=True)
    torch.testing.assert_close(logits(load_tiny(file).model), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"extra": {"rope_freqs.weight": np.full(16, 3, np.float32)}}, "unknown factors"),
        ({"fields": {"rope.dimension_count_swa": 8}}, "a part of its sliding layers' heads"),
        ({"fields": {"rope.scaling.type": "yarn"}}, "scales positions by yarn"),
    ],
    ids=["factors", "part-of-a-head", "scaling"],
)
def test_positions_that_gemma_4_does_not_have_are_refused(tmp_path: Path, more: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        load_tiny(write_gguf(tmp_path / "tiny.gguf", random_model("gemma4", **GEMMA4), "gemma4", **more))


@pytest.mark.parametrize("wrong", [{"attention.key_length": 64}, {"expert_count": 9}])
def test_a_gemma_4_file_whose_fields_do_not_fit_its_tensors_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    model = random_model("gemma4", **{**GEMMA4, **GEMMA4_MOE})
    with pytest.raises((CorruptModelError, UnsupportedModelError), match=r"download it again|safetensors|its fields"):
        load_tiny(write_gguf(tmp_path / "tiny.gguf", model, "gemma4", fields=wrong))


def test_the_tokenizer_of_a_gemma_4_file_spells_spaces_and_bytes_and_adds_no_bos(tmp_path: Path) -> None:
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", random_model("gemma4", **GEMMA4), "gemma4"))
    tokenizer = loaded.tokenizer
    assert tokenizer.tokenize("hello hello\n\né") == ["hello", "\u2581hello", "\n\n", "<0xC3>", "<0xA9>"]
    assert tokenizer("hello")["input_ids"] == [GEMMA4_VOCABULARY.index("hello")]  # the template writes <bos>
    assert tokenizer.decode(tokenizer("  hello é\n")["input_ids"]) == "  hello é\n"
    ends = [GEMMA4_VOCABULARY.index(token) for token in ("<eos>", "<turn|>", "<|tool_response>")]
    assert loaded.model.generation_config.eos_token_id == ends


def test_a_qwen35_file_keeps_combining_marks_with_their_letters(tmp_path: Path) -> None:
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", random_model("qwen35", **QWEN35), "qwen35", split="qwen35"))
    split = loaded.tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("\u0939\u093f 12")
    assert [tuple(place) for _, place in split] == [(0, 2), (2, 3), (3, 4), (4, 5)]
    assert loaded.tokenizer.backend_tokenizer.normalizer.normalize_str("e\u0301") == "\u00e9"
