"""Small cache configurations of every kind, which compress often."""

from __future__ import annotations

from zsmerge_llm.config import CacheConfig

SMALL_PRESETS = {
    "default": CacheConfig(slots=32, recent=8, stage=8, observation_window=6),
    "residual": CacheConfig(slots=32, recent=8, stage=4, residual=3),
    "paper": CacheConfig.paper(32),
    "h2o": CacheConfig.h2o(32),
    "streaming": CacheConfig.streaming(32).replace(stage=6),
    "full": CacheConfig.full(),
}
EVERY_LAYER_ITS_BUDGET = CacheConfig(slots=32, recent=4, stage=4, layer_budgets=(1.3, 0.7))
