"""Gemma 4 in GGUF files: transformers reads neither its layers' kinds and shapes nor its embeddings per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from zsmerge_llm.errors import CorruptModelError, UnsupportedModelError
from zsmerge_llm.models.gguf_header import REMEDY, Header
from zsmerge_llm.models.gguf_weights import empty_model, read_tensor

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

UNROTATED = 1e20
"""A divisor of a frequency from which on a dimension counts as not rotated; llama.cpp writes 1e30."""


def gemma4_config(header: Header, shape: dict[str, Any]) -> PretrainedConfig:
    """Return the config of a Gemma 4 file. `shape` has the settings that every decoder has.

    Raises:
        CorruptModelError: a list of the layers has another length. UnsupportedModelError: see `_rope`.
    """
    from transformers import Gemma4TextConfig

    get, kind = header.get, cast(Any, Gemma4TextConfig)  # settings of full attention are not among its fields
    sliding = _per_layer(header, "attention.sliding_window_pattern")
    heads = _per_layer(header, "attention.head_count_kv")
    widths = _per_layer(header, "feed_forward_length")
    of_sliding = [count for count, is_sliding in zip(heads, sliding, strict=True) if is_sliding]
    of_full = [count for count, is_sliding in zip(heads, sliding, strict=True) if not is_sliding]
    keys_are_values = _keys_are_values(header, sliding)
    per_layer = header.tensors.get("per_layer_token_embd.weight")
    config: PretrainedConfig = kind(
        **shape
        | {
            "head_dim": get("attention.key_length_swa"),
            "num_key_value_heads": (of_sliding or of_full)[0],
            "rope_parameters": _rope(header),
        },
        global_head_dim=get("attention.key_length"),
        num_global_key_value_heads=of_full[0] if keys_are_values and of_full else None,
        attention_k_eq_v=keys_are_values,
        layer_types=["sliding_attention" if is_sliding else "full_attention" for is_sliding in sliding],
        sliding_window=get("attention.sliding_window"),
        num_kv_shared_layers=get("attention.shared_kv_layers") or 0,
        intermediate_size=widths[0],
        use_double_wide_mlp=len(set(widths)) > 1,
        hidden_size_per_layer_input=get("embedding_length_per_layer_input") or 0,
        vocab_size_per_layer_input=int(per_layer.shape[1]) if per_layer is not None else shape["vocab_size"],
        final_logit_softcapping=get("final_logit_softcapping"),
        enable_moe_block="blk.0.ffn_gate_inp.weight" in header.tensors,
        num_experts=get("expert_count"),
        top_k_experts=get("expert_used_count"),
        moe_intermediate_size=get("expert_feed_forward_length"),
    )
    return config


def _per_layer(header: Header, key: str) -> list[Any]:
    """Return a field that has one value for each layer, or one for all of them."""
    value, layers = header.get(key), header.get("block_count")
    values = value if isinstance(value, list) else [value] * layers
    if len(values) != layers or None in values:
        raise CorruptModelError(f"The field {key} of {header.path} does not have a value for each layer: {REMEDY}.")
    return values


def _keys_are_values(header: Header, sliding: list[bool]) -> bool:
    """Return whether the full-attention layers have no matrix for values, and take the keys' instead."""
    names = [f"blk.{number}.attn" for number, is_sliding in enumerate(sliding) if not is_sliding]
    stored = [name for name in names if f"{name}_k.weight" in header.tensors]
    return any(f"{name}_v.weight" not in header.tensors for name in stored)


def _rope(header: Header) -> dict[str, Any]:
    """Return the rotary positions of both kinds of layers. Full attention rotates the first dimensions only.

    Raises:
        UnsupportedModelError: frequencies, a scaling or a width that Gemma 4 does not have.
    """
    factors = header.tensors.get("rope_freqs.weight")
    share = 1.0
    if factors is not None:
        rotated = factors.data < UNROTATED
        count = int(rotated.sum())
        share = count / len(rotated)
        if not rotated[:count].all() or (factors.data[:count] != 1).any():
            raise UnsupportedModelError(f"{header.path} scales positions by unknown factors: {REMEDY}.")
    if header.get("rope.dimension_count_swa") not in (None, header.get("attention.key_length_swa")):
        raise UnsupportedModelError(f"{header.path} rotates a part of its sliding layers' heads: {REMEDY}.")
    if header.get("rope.scaling.type") not in (None, "none"):
        raise UnsupportedModelError(f"{header.path} scales positions by {header.get('rope.scaling.type')}: {REMEDY}.")
    full = {"rope_type": "proportional", "partial_rotary_factor": share}
    return {
        "full_attention": {**full, "rope_theta": header.get("rope.freq_base") or 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa") or 1e4},
    }


def read_gemma4(header: Header, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a Gemma 4 model with the tensors of a file; its buffers that no checkpoint has are not set.

    Raises:
        CorruptModelError: a tensor is missing, or of another shape than the fields say.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    model: Any = empty_model(header, config, dtype)
    names = get_tensor_name_map(MODEL_ARCH.GEMMA4, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            tensor = _find(header, names, name)
            if tensor.shape != weight.shape:
                raise CorruptModelError(f"{header.path} holds tensors of other shapes than its fields say: {name}.")
            weight.copy_(tensor)
    return model


def _find(header: Header, names: Any, parameter: str) -> torch.Tensor:
    """Return the tensor of a parameter: the scales of a router have names of their own, "gate" and "up" may be two."""
    import torch

    stem, _, leaf = parameter.rpartition(".")
    if leaf in ("scale", "per_expert_scale"):
        part = {"scale": "ffn_gate_inp", "per_expert_scale": "ffn_down_exps"}[leaf]
        return _stored(header, f"blk.{parameter.split('.')[2]}.{part}.scale")
    stored = names.get_name(stem if leaf == "weight" else parameter)
    if leaf == "gate_up_proj" and f"{stored}.weight" not in header.tensors:
        halves = [_stored(header, f"{stored.replace('gate_up', half)}.weight") for half in ("gate", "up")]
        return torch.cat(halves, dim=1)
    return _stored(header, f"{stored}.weight")


def _stored(header: Header, name: str) -> torch.Tensor:
    if name not in header.tensors:
        raise CorruptModelError(f"{header.path} holds no tensor {name}: download it again.")
    return read_tensor(header, name)
