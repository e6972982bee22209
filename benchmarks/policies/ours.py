"""Readers that ask: variants of the product's rule, measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.policies.base import RankedLayer
from benchmarks.policies.key_based import ExpectedAttention
from zsmerge_llm.kvcache.view import AttentionInputs, KVView


class Sharpest(RankedLayer):
    """A slot is worth the most that any query of the probe, in any head of the group, ever paid it: no mean, no
    pooling over neighbours."""

    def rank(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        return torch.maximum(held.score, self.asked_by_probe(held, arrival).amax((2, 3)))


class Valued(RankedLayer):
    """(a + ε) · |v|, where a is the most the probe's queries ever paid, in any head of the group."""

    EPSILON = 0.02

    def rank(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        size = held.values.float().norm(dim=-1).clamp(min=1e-6)
        before = (held.score / size - self.EPSILON).clamp(min=0)
        return (torch.maximum(before, self.attention(held, arrival)) + self.EPSILON) * size

    def attention(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        """float32 [B, H, C]: what each slot is paid now."""
        return self.asked_by_probe(held, arrival).amax((2, 3))


class ValuedMean(Valued):
    """`Valued` by the mean over queries and group."""

    def attention(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        return self.asked_by_probe(held, arrival).mean((2, 3))


class MostlyValued(Valued):
    """`Valued` with a larger share for the norm alone."""

    EPSILON = 0.1


class BothMax(ValuedMean):
    """`ValuedMean` by the larger of what a generic probe pays, the first `generic` tokens of it, and what a question
    behind it does: what comes after this question is thought of too."""

    def attention(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        paid = self.asked_by_probe(held, arrival)
        parts = (paid[:, :, :, : self.generic], paid[:, :, :, self.generic :])
        return torch.stack([part.mean((2, 3)) for part in parts if part.shape[3]]).amax(0)


class ValuedExpected(Valued, ExpectedAttention):
    """`Valued`, where a is also what queries like the chunk's are expected to pay."""

    def attention(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        return torch.maximum(super().attention(held, arrival), self.expected(held, arrival))
