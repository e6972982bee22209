"""Keep sinks and the newest tokens (StreamingLLM, arXiv 2309.17453); also what a sliding-window layer keeps."""

from __future__ import annotations

from torch import Tensor

from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.policies.base import EvictionPolicy, RankingContext


class Recency(EvictionPolicy):
    """Rank slots by position: the oldest goes first."""

    name = "recency"
    observes_every_pass = False
    capturable = True

    def rank(self, view: KVView, context: RankingContext) -> Tensor:
        """Return the positions, float32 [B, H, C]."""
        return view.position.float()
