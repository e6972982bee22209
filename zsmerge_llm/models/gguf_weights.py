"""Weights of GGUF files that transformers leaves in llama.cpp's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zsmerge_llm.models.gguf_header import Header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def restore_weights(model: PreTrainedModel, header: Header) -> None:
    """Put into a loaded model what transformers did not put there as its own layers have it."""
    if header.architecture == "falcon":
        _group_heads(model)


def _group_heads(model: Any) -> None:
    """Order Falcon's fused projection by groups: the queries of each key and value head, then these two.

    llama.cpp stores all queries first, then all keys, then all values.
    """
    import torch

    config = model.config
    heads, kv_heads, size = config.num_attention_heads, config.num_kv_heads, config.head_dim
    for layer in model.transformer.h:
        weight = layer.self_attention.query_key_value.weight.data
        parts = weight.split([heads * size, kv_heads * size, kv_heads * size])
        groups = torch.cat([part.unflatten(0, (kv_heads, -1)) for part in parts], dim=1)
        weight.copy_(groups.flatten(0, 1))
