"""The policies that quality.py compares, by name. Each is a few lines on one seam (`policies.base`)."""

from __future__ import annotations

from benchmarks.policies.attention_based import TOVA, CaM, SnapKV, pyramid
from benchmarks.policies.base import STAGE, Policy, plain, probed, rope_of
from benchmarks.policies.by_head import ByHead, ByHeadShare
from benchmarks.policies.fitted import Fitted
from benchmarks.policies.key_based import ExpectedAttention, KeyDiff, Knorm, LMInfinite
from benchmarks.policies.ours import BothMax, MostlyValued, Sharpest, Valued, ValuedExpected, ValuedMean
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.layer_budgets import KNOWN
from zsmerge_llm.retrieval.passage_search import TOKENS

__all__ = ["POLICIES", "Policy", "rope_of"]


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


def _fitted(slots: int) -> CacheConfig:
    return probed(slots).replace(alpha=1.0)


def _tova(slots: int) -> CacheConfig:
    return plain(slots).replace(sink=0, recent=1)


def _pooled(slots: int) -> CacheConfig:
    return CacheConfig(slots=slots, stage=STAGE, observation_window=8, passage_share=0.0)


def _passages(slots: int) -> CacheConfig:
    return CacheConfig(slots=slots, stage=STAGE, observation_window=8)


def _half(slots: int) -> CacheConfig:
    return _passages(slots).replace(passage_share=0.5)


def _chat(slots: int) -> CacheConfig:
    return CacheConfig(slots=slots, stage=STAGE)


def _asked(slots: int) -> CacheConfig:
    return _chat(slots).replace(history_share=0.0)


def _ahead(slots: int) -> CacheConfig:
    return _pooled(slots).query_agnostic()


def _full(slots: int) -> CacheConfig:
    return CacheConfig.full()


_ALL = (
    Policy("full", _full, chunk=None),
    Policy("truncate", _full, newest_only=True),
    Policy("full-retrieval", _full, chunk=None, retrieval_tokens=TOKENS),
    Policy("truncate-retrieval", _full, newest_only=True, retrieval_tokens=TOKENS),
    Policy("streaming", _streaming),
    Policy("lm-infinite", _streaming, LMInfinite),
    Policy("h2o", _h2o),
    Policy("snapkv", plain, SnapKV),
    Policy("snapkv-whole", plain, SnapKV, chunk=None),
    Policy("pyramidkv", plain, SnapKV, budgets=pyramid),
    Policy("tova", _tova, TOVA),
    Policy("keydiff", plain, KeyDiff),
    Policy("knorm", plain, Knorm),
    Policy("expected", plain, ExpectedAttention),
    Policy("cam", _cam, CaM),
    Policy("paper", _paper),
    Policy("paper-whole", _paper, chunk=None),
    Policy("paper-two-whole", _paper_two, chunk=None),
    Policy("streaming-whole", _streaming, chunk=None),
    Policy("h2o-whole", _h2o, chunk=None),
    Policy("zsmerge-question", _passages, probe="question", profiled=KNOWN),
    Policy("passages-half-layer-budgets", _passages, probe="question", profiled=0.5),
    Policy("passages-layer-budgets", _passages, probe="question", profiled=1),
    Policy("passages-uniform-budgets", _passages, probe="question"),
    Policy("passages-half", _half, probe="question", profiled=1),
    Policy("pooled-question", _pooled, probe="question"),
    Policy("zsmerge-question-retrieval", _passages, probe="question", profiled=KNOWN, retrieval_tokens=TOKENS),
    Policy("zsmerge-chat", _chat, probe="question"),
    Policy("zsmerge-chat-retrieval", _chat, probe="question", retrieval_tokens=TOKENS),
    Policy("chat-no-history", _asked, probe="question"),
    Policy("chat-half-layer-budgets", _chat, probe="question", profiled=0.5),
    Policy("chat-layer-budgets", _chat, probe="question", profiled=1),
    Policy("zsmerge-uniform-budgets", _ahead, probe="generic"),
    Policy("pooled-generic", _pooled, probe="generic"),
    Policy("zsmerge-layer-budgets", _ahead, probe="generic", profiled=1),
    Policy("zsmerge-retrieval", _ahead, probe="generic", profiled=1, retrieval_tokens=TOKENS, glance=True),
    Policy("zsmerge-passage-search", _ahead, probe="generic", profiled=1, retrieval_tokens=TOKENS),
    Policy("per-head-budgets", _ahead, ByHead, probe="generic", profiled=1),
    Policy("per-head-budgets-normalized", _ahead, ByHeadShare, probe="generic", profiled=1),
    Policy("layer-budgets-question", _pooled, probe="question", profiled=1),
    Policy("layer-budgets-generic", _pooled, probe="generic", profiled=1),
    Policy("layer-budgets-generic-whole", _pooled, probe="generic", profiled=1, chunk=None),
    Policy("max-attention-generic", probed, Sharpest, probe="generic", profiled=1),
    Policy("value-weighted-max", probed, Valued, probe="generic", profiled=1),
    Policy("value-weighted-max-question", probed, Valued, probe="question", profiled=1),
    Policy("value-weighted-mean", probed, ValuedMean, probe="generic", profiled=1),
    Policy("least-squares-merging", _fitted, Fitted, probe="generic", profiled=1),
    Policy("value-weighted-mean-question", probed, ValuedMean, probe="question", profiled=1),
    Policy("value-weighted-norm", probed, MostlyValued, probe="generic", profiled=1),
    Policy("value-weighted-expected", probed, ValuedExpected, probe="generic", profiled=1),
    Policy("question-and-generic-max", probed, BothMax, probe="both", profiled=1),
    Policy("question-and-generic-mean", _ahead, probe="both", profiled=1),
    Policy("h2o-layer-budgets", _h2o, profiled=1),
    Policy("expected-layer-budgets", plain, ExpectedAttention, profiled=1),
)
POLICIES = {policy.name: policy for policy in _ALL}
