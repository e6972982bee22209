"""The policies that quality.py compares, by name. Each is a few lines on one seam (`policies.base`)."""

from __future__ import annotations

from policies.attention_based import TOVA, CaM, SnapKV, pyramid
from policies.base import STAGE, Policy, plain, probed, rope_of
from policies.by_head import ByHead, ByHeadShare
from policies.fitted import Fitted
from policies.key_based import ExpectedAttention, KeyDiff, Knorm, LMInfinite
from policies.ours import BothMax, MostlyValued, Sharpest, Valued, ValuedExpected, ValuedMean
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.layer_budgets import KNOWN
from zsmerge_llm.retrieval.passage_search import DEFAULT_TOKENS

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
    Policy("full-recall", _full, chunk=None, retrieval_tokens=DEFAULT_TOKENS),
    Policy("truncate-recall", _full, newest_only=True, retrieval_tokens=DEFAULT_TOKENS),
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
    Policy("ours-question", _passages, probe="question", profiled=KNOWN),
    Policy("passages-half-profile", _passages, probe="question", profiled=0.5),
    Policy("passages-profile", _passages, probe="question", profiled=1),
    Policy("passages-uniform", _passages, probe="question"),
    Policy("passages-half", _half, probe="question", profiled=1),
    Policy("pooled-question", _pooled, probe="question"),
    Policy("ours-question-recall", _passages, probe="question", profiled=KNOWN, retrieval_tokens=DEFAULT_TOKENS),
    Policy("ours-chat", _chat, probe="question"),
    Policy("ours-chat-recall", _chat, probe="question", retrieval_tokens=DEFAULT_TOKENS),
    Policy("chat-asked", _asked, probe="question"),
    Policy("chat-half", _chat, probe="question", profiled=0.5),
    Policy("chat-profile", _chat, probe="question", profiled=1),
    Policy("ours-generic", _ahead, probe="generic"),
    Policy("pooled-generic", _pooled, probe="generic"),
    Policy("ours-profile", _ahead, probe="generic", profiled=1),
    Policy("ours-recall", _ahead, probe="generic", profiled=1, retrieval_tokens=DEFAULT_TOKENS, glance=True),
    Policy("ours-words", _ahead, probe="generic", profiled=1, retrieval_tokens=DEFAULT_TOKENS),
    Policy("by-head", _ahead, ByHead, probe="generic", profiled=1),
    Policy("by-head-share", _ahead, ByHeadShare, probe="generic", profiled=1),
    Policy("profile-question", _pooled, probe="question", profiled=1),
    Policy("profile-generic", _pooled, probe="generic", profiled=1),
    Policy("profile-generic-whole", _pooled, probe="generic", profiled=1, chunk=None),
    Policy("sharpest-generic", probed, Sharpest, probe="generic", profiled=1),
    Policy("valued-generic", probed, Valued, probe="generic", profiled=1),
    Policy("valued-question", probed, Valued, probe="question", profiled=1),
    Policy("valued-mean", probed, ValuedMean, probe="generic", profiled=1),
    Policy("fitted", _fitted, Fitted, probe="generic", profiled=1),
    Policy("valued-mean-question", probed, ValuedMean, probe="question", profiled=1),
    Policy("valued-more", probed, MostlyValued, probe="generic", profiled=1),
    Policy("valued-expected", probed, ValuedExpected, probe="generic", profiled=1),
    Policy("both-max", probed, BothMax, probe="both", profiled=1),
    Policy("both-mean", _ahead, probe="both", profiled=1),
    Policy("profile-h2o", _h2o, profiled=1),
    Policy("profile-expected", plain, ExpectedAttention, profiled=1),
)
POLICIES = {policy.name: policy for policy in _ALL}
