"""What differs between model families: who is refused, and an adapter for Falcon, whose attention is its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from zsmerge_llm.attention.call import BELONGS_TO_ENGINE, AttentionHandler
from zsmerge_llm.attention.positions import check_positions, uses_alibi
from zsmerge_llm.errors import InputError, UnsupportedModelError

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "attention"}
"""What configs call layers that only attend."""
RECURRENT_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "mamba2", "recurrent"}
"""What they call layers with a state of constant size, beside attention or without it."""
TOKENWISE_LAYERS = {"mlp", "moe", "dummy"}
"""What they call layers in which no token sees another."""
HIDDEN_WINDOWS = {"moshi"}
"""Model types whose code hides a window in a mask, which the attention function does not get."""


def keyword(model: PreTrainedModel) -> str:
    """The keyword argument that reaches the attention layers of this model."""
    return "past_key_values" if _is_falcon(model) else "zsmerge"


def check(model: PreTrainedModel) -> None:
    """Refuse, by name, what the compressed cache cannot carry.

    Raises:
        UnsupportedModelError
    """
    check_positions(model)
    name, config = type(model).__name__, model.config.get_text_config()
    if any(getattr(each, "is_encoder_decoder", False) for each in (model.config, config)):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; the compressed cache is for decoder-only models.")
    if not getattr(config, "num_hidden_layers", 0):
        raise UnsupportedModelError(
            f"{name} has no single stack of decoder layers, which the compressed cache needs. Use another model."
        )
    if type(model).forward is nn.Module.forward:
        raise UnsupportedModelError(
            f"{name} is several models, without a pass over all of them: give the one that writes text as a model "
            "object, such as `model.thinker`."
        )
    if not isinstance(getattr(_embeddings(model), "weight", None), Tensor):
        raise UnsupportedModelError(f"{name} has no single table of token embeddings. Use another model.")
    if needed := _needed_inputs(model):
        raise UnsupportedModelError(
            f"{name} needs {', '.join(needed)} beside text in each pass. Use a model that reads text alone."
        )
    if uses_alibi(config):
        raise UnsupportedModelError(
            f"{name} uses ALiBi, whose bias depends on distances that merged slots do not have. Use a RoPE model."
        )
    if model.config.model_type in HIDDEN_WINDOWS:
        raise UnsupportedModelError(
            f"{name} does not hand its sliding window on to its attention, where the compressed cache needs it. Use "
            "another model."
        )
    known = ATTENTION_LAYERS | RECURRENT_LAYERS | TOKENWISE_LAYERS
    if other := set(getattr(config, "layer_types", None) or ()) - known:
        raise UnsupportedModelError(
            f"{name} has {', '.join(sorted(other))} layers; only full and sliding-window attention can be compressed, "
            "beside recurrent layers. Use a model whose layers are all of these kinds."
        )


def _embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return what turns token ids into vectors; None where that is no single module."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _needed_inputs(model: PreTrainedModel) -> list[str]:
    """Return what a forward pass must be given beside token ids."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    named = [each for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
    return [each.name for each in named if each.default is each.empty and each.name not in ("self", "input_ids")]


def install(model: PreTrainedModel, attention: Callable[..., tuple[Tensor, None]], name: str) -> None:
    """Make the model's layers call `attention`, registered with transformers as `name`.

    Raises:
        UnsupportedModelError: the model has no such seam.
    """
    if not _is_falcon(model):
        model.set_attn_implementation(name)
        text: Any = model.config.get_text_config()
        if text is not model.config and text._attn_implementation == name:
            model.config._attn_implementation = name  # the outermost class only has parts that attend
        if model.config._attn_implementation != name:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not use transformers' attention interface, through which the compressed "
                "cache works. Llama, Mistral, Qwen, Gemma, Phi, gpt-oss, Falcon and most recent decoders do."
            )
        return
    model.config._attn_implementation = name
    decoder: Any = model.transformer
    for layer in decoder.h:
        if not isinstance(layer.self_attention, FalconAttention):
            layer.self_attention = FalconAttention(layer.self_attention, attention)


def uninstall(model: PreTrainedModel) -> None:
    """Give the layers of a model the attention modules back that `install` replaced."""
    if _is_falcon(model):
        decoder: Any = model.transformer
        for layer in decoder.h:
            if isinstance(layer.self_attention, FalconAttention):
                layer.self_attention = layer.self_attention.original


def _is_falcon(model: PreTrainedModel) -> bool:
    return model.config.model_type == "falcon"


class FalconAttention(nn.Module):
    """Falcon's attention with its own weights, calling the registered function and not expanding the KV heads."""

    is_causal = True

    def __init__(self, original: nn.Module, attention: Callable[..., tuple[Tensor, None]]) -> None:
        super().__init__()
        self.original: Any = original
        self.attention = attention
        self.layer_idx = original.layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

        if not isinstance(layer_past, AttentionHandler):
            raise InputError(BELONGS_TO_ENGINE)
        assert position_embeddings is not None  # ALiBi is refused at load
        query, key, value = (part.transpose(1, 2) for part in self._split(self.original.query_key_value(hidden_states)))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        mixed, _ = self.attention(self, query, key, value, attention_mask, zsmerge=layer_past)
        return self.original.dense(mixed.flatten(2)), None

    def _split(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, fused] → queries [B, T, Hq, D], keys and values [B, T, H, D]: Falcon's three layouts."""
        own = self.original
        batch, length, _ = fused.shape
        if own.new_decoder_architecture:
            parts = fused.view(batch, length, own.num_kv_heads, -1, own.head_dim)
            return parts[..., :-2, :].flatten(2, 3), parts[..., -2, :], parts[..., -1, :]
        if own.multi_query:
            heads = fused.view(batch, length, own.num_heads + 2, own.head_dim)
            return heads[:, :, :-2], heads[:, :, [-2]], heads[:, :, [-1]]
        parts = fused.view(batch, length, own.num_heads, 3, own.head_dim)
        return parts[..., 0, :], parts[..., 1, :], parts[..., 2, :]
