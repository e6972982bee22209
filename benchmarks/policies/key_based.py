"""Policies that rank tokens by keys and values, by expected attention, or by position."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.policies.base import ModelFacts, ScoredWhenFull
from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.policies.recency import Recency
from zsmerge_llm.kvcache.slots import AttentionInputs


class KeyDiff(ScoredWhenFull):
    """arXiv 2504.15364: keep keys unlike the mean direction."""

    name = "keydiff"

    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        directions = F.normalize(view.keys.float(), dim=-1)
        present = (view.multiplicity > 0)[..., None]
        anchor = (directions * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)
        return -F.cosine_similarity(directions, anchor, dim=-1)


class NestedKV(ScoredWhenFull):
    """After arXiv 2605.26678: keep keys unlike the mean direction of all keys, of their block, or of their neighbours.

    Each head ranks its slots by each of the three, and weighs the ranks by how far the measure spreads. Where one of
    them ranks a slot high, that rank alone counts. Our own reading; a head's budget is not adapted: each has as many.
    """

    name = "nestedkv"
    BLOCK = 128
    NEIGHBOURS = 31
    SURPRISE = 0.9

    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        present = (view.multiplicity > 0).float()
        directions = F.normalize(view.keys.float(), dim=-1) * present[..., None]
        anchors = (self._global(directions), self._of_block(directions), self._of_neighbours(directions))
        unlike = torch.stack([1 - F.cosine_similarity(directions, anchor, dim=-1) for anchor in anchors])
        unlike = unlike.masked_fill(present == 0, -1.0)
        ranks = unlike.argsort(-1).argsort(-1) / max(unlike.shape[-1] - 1, 1)
        count = present.sum(-1).clamp(min=1)
        mean = (unlike * present).sum(-1) / count
        spread = (((unlike - mean[..., None]) * present).square().sum(-1) / count).sqrt()
        weights = spread / spread.sum(0).clamp(min=1e-9)
        mixed, highest = (ranks * weights[..., None]).sum(0), ranks.amax(0)
        return torch.where(highest >= self.SURPRISE, highest, mixed)

    def _global(self, directions: Tensor) -> Tensor:
        """Return the direction of the sum of all: cosine needs no mean."""
        return directions.sum(2, keepdim=True)

    def _of_block(self, directions: Tensor) -> Tensor:
        """Return the same of each slot's block, [B, H, C, D]. Slots stand in the order of their positions."""
        size = directions.shape[2]
        blocks = F.pad(directions, (0, 0, 0, -size % self.BLOCK)).unflatten(2, (-1, self.BLOCK))
        return blocks.sum(3, keepdim=True).expand_as(blocks).flatten(2, 3)[:, :, :size]

    def _of_neighbours(self, directions: Tensor) -> Tensor:
        """Return the same of the slots around each, [B, H, C, D]."""
        lines = directions.mT.flatten(0, 1)  # [B · H, D, C]
        means = F.avg_pool1d(lines, self.NEIGHBOURS, stride=1, padding=self.NEIGHBOURS // 2)
        return means.view_as(directions.mT).mT


class Knorm(ScoredWhenFull):
    """arXiv 2406.11430: keep keys of a small norm."""

    name = "knorm"

    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        return -view.keys.float().norm(dim=-1)


class ExpectedAttention(ScoredWhenFull):
    """Expected Attention (kvpress): take queries to come for Gaussian, with the chunk's mean μ and covariance Σ.

    The rotation is averaged over the next 512 positions. Score: (softmax of k μ + k Σ k / 2, plus ε) · ‖value‖.
    """

    name = "expected"
    FUTURE = 512
    EPSILON = 0.02

    def __init__(self, facts: ModelFacts) -> None:
        self.rotation = facts.rotation

    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        return (self.expected(view, inputs) + self.EPSILON) * view.values.float().norm(dim=-1)

    def expected(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        """Return the expected attention of queries to come, mean over the group: float32 [B, H, C]."""
        assert self.rotation is not None
        batch, heads, new, dim = inputs.queries.shape
        still = self.rotation.rotate(inputs.queries.float(), -inputs.positions[:, None])  # without rotation
        still = still[:, :, 4:] if new > 8 else still  # sinks are no typical queries
        mean = still.mean(2)  # [B, Hq, D]
        centred = still - mean[:, :, None]
        covariance = centred.mT @ centred / still.shape[2]
        turn = self._mean_rotation(inputs.seen[0], dim)
        mean, covariance = mean @ turn.T, turn @ covariance @ turn.T
        group = heads // view.keys.shape[1]
        keys = view.keys.float().repeat_interleave(group, dim=1)
        scale = view.spec.scale
        logits = scale * (keys @ mean[..., None])[..., 0]
        logits = logits + scale**2 * torch.einsum("bhcd,bhde,bhce->bhc", keys, covariance, keys) / 2
        logits = logits.masked_fill((view.multiplicity == 0).repeat_interleave(group, dim=1), float("-inf"))
        return logits.softmax(-1).view(batch, -1, group, logits.shape[-1]).mean(2)

    def _mean_rotation(self, seen: Tensor, dim: int) -> Tensor:
        """Return the mean of the rotations to the next positions, [D, D]."""
        assert self.rotation is not None
        ahead = seen + torch.arange(self.FUTURE, device=seen.device)
        unit = torch.eye(dim, device=seen.device)[None].expand(self.FUTURE, -1, -1)
        return self.rotation.rotate(unit, ahead[:, None].expand(-1, dim)).mean(0).T


class LMInfinite(Recency):
    """arXiv 2308.16137: keep sinks and newest tokens; no key is ever further away than `slots` positions.

    The sinks' keys are rotated towards the newest tokens before each compression. Their scores, which recency leaves
    free, hold how far they have been moved.
    """

    name = "lm-infinite"

    def __init__(self, facts: ModelFacts) -> None:
        self.rotation = facts.rotation

    def observe(self, view: KVView, inputs: AttentionInputs) -> None:
        """Move the sinks' keys where a row is compressed next."""
        if not any(view.layer.rows_due(inputs)):
            return
        assert self.rotation is not None
        sinks = slice(0, view.config.sink)
        moved = view.score[:, :, sinks]
        wanted = (inputs.seen.float() - (view.config.slots or 0)).clamp(min=0)[:, None, None]
        view.keys[:, :, sinks] = self.rotation.rotate(view.keys[:, :, sinks], wanted - moved)
        view.score[:, :, sinks] = wanted
