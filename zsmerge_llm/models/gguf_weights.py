"""Weights of GGUF files that transformers leaves in llama.cpp's order, or does not read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import CorruptModelError
from zsmerge_llm.models.gguf_header import REMEDY, Header

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def group_heads(model: Any) -> None:
    """Order Falcon's fused projection by groups: the queries of each key and value head, then these two.

    llama.cpp stores all queries first, then all keys, then all values.
    """
    import torch

    config = model.config
    kv_heads = 1 if config.multi_query else config.num_kv_heads
    sizes = [heads * config.head_dim for heads in (config.num_attention_heads, kv_heads, kv_heads)]
    for layer in model.transformer.h:
        weight = layer.self_attention.query_key_value.weight.data
        parts = weight.split(sizes)
        weight.copy_(torch.cat([part.unflatten(0, (kv_heads, -1)) for part in parts], dim=1).flatten(0, 1))


def unused_tensors(header: Header, config: Any) -> set[str]:
    """Return the tensors that a model does not use: layers that draft several tokens, keys that a layer borrows."""
    layers = config.num_hidden_layers
    borrowing = layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    keys = {f"blk.{number}.attn_{part}.weight" for number in range(borrowing, layers) for part in ("k", "v", "k_norm")}
    drafting = tuple(f"blk.{layers + number}." for number in range(header.get("nextn_predict_layers") or 0))
    return {name for name in header.tensors if name in keys or name.startswith(drafting)}


def empty_model(header: Header, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model whose weights are still to be filled, and whose buffers are not set.

    Raises:
        CorruptModelError: it has more weights than the file; found before memory is taken for them.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if model.num_parameters() > sum(int(tensor.n_elements) for tensor in header.tensors.values()):
        raise CorruptModelError(f"The fields of {header.path} name a larger model than its tensors are: {REMEDY}.")
    model.to_empty(device=torch.get_default_device())
    model.tie_weights()
    return model


def read_gpt_oss(header: Header, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a gpt-oss model with the tensors of a file; its buffers are not set.

    transformers fails at a file's YaRN fields, and seeks the experts and the attention sinks under other names.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    model: Any = empty_model(header, config, dtype)
    names = get_tensor_name_map(MODEL_ARCH.GPT_OSS, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        if not stem.endswith(".experts"):
            is_sink = suffix == "sinks"
            stored = names.get_name(name if is_sink else stem)
            weight.data.copy_(read_tensor(header, f"{stored}.{'weight' if is_sink else suffix}"))
    for number, layer in enumerate(model.model.layers):
        _fill_experts(layer.mlp.experts, header, f"blk.{number}")
    return model


def _fill_experts(experts: Any, header: Header, block: str) -> None:
    """Fill a layer's experts: their matrices are transposed, and the columns of "gate" and "up" take turns."""
    experts.down_proj.data.copy_(read_tensor(header, f"{block}.ffn_down_exps.weight").transpose(1, 2))
    experts.down_proj_bias.data.copy_(read_tensor(header, f"{block}.ffn_down_exps.bias"))
    for turn, part in enumerate(("gate", "up")):
        weight = read_tensor(header, f"{block}.ffn_{part}_exps.weight").transpose(1, 2)
        experts.gate_up_proj.data[..., turn::2].copy_(weight)
        experts.gate_up_proj_bias.data[..., turn::2].copy_(read_tensor(header, f"{block}.ffn_{part}_exps.bias"))


def read_tensor(header: Header, name: str) -> torch.Tensor:
    """Return a tensor of a file, dequantized."""
    import torch
    from gguf import dequantize

    tensor = header.tensors[name]
    return torch.tensor(dequantize(tensor.data, tensor.tensor_type))
