"""Policies that rank tokens by keys and values, or by the attention queries are expected to pay."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.policies.base import PolicyLayer, RankedLayer
from zsmerge_llm.kvcache.view import AttentionInputs, KVView


class KeyDiff(RankedLayer):
    """arXiv 2504.15364: keys unlike the mean direction stay."""

    def rank(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        directions = F.normalize(held.keys.float(), dim=-1)
        present = (held.count > 0)[..., None]
        anchor = (directions * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)
        return -F.cosine_similarity(directions, anchor, dim=-1)


class Knorm(RankedLayer):
    """arXiv 2406.11430: keys of a small norm stay."""

    def rank(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        return -held.keys.float().norm(dim=-1)


class ExpectedAttention(RankedLayer):
    """Expected Attention (kvpress): queries to come are taken for Gaussian, with the chunk's mean and covariance and
    the rotation averaged over the next 512 positions; exp(k μ + k Σ k / 2), normalised, times the norm of the value."""

    FUTURE = 512
    EPSILON = 0.02

    def rank(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        return (self.expected(held, arrival) + self.EPSILON) * held.values.float().norm(dim=-1)

    def expected(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        """float32 [B, H, C]: the attention that queries to come are expected to pay, mean over the group."""
        assert self.rope is not None
        batch, heads, new, dim = arrival.queries.shape
        still = self.rope.rotate(arrival.queries, -arrival.position[:, None])  # without rotation
        still = still[:, :, 4:] if new > 8 else still  # sinks are no typical queries
        mean = still.mean(2)  # [B, Hq, D]
        centred = still - mean[:, :, None]
        covariance = centred.mT @ centred / still.shape[2]
        turn = self._mean_rotation(arrival.seen[0], dim)
        mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
        group = heads // held.keys.shape[1]
        keys = held.keys.float().repeat_interleave(group, dim=1)
        scale = dim**-0.5 if self.spec.scaling is None else self.spec.scaling
        logits = scale * (keys @ mean[..., None])[..., 0]
        logits = logits + scale**2 * torch.einsum("bhcd,bhde,bhce->bhc", keys, covariance, keys) / 2
        logits = logits.masked_fill((held.count == 0).repeat_interleave(group, dim=1), float("-inf"))
        return logits.softmax(-1).view(batch, -1, group, logits.shape[-1]).mean(2)

    def _mean_rotation(self, seen: Tensor, dim: int) -> Tensor:
        """[D, D]: the mean of the rotations to the next positions."""
        assert self.rope is not None
        ahead = seen + torch.arange(self.FUTURE, device=self.rope.frequencies.device)
        unit = torch.eye(dim, device=ahead.device)[None].expand(self.FUTURE, -1, -1)
        return self.rope.rotate(unit, ahead[:, None].expand(-1, dim)).mean(0).T


class LMInfinite(PolicyLayer):
    """arXiv 2308.16137: sinks and newest tokens, where no key ever looks further away than `slots` positions."""

    moved = 0

    def _compress(
        self, held: KVView, full: list[bool], seen: Tensor, passages: Tensor | None = None, fresh: int = 0
    ) -> None:
        super()._compress(held, full, seen, passages, fresh)
        assert self.rope is not None
        assert self.config.slots is not None
        sinks = slice(0, self.config.sink)
        by = max(0, int(seen[0]) - self.config.slots) - self.moved
        keys = self.rope.rotate(self.keys[:, :, sinks], torch.tensor([by], device=self.keys.device))
        self.keys[:, :, sinks] = keys.to(self.keys.dtype)
        self.moved += by
