"""The shapes of a model that its memory follows from: layers, widths, vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from zsmerge_llm.attention.interface import ModelLayers, prepare_model
from zsmerge_llm.attention.positions import context_window
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.recurrent_state import RecurrentSpec
from zsmerge_llm.kvcache.slots import LayerSpec

META = torch.device("meta")


@dataclass(frozen=True)
class ModelShape:
    """What a plan needs of a model.

    Attributes:
        specs: what each attention layer needs of its cache, on the meta device.
        recurrent: what each recurrent layer keeps, on the meta device.
        dtype: of activations and logits.
        hidden, intermediate, vocab: widths of the residual stream, of an MLP's inner layer, of the logits.
        window: positions that the model was trained on, where its config says so.
        largest_matrix: weights of the largest linear layer but the output layer.
        sinks: whether attention has learned sinks.
    """

    specs: tuple[LayerSpec, ...]
    recurrent: tuple[RecurrentSpec, ...]
    dtype: torch.dtype
    hidden: int
    intermediate: int
    vocab: int
    window: int | None
    largest_matrix: int
    sinks: bool

    def conversation_nbytes(self, config: CacheConfig) -> int:
        """Return the bytes of one conversation's cache and logits, as `Engine.new_cache` makes it.

        The exact cache grows: its bytes are those at the context window.

        Raises:
            ConfigError: `layer_budgets` for another number of layers.
        """
        cache = Cache(config, self.specs, 1, self.recurrent)
        if config.slots is None and self.window is not None:
            for layer in cache.layers:
                layer.grow_to(self.window)
        return cache.nbytes + self.vocab * self.dtype.itemsize

    @property
    def states_nbytes(self) -> int:
        """Bytes of one conversation's recurrent states, which are a part of its cache."""
        return sum(spec.nbytes for spec in self.recurrent)

    def full_cache_nbytes(self, tokens: int) -> int:
        """Return the bytes of keys and values of an exact cache after `tokens`."""
        return Cache(CacheConfig(), self.specs, 1, self.recurrent).full_nbytes(tokens)


def shape_of(model: PreTrainedModel, layers: ModelLayers | None = None) -> ModelShape:
    """Return the shape of a model, which may be on the meta device.

    Args:
        layers: where they are known; else a one-token pass without data finds them, which changes the model's attention
            to the engine's.

    Raises:
        UnsupportedModelError: a model that the cache cannot carry.
    """
    config = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    matrices: list[Any] = [each for each in model.modules() if each is not head and hasattr(each, "in_features")]
    attention, recurrent = _trace(model) if layers is None else layers
    return ModelShape(
        specs=tuple(replace(spec, device=META) for spec in attention),
        recurrent=tuple(replace(spec, device=META) for spec in recurrent),
        dtype=attention[0].dtype,
        hidden=config.hidden_size,
        intermediate=_intermediate(config),
        vocab=head.weight.shape[0],
        window=context_window(model.config),
        largest_matrix=max((layer.in_features * layer.out_features for layer in matrices), default=0),
        sinks=any(name.endswith("sinks") for name, _ in model.named_parameters()),
    )


def _trace(model: PreTrainedModel) -> ModelLayers:
    """Find the specs by a pass of one token without data; by the config where a model's code needs data."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the others choose experts by the data
    try:
        return prepare_model(model)
    except (RuntimeError, NotImplementedError):
        return _by_config(model)


def _by_config(model: PreTrainedModel) -> ModelLayers:
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = [getattr(config, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds]
    return ModelLayers(tuple(LayerSpec(heads, kv_heads, dim, dim, window, model.dtype, META) for window in windows), ())


def _intermediate(config: Any) -> int:
    """Return the width of an MLP's inner layer; of a mixture of experts, that of all experts that a token goes to."""
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_hidden_size", None)
    width = width or 4 * config.hidden_size
    if experts := getattr(config, "num_experts_per_tok", None):
        width = max(width, experts * (getattr(config, "moe_intermediate_size", None) or width))
    return width
