"""The policies that the quality benchmarks compare, by name."""

from __future__ import annotations

from benchmarks.policies.attention_based import TOVA, CaM, SnapKV, pyramid
from benchmarks.policies.base import STAGE, ModelFacts, Policy, plain
from benchmarks.policies.key_based import ExpectedAttention, KeyDiff, Knorm, LMInfinite, NestedKV
from benchmarks.policies.least_squares_merging import LeastSquaresMerging
from benchmarks.policies.value_weighted import (
    MaxAttention,
    QuestionAndGeneric,
    ValueWeighted,
    ValueWeightedExpected,
    ValueWeightedMean,
)
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.layer_budgets import PROMPT_STRENGTH

__all__ = ["POLICIES", "ModelFacts", "Policy"]
LOOK_UP_TOKENS = 256
"""Tokens that policies with a look-up read again, whatever the library's default is."""


def _streaming(slots: int) -> CacheConfig:
    return CacheConfig.streaming(slots).replace(stage=STAGE)


def _h2o(slots: int) -> CacheConfig:
    return CacheConfig.h2o(slots).replace(stage=STAGE)


def _cam(slots: int) -> CacheConfig:
    return _h2o(slots).replace(recent=64)


def _paper(slots: int) -> CacheConfig:
    return CacheConfig.paper(slots).replace(stage=STAGE)


def _paper_two(slots: int) -> CacheConfig:
    """As in the paper's Table 2: two residual slots."""
    return _paper(slots).replace(residual=2)


def _alpha_one(slots: int) -> CacheConfig:
    return plain(slots).replace(alpha=1.0)


def _tova(slots: int) -> CacheConfig:
    return plain(slots).replace(sink=0, recent=1)


def _chat(slots: int) -> CacheConfig:
    return CacheConfig(slots=slots, stage=STAGE)


def _passages(slots: int) -> CacheConfig:
    return _chat(slots).replace(observation_window=8)


def _half(slots: int) -> CacheConfig:
    return _passages(slots).replace(passage_share=0.5)


def _pooled(slots: int) -> CacheConfig:
    return _passages(slots).replace(passage_share=0.0)


def _query_agnostic(slots: int) -> CacheConfig:
    return _pooled(slots).query_agnostic()


def _no_history(slots: int) -> CacheConfig:
    return _chat(slots).replace(history_share=0.0)


def _full(slots: int) -> CacheConfig:
    return CacheConfig.full()


_ALL = (
    # Without eviction.
    Policy("full", _full, chunk=2048),
    Policy("full-retrieval", _full, chunk=None, retrieval_tokens=LOOK_UP_TOKENS),
    Policy("truncate", _full, newest_only=True),
    Policy("truncate-retrieval", _full, newest_only=True, retrieval_tokens=LOOK_UP_TOKENS),
    # The field's.
    Policy("streaming", _streaming),
    Policy("streaming-whole", _streaming, chunk=None),
    Policy("lm-infinite", _streaming, LMInfinite),
    Policy("h2o", _h2o),
    Policy("h2o-whole", _h2o, chunk=None),
    Policy("snapkv", plain, lambda _: SnapKV()),
    Policy("snapkv-whole", plain, lambda _: SnapKV(), chunk=None),
    Policy("pyramidkv", plain, lambda _: SnapKV(), layer_weights=pyramid),
    Policy("tova", _tova, lambda _: TOVA()),
    Policy("keydiff", plain, lambda _: KeyDiff()),
    Policy("knorm", plain, lambda _: Knorm()),
    Policy("nestedkv", plain, lambda _: NestedKV()),
    Policy("expected", plain, ExpectedAttention),
    Policy("expected-layer-budgets", plain, ExpectedAttention, layer_budget_strength=1),
    Policy("cam", _cam, lambda _: CaM()),
    # The paper's.
    Policy("paper", _paper),
    Policy("paper-whole", _paper, chunk=None),
    Policy("paper-two-whole", _paper_two, chunk=None),
    # The library's: a question known with its text.
    Policy("zsmerge-question", _passages, probe="question", layer_budget_strength=PROMPT_STRENGTH),
    Policy(
        "zsmerge-question-retrieval",
        _passages,
        probe="question",
        layer_budget_strength=PROMPT_STRENGTH,
        retrieval_tokens=LOOK_UP_TOKENS,
    ),
    Policy("passages-uniform-budgets", _passages, probe="question"),
    Policy("passages-half-layer-budgets", _passages, probe="question", layer_budget_strength=0.5),
    Policy("passages-layer-budgets", _passages, probe="question", layer_budget_strength=1),
    Policy("passages-half", _half, probe="question", layer_budget_strength=1),
    Policy("pooled-question", _pooled, probe="question"),
    Policy("layer-budgets-question", _pooled, probe="question", layer_budget_strength=1),
    Policy("value-weighted-max-question", plain, lambda _: ValueWeighted(), "question", layer_budget_strength=1),
    Policy("value-weighted-mean-question", plain, lambda _: ValueWeightedMean(), "question", layer_budget_strength=1),
    Policy("question-and-generic-max", plain, QuestionAndGeneric, "both", layer_budget_strength=1),
    Policy("question-and-generic-mean", _query_agnostic, probe="both", layer_budget_strength=1),
    # Chats.
    Policy("zsmerge-chat", _chat, probe="question"),
    Policy("zsmerge-chat-retrieval", _chat, probe="question", retrieval_tokens=LOOK_UP_TOKENS),
    Policy("chat-no-history", _no_history, probe="question"),
    Policy("chat-half-layer-budgets", _chat, probe="question", layer_budget_strength=0.5),
    Policy("chat-layer-budgets", _chat, probe="question", layer_budget_strength=1),
    # Documents read before any question is known.
    Policy("zsmerge-layer-budgets", _query_agnostic, probe="generic", layer_budget_strength=1),
    Policy("zsmerge-uniform-budgets", _query_agnostic, probe="generic"),
    Policy(
        "zsmerge-retrieval",
        _query_agnostic,
        probe="generic",
        layer_budget_strength=1,
        retrieval_tokens=LOOK_UP_TOKENS,
        attention_search=True,
    ),
    Policy(
        "zsmerge-passage-search",
        _query_agnostic,
        probe="generic",
        layer_budget_strength=1,
        retrieval_tokens=LOOK_UP_TOKENS,
    ),
    Policy("pooled-generic", _pooled, probe="generic"),
    Policy("layer-budgets-generic", _pooled, probe="generic", layer_budget_strength=1),
    Policy("layer-budgets-generic-whole", _pooled, probe="generic", layer_budget_strength=1, chunk=None),
    Policy("max-attention-generic", plain, lambda _: MaxAttention(), "generic", layer_budget_strength=1),
    Policy("value-weighted-max", plain, lambda _: ValueWeighted(), "generic", layer_budget_strength=1),
    Policy("value-weighted-mean", plain, lambda _: ValueWeightedMean(), "generic", layer_budget_strength=1),
    Policy("value-weighted-expected", plain, ValueWeightedExpected, "generic", layer_budget_strength=1),
    Policy("least-squares-merging", _alpha_one, LeastSquaresMerging, "generic", layer_budget_strength=1),
)
POLICIES = {policy.name: policy for policy in _ALL}
