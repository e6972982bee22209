"""A layer's gate: predict how much attention slots will get from questions that are not known yet, from what they hold.

A linear function for each KV head, trained on the model's own attention (`engine.gate_training`), after KVzap (arXiv
2601.07891), which reads hidden states. This one reads what is in the cache: values, and what no rotation to another
position changes of keys. So it can score any slot at any time, and needs no hook in the model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST = 1e-6
"""Norms are at least this before their logarithm is taken."""


@dataclass(frozen=True, eq=False)
class Gate:
    """The gate of one layer's KV heads.

    weight: float32 [H, F], of `features`. bias: float32 [H]. pairs: int64 [2, P], the dimensions of a key that its
    position rotates together.
    """

    weight: Tensor
    bias: Tensor
    pairs: Tensor

    def attention(self, keys: Tensor, values: Tensor) -> Tensor:
        """Predict the most attention that any token of a question pays each slot: float32 [B, H, C], at most 1.

        keys, values: [B, H, C, D].
        """
        scores = torch.einsum("bhcf,hf->bhc", features(keys, values, self.pairs), self.weight)
        return (scores + self.bias[:, None]).exp().clamp(max=1)

    def to(self, device: torch.device) -> Gate:
        """Return the gate on a device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in ("weight", "bias", "pairs")})


def features(keys: Tensor, values: Tensor, pairs: Tensor) -> Tensor:
    """Return what a gate knows of slots: float32 [..., F].

    That is the value, the logarithm of its norm, and of each pair of the key its norm and the logarithm of it.

    keys, values: [..., D]. pairs: as in `Gate`.
    """
    values = values.float()
    lengths = torch.hypot(keys[..., pairs[0]].float(), keys[..., pairs[1]].float())
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return torch.cat([values, _log(norm), lengths, _log(lengths)], dim=-1)


def num_features(value_dim: int, num_pairs: int) -> int:
    """Return F, the features of one slot."""
    return value_dim + 1 + 2 * num_pairs


def _log(norms: Tensor) -> Tensor:
    return norms.clamp(min=SMALLEST).log()
