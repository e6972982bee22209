"""Attention for a GPU in PyTorch's fused kernels, none of which takes both a mask and fewer KV heads than query heads.

A chunk attends in two flash calls, one to the held slots and one, causal, to itself and the probe behind it. Both parts
of the softmax are merged by their log-sum-exp, so that no mask of chunk x slots exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zsmerge_llm.attention.backend import TorchOps
from zsmerge_llm.attention.call import AttentionCall, dense_attention
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.kvcache.layer_cache import KVView

MAX_FOLDED_TOKENS = 16
"""Tokens of a pass up to which the queries of a KV head's group are folded into one head; beyond, its keys repeat."""
FLASH_DIM_MULTIPLE = 8
MAX_FLASH_DIM = 256
BIAS_FEATURES = 8
"""Dimensions that keys get for their bias: two are used, the others keep the size that flash attention needs."""


class GPUOps(TorchOps):
    """Attention in fused kernels."""

    def attention(self, view: KVView, call: AttentionCall, keys: Tensor, values: Tensor, layout: PassLayout) -> Tensor:
        """Attend from call.query to keys and values [B, H, C + m, D]: [B, Hq, T, D]."""
        held = view.base[0] if view.base else 0
        if not layout.static and _fits_flash(view, call, values, layout):
            bias = layout.slot_bias(view, call)[:, :, :held] if view.config.residual else None
            return chunk_attention(call, keys, values, held, bias)
        bias = layout.logit_bias(view, call)
        if call.softcap is not None or call.sinks is not None:
            return dense_attention(call, keys, values, bias)
        return masked_attention(call, keys, values, bias)


def chunk_attention(call: AttentionCall, keys: Tensor, values: Tensor, held: int, bias: Tensor | None) -> Tensor:
    """Attend to `held` slots and, causally, to the tokens behind them, T as many as queries: [B, Hq, T, D].

    bias: float32 [B, H, held], added to the logits of the held slots.
    """
    output, lse = _flash(call.query, keys[:, :, held:], values[:, :, held:], call.scaling, causal=True)
    if held:
        query, old, content = call.query, keys[:, :, :held], values[:, :, :held]
        if bias is not None:
            query, old, content = _with_bias(query, old, content, bias, call.scaling)
        other, other_lse = _flash(query, old, content, call.scaling, causal=False)
        output, lse = merge_attention(output, lse, other[..., : values.shape[3]], other_lse)
    if call.sinks is not None:  # a sink takes its share of the softmax and adds nothing
        share = torch.sigmoid(lse - call.sinks.float()[:, None])
        output = output * share[..., None].to(output.dtype)
    return output


def merge_attention(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two parts of the keys: outputs [B, H, T, D], log-sum-exps float32 [B, H, T]."""
    lse = torch.logaddexp(first_lse, second_lse)
    first_share, second_share = ((each - lse).exp()[..., None] for each in (first_lse, second_lse))
    return (first * first_share + second * second_share).to(first.dtype), lse


def masked_attention(call: AttentionCall, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attend with a bias broadcastable to [B, Hq, T, C], in a fused kernel whatever the number of KV heads."""
    batch, heads, total, dim = call.query.shape
    kv_heads, slots = keys.shape[1:3]
    group = heads // kv_heads
    if group == 1:
        return F.scaled_dot_product_attention(call.query, keys, values, attn_mask=bias, scale=call.scaling)
    if total > MAX_FOLDED_TOKENS:
        keys, values = (each.repeat_interleave(group, dim=1) for each in (keys, values))
        return F.scaled_dot_product_attention(call.query, keys, values, attn_mask=bias, scale=call.scaling)
    folded = call.query.reshape(batch, kv_heads, group * total, dim)
    if bias is not None and bias.shape[1] == 1:
        bias = bias[:, :, None].expand(-1, -1, group, -1, -1).reshape(len(bias), 1, group * total, slots)
    elif bias is not None:
        bias = bias.reshape(len(bias), kv_heads, group * total, slots)
    output = F.scaled_dot_product_attention(folded, keys, values, attn_mask=bias, scale=call.scaling)
    return output.reshape(batch, heads, total, -1)


def _fits_flash(view: KVView, call: AttentionCall, values: Tensor, layout: PassLayout) -> bool:
    """Return whether two flash calls do for a pass: rows of one fill, no padding, no window, no soft-capping."""
    dim = call.query.shape[3] + (BIAS_FEATURES if view.config.residual else 0)
    plain = view.spec.window is None and call.softcap is None and layout.valid is None and view.layer.uniform
    sized = call.query.shape[3] == values.shape[3] and dim % FLASH_DIM_MULTIPLE == 0 and dim <= MAX_FLASH_DIM
    return plain and sized and call.query.dtype in (torch.float16, torch.bfloat16)


def _with_bias(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Give keys their bias [B, H, C] as features that every query multiplies by one, in two parts for its precision."""
    wanted = bias.clamp(min=torch.finfo(keys.dtype).min / 4) / scaling
    high = wanted.to(keys.dtype)
    features = torch.stack([high, (wanted - high.float()).to(keys.dtype)], dim=-1)
    missing = BIAS_FEATURES - features.shape[3]
    ones = query.new_ones(*query.shape[:3], features.shape[3])
    return (
        F.pad(torch.cat([query, ones], dim=-1), (0, missing)),
        F.pad(torch.cat([keys, features], dim=-1), (0, missing)),
        F.pad(values, (0, BIAS_FEATURES)),
    )


def _flash(query: Tensor, keys: Tensor, values: Tensor, scaling: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Flash attention with its log-sum-exp: [B, Hq, T, D] and float32 [B, Hq, T].

    These operators are what `scaled_dot_product_attention` calls; no public function returns the log-sum-exp in every
    version of torch that is supported.
    """
    aten: Any = torch.ops.aten
    if query.is_cuda:
        results = aten._scaled_dot_product_flash_attention(query, keys, values, 0.0, causal, False, scale=scaling)
    else:
        results = aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, 0.0, causal, scale=scaling)
    return results[0], results[1].float()
