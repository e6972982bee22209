"""Eviction policies, one file each. `CacheConfig.policy` names one of them, or is an `EvictionPolicy` object."""

from __future__ import annotations

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.kvcache.policies.base import EvictionPolicy, RankingContext
from zsmerge_llm.kvcache.policies.cumulative_attention import CumulativeAttention
from zsmerge_llm.kvcache.policies.observation_window import ObservationWindow
from zsmerge_llm.kvcache.policies.recency import Recency

__all__ = ["BUILT_IN", "CumulativeAttention", "EvictionPolicy", "ObservationWindow", "RankingContext", "Recency"]

BUILT_IN: dict[str, EvictionPolicy] = {
    policy.name: policy for policy in (ObservationWindow(), CumulativeAttention(), Recency())
}


def policy_of(config: CacheConfig) -> EvictionPolicy:
    """Return the policy object of a configuration."""
    return BUILT_IN[config.policy] if isinstance(config.policy, str) else config.policy
