"""Chunks in half precision where the processor multiplies float32 faster (`product_dtype`).

A matrix is converted piece by piece. Results are rounded once, as those of a product in half precision are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from zsmerge_llm.attention.backend import TorchOps
from zsmerge_llm.attention.call import AttentionCall, dense_attention
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.cpu.native import MAX_ROWS
from zsmerge_llm.cpu.product_dtype import HALF
from zsmerge_llm.kvcache.layer_cache import KVView

PIECE = 2**20
"""Weights in float32 at once: 4 MB, which stay in a cache."""


class Float32Linear:
    """Multiply the rows of a chunk by a matrix in half precision in float32; few rows as the layer has it."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.eager: Callable[..., Any] = layer.forward

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        weight, bias = self.layer.weight, cast("Tensor | None", self.layer.bias)
        if x.dtype not in HALF or x.numel() <= MAX_ROWS * x.shape[-1]:
            return cast(Tensor, self.eager(x))
        rows = x.reshape(-1, x.shape[-1]).float()
        out = x.new_empty(len(rows), len(weight))
        step = max(1, PIECE // weight.shape[1])
        for start in range(0, len(weight), step):
            some = slice(start, start + step)
            out[:, some] = F.linear(rows, weight[some].float(), None if bias is None else bias[some].float())
        return out.view(*x.shape[:-1], -1)


class Float32Ops(TorchOps):
    """Attention of a chunk in half precision, computed in float32."""

    def attention(self, view: KVView, call: AttentionCall, keys: Tensor, values: Tensor, layout: PassLayout) -> Tensor:
        """Attend from call.query to keys and values [B, H, C + m, D]: [B, Hq, T, D]; few tokens as PyTorch does."""
        if call.query.shape[2] <= MAX_ROWS:
            return super().attention(view, call, keys, values, layout)
        bias = layout.logit_bias(view, call)
        wide = replace(call, query=call.query.float())
        output = dense_attention(wide, keys.float(), values.float(), None if bias is None else bias.float())
        return output.to(call.query.dtype)
