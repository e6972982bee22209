"""One layer's attention call, what handles it, and dense attention in PyTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zsmerge_llm.kvcache import equations

BELONGS_TO_ENGINE = (
    "This model belongs to a zsmerge-llm engine. Use the engine, or close it (close() of the LLM or the engine) to use "
    "the model on its own again."
)
"""The message of the error where a model is called outside its engine."""


@dataclass(frozen=True)
class AttentionCall:
    """What a model's layer asks for. query [B, Hq, T, D]; key, value [B, H, T, D]; sinks [Hq], learned logits.

    layer: its index. window: the sliding window in tokens. softcap: as in `LayerSpec`.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


@dataclass(frozen=True)
class RecurrentCall:
    """What a model's recurrent layer asks for: to mix its input, hidden [B, T, D].

    layer: its index in the model. index: of its state in a cache. run: mixes [B, T, D] on a cache of transformers' kind
    (`attention.recurrent.MixerCache`), or on None, from an empty state that is not kept.
    """

    layer: int
    index: int
    hidden: Tensor
    run: Callable[[Tensor, Any], Tensor]


class AttentionHandler(ABC):
    """What the engine hands through the model to each attention layer."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """Compute the layer's attention output, [B, Hq, T, D]."""

    def mix(self, call: RecurrentCall) -> Tensor:
        """Compute a recurrent layer's output, [B, T, D]. Here, as if the tokens were a text of their own."""
        return call.run(call.hidden, None)

    def get_seq_length(self) -> int:
        """Return 0, for models that take this object for a cache of transformers (Falcon)."""
        return 0


def dense_attention(call: AttentionCall, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attend from call.query to keys and values [B, H, C, D], fused where the model allows: [B, Hq, T, D].

    bias: added to the logits, broadcastable to [B, Hq, T, C]; None for none.
    """
    group = call.query.shape[1] // keys.shape[1]
    if call.softcap is None and call.sinks is None:
        return F.scaled_dot_product_attention(
            call.query, keys, values, attn_mask=bias, scale=call.scaling, enable_gqa=group > 1
        )
    batch, heads, total, dim = call.query.shape
    grouped = call.query.view(batch, keys.shape[1], group, total, dim).float()
    spread = torch.zeros((), device=keys.device) if bias is None else bias.float()
    if spread.dim() == 4:  # [B, Hq, T, C] → [B, H, G, T, C]
        split = (1, 1) if spread.shape[1] == 1 else (keys.shape[1], group)
        spread = spread.view(spread.shape[0], *split, *spread.shape[2:])
    weights = equations.attention_weights(grouped, keys.float(), spread, call.scaling, call.softcap, call.sinks)
    output = weights.to(values.dtype).view(batch, keys.shape[1], group * total, -1) @ values
    return output.view(batch, heads, total, -1)
