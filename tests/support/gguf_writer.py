"""Writes tiny models as GGUF files like llama.cpp's converter: tensor names, permuted heads, offset norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.support.gguf_newer_models import (
    gemma4_rope_factors,
    gemma4_widths,
    tiled_value_heads,
    write_gemma4_fields,
    write_qwen35_fields,
)

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["he", "ll", "hell", "hello", "\u0120\u0120"]
MERGES = ["h e", "l l", "he ll", "hell o", "\u0120 \u0120"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
VOCABULARY = [*SPECIAL, *bytes_to_unicode().values(), *WORDS]
GEMMA4_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|tool_response>"]
GEMMA4_MERGES = ["h e", "l l", "he ll", "hell o", "\u2581 hello", "\n \n"]
GEMMA4_VOCABULARY = [
    *(*GEMMA4_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\n", *"abcdefghijklmnopqrstuvwxyz"),
    *(merge.replace(" ", "") for merge in GEMMA4_MERGES),
]
SHAPE: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODEL_TYPES = {
    **{"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"},
    **{"gpt-oss": "gpt_oss", "minimax-m2": "minimax_m2"},
    **{"gemma4": "gemma4_text", "qwen35": "qwen3_5_text", "qwen35moe": "qwen3_5_moe_text"},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def random_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """Return a random float32 model without zero parameters, norms and biases included."""
    config = AutoConfig.for_model(MODEL_TYPES.get(architecture, architecture), **{**SHAPE, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.state_dict(keep_vars=True).values():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str,
    *,
    kinds: dict[str, str] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    fields: dict[str, Any] | None = None,
    split: str = "gpt-2",
    name: str | None = None,
    special: Sequence[str] = (),
    split_experts: bool = False,
) -> Path:
    """Write a model to `path`, and return the path.

    Args:
        kinds: storage type by tensor name, such as "Q8_0"; "output.weight" of a tied model is written only if named.
        extra: further tensors. fields: further fields of the architecture. split: name of the pre-tokenizer.
        name: of the model. special: further special tokens.
        split_experts: store both halves of Gemma 4's experts apart.
    """
    writer = gguf.GGUFWriter(path, architecture)
    if name:
        writer.add_name(name)
    _write_fields(writer, model.config, fields or {})
    _write_vocabulary(writer, split, special)
    kinds = kinds or {}
    tensors = {**_tensors(model, architecture, "output.weight" in kinds), **(extra or {})}
    for tensor, array in (_halved(tensors) if split_experts else tensors).items():
        kind = gguf.GGMLQuantizationType[kinds.get(tensor, "F32")]
        data = array if kind.name == "F32" else gguf.quantize(array, kind)
        writer.add_tensor(tensor, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_fields(writer: gguf.GGUFWriter, config: Any, fields: dict[str, Any]) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    mean_head = config.hidden_size // config.num_attention_heads
    head = mean_head if writer.arch == "gemma4" else getattr(config, "head_dim", None) or mean_head
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    widths = [getattr(config, name, None) for name in ("ffn_hidden_size", "n_inner", "intermediate_size")]
    if width := next((width for width in widths if width), None):
        writer.add_feed_forward_length(gemma4_widths(config) if writer.arch == "gemma4" else width)
    writer.add_head_count(config.num_attention_heads)
    attends = [kind == "full_attention" for kind in getattr(config, "layer_types", None) or ()]
    if writer.arch not in ("gpt2", "gemma4"):
        heads = _kv_heads(config)
        writer.add_head_count_kv([heads * each for each in attends] if writer.arch == "lfm2" else heads)
    norms = [getattr(config, name, None) for name in ("norm_epsilon", "layer_norm_eps", "layer_norm_epsilon")]
    norm = config.norm_eps if writer.arch == "nemotron" else next((eps for eps in norms if eps), None)
    writer.add_layer_norm_eps(norm) if norm else writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    if writer.arch not in ("falcon", "gpt2", "gemma4"):
        writer.add_key_length(head)
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1)))
        writer.add_rope_freq_base(rope["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if writer.arch == "lfm2":
        writer.add_shortconv_l_cache(config.conv_L_cache)
    if writer.arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if getattr(config, "num_experts", None):
        writer.add_expert_count(config.num_experts)
        top = config.top_k_experts if writer.arch == "gemma4" else config.num_experts_per_tok
        writer.add_expert_used_count(top)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", config.intermediate_size))
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if writer.arch == "minimax-m2":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if writer.arch == "gemma4":
        write_gemma4_fields(writer, config)
    if writer.arch in ("qwen35", "qwen35moe"):
        write_qwen35_fields(writer, config)
    if writer.arch in ("qwen2moe", "qwen35moe"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    for name, value in fields.items():
        for written in writer.kv_data:
            written.pop(f"{writer.arch}.{name}", None)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(f"{writer.arch}.{name}", value)


def _kv_heads(config: Any) -> int:
    if config.model_type != "falcon":
        return int(config.num_key_value_heads)
    return 1 if config.multi_query and not config.new_decoder_architecture else int(config.num_kv_heads)


def _write_vocabulary(writer: gguf.GGUFWriter, split: str, special: Sequence[str]) -> None:
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    if writer.arch == "gemma4":
        return _write_gemma4_vocabulary(writer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    tokens = [*VOCABULARY, *special]
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in (*SPECIAL, *special) else normal for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)


def _write_gemma4_vocabulary(writer: gguf.GGUFWriter) -> None:
    kinds = [gguf.TokenType.CONTROL] * len(GEMMA4_SPECIAL) + [gguf.TokenType.BYTE] * 256
    kinds += [gguf.TokenType.NORMAL] * (len(GEMMA4_VOCABULARY) - len(kinds))
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(GEMMA4_VOCABULARY)
    writer.add_token_scores([-1000.0] * len(GEMMA4_VOCABULARY))
    writer.add_token_types(kinds)
    writer.add_token_merges(GEMMA4_MERGES)
    for name in ("pad", "eos", "bos", "unk"):
        getattr(writer, f"add_{name}_token_id")(GEMMA4_SPECIAL.index(f"<{name}>"))
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def _tensors(model: PreTrainedModel, architecture: str, output: bool) -> dict[str, np.ndarray]:
    config = model.config
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    tensors = {}
    for name, weight in _parts(model):
        stem, _, suffix = name.rpartition(".")
        gguf_name = name if name.startswith("blk.") else names.get_name(name) or f"{names.get_name(stem)}.{suffix}"
        if name == "lm_head.weight" and config.tie_word_embeddings and not output:
            continue
        array = weight.float().numpy()
        if architecture == "llama" and ("attn_q." in gguf_name or "attn_k." in gguf_name):
            heads = config.num_attention_heads if "attn_q." in gguf_name else config.num_key_value_heads
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if architecture == "falcon" and "attn_qkv" in gguf_name:
            array = _ungrouped(array, config.num_attention_heads, _kv_heads(config))
        if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            array = array.T
        if architecture in ("gemma2", "gemma3", "nemotron") and gguf_name.endswith("norm.weight"):
            array = array + 1
        if architecture in ("qwen35", "qwen35moe"):
            array = tiled_value_heads(array, name, config)
            if gguf_name.endswith("ssm_a"):
                array = -np.exp(array)
            elif gguf_name.endswith("norm.weight") and "ssm_norm" not in gguf_name:
                array = array + 1
        if ("conv" in gguf_name and array.ndim == 3) or "gate_inp_shexp" in gguf_name:
            array = array.squeeze(1 if "conv" in gguf_name else 0)
        tensors[gguf_name] = np.ascontiguousarray(array)
    if architecture == "gemma4":
        tensors["rope_freqs.weight"] = gemma4_rope_factors(config)
    return tensors


def _halved(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    halved = {}
    for name, array in tensors.items():
        parts = zip(("gate", "up"), np.split(array, 2, axis=1), strict=True) if "gate_up_exps" in name else ()
        halved |= {name.replace("gate_up", part): np.ascontiguousarray(half) for part, half in parts} or {name: array}
    return halved


def _ungrouped(array: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """Return Falcon's fused projection as all queries, then all keys, then all values."""
    groups = array.reshape(kv_heads, heads // kv_heads + 2, -1, array.shape[1])
    return np.concatenate([part.reshape(-1, array.shape[1]) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over a model's weights as a checkpoint has them, except that all experts of a layer are one tensor."""
    for name, weight in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("sinks", "layer_scalar"):
            yield f"{name}.weight", weight
        elif leaf == "dt_bias":
            yield f"{layer}.dt_proj.bias", weight
        elif leaf in ("scale", "per_expert_scale"):  # of Gemma 4's router
            part = "ffn_gate_inp" if leaf == "scale" else "ffn_down_exps"
            yield f"blk.{name.split('.')[2]}.{part}.scale", weight
        elif leaf == "gate_up_proj" and model.config.model_type == "gemma4_text":
            yield f"{name}.weight", weight
        elif leaf == "e_score_correction_bias":
            yield f"{layer.replace('mlp', 'block_sparse_moe')}.e_score_correction.bias", weight
        elif model.config.model_type == "gpt_oss" and ".experts." in name:
            stem, suffix = (leaf[:-5], "bias") if leaf.endswith("_bias") else (leaf, "weight")
            weight = weight if suffix == "bias" else weight.transpose(1, 2)
            rows = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
            parts = rows if stem == "gate_up_proj" else {stem: slice(None)}
            for part, picked in parts.items():
                yield f"{layer}.{part}.{suffix}", weight[:, picked]
        elif name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate_proj", "up_proj"), weight.chunk(2, dim=1), strict=True):
                yield f"{name.removesuffix('gate_up_proj')}{part}.weight", half
        else:
            yield f"{name}.weight" if name.endswith("experts.down_proj") else name, weight
