"""Variants of the library's rule: the largest attention of a query probe so far, times the value norm."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.policies.base import ModelFacts, ScoredWhenFull, asking_queries, attention_mass
from benchmarks.policies.key_based import ExpectedAttention
from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.slots import AttentionInputs


class MaxAttention(ScoredWhenFull):
    """Rank by the maximum attention that any query of the probe, in any head of the group, has ever given."""

    name = "max-attention"
    uses_probe = True

    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        _, most = attention_mass(view, inputs, *asking_queries(inputs))
        return torch.maximum(view.score, most)


class ValueWeighted(ScoredWhenFull):
    """Rank by (a + ε) · ‖value‖, a the largest attention so far: the probe's maximum over queries and group."""

    name = "value-weighted-max"
    uses_probe = True
    EPSILON = 0.02

    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        size = view.values.float().norm(dim=-1).clamp(min=1e-6)
        before = (view.score / size - self.EPSILON).clamp(min=0)
        return (torch.maximum(before, self.attention(view, inputs)) + self.EPSILON) * size

    def attention(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        """Return the attention to each slot now, float32 [B, H, C]."""
        return attention_mass(view, inputs, *asking_queries(inputs))[1]


class ValueWeightedMean(ValueWeighted):
    """`ValueWeighted` by the mean over queries and group."""

    name = "value-weighted-mean"

    def attention(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        return attention_mass(view, inputs, *asking_queries(inputs))[0]


class QuestionAndGeneric(ValueWeighted):
    """`ValueWeightedMean` by the larger of a generic probe's attention and that of the question behind it."""

    name = "question-and-generic-max"

    def __init__(self, facts: ModelFacts) -> None:
        self.generic_tokens = facts.generic_tokens

    def attention(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        queries, positions = asking_queries(inputs)
        split = self.generic_tokens
        parts = ((queries[:, :, :split], positions[:, :split]), (queries[:, :, split:], positions[:, split:]))
        means = [attention_mass(view, inputs, *part)[0] for part in parts if part[0].shape[2]]
        return torch.stack(means).amax(0)


class ValueWeightedExpected(ValueWeighted):
    """`ValueWeighted` by the larger of the probe's attention and Expected Attention."""

    name = "value-weighted-expected"

    def __init__(self, facts: ModelFacts) -> None:
        self.expected_attention = ExpectedAttention(facts)

    def attention(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        return torch.maximum(super().attention(view, inputs), self.expected_attention.expected(view, inputs))
