"""Attention in float32, the reference for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""Relative error that rounding to a dtype may cause."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the error's norm relative to that of the expected values."""
    return float((actual.float() - expected).norm() / expected.norm().clamp(min=1e-9))


def reference_attention(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attend in one row: query [Hq, T, D], keys and values [H, C, D], bias [H, T, C] → float32 [Hq, T, D]."""
    heads, group = len(keys), len(query) // len(keys)
    grouped = query.float().view(heads, group, *query.shape[1:])
    logits = torch.einsum("hgtd,hcd->hgtc", grouped, keys.float()) * scaling
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logits = logits + bias[:, None]
    if sinks is not None:
        column = sinks.view(heads, group, 1, 1).expand(-1, -1, logits.shape[2], 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1)[..., : keys.shape[1]]
    return torch.einsum("hgtc,hcd->hgtd", weights, values.float()).flatten(0, 1)
