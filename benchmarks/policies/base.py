"""What the benchmarks compare: a cache configuration, an eviction policy, and how a text is read with it.

A policy of the field is an `EvictionPolicy` of a few lines. All else (static slots, sinks, recent window, eviction) is
the library's own cache, so policies differ in their rule alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.equations import slot_bias
from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.policies.base import EvictionPolicy, RankingContext
from zsmerge_llm.kvcache.rope import Rotation
from zsmerge_llm.kvcache.scoring import TensorScoring
from zsmerge_llm.kvcache.slots import AttentionInputs, LayerSpec
from zsmerge_llm.retrieval.selection import RetrievalTokens

STAGE = 128
CHUNK = 512


@dataclass(frozen=True)
class ModelFacts:
    """What policies may need to know of the model.

    rotation: of its keys by position, None where it has none or several. generic_tokens: length of the generic probe.
    """

    rotation: Rotation | None = None
    generic_tokens: int = 0

    @classmethod
    def of(cls, engine: Engine, generic_tokens: int = 0) -> ModelFacts:
        """Return an engine's facts, for models that rotate halves of a head as Llama and Qwen do."""
        base = getattr(engine.model, "model", None)
        frequencies = getattr(getattr(base, "rotary_emb", None), "inv_freq", None)
        return cls(None if frequencies is None else Rotation(frequencies.double().cpu()), generic_tokens)


class ScoredWhenFull(EvictionPolicy):
    """Score all slots anew each time a layer compresses."""

    observes_every_pass = False

    def observe(self, view: KVView, inputs: AttentionInputs) -> None:
        """Replace the scores of the slots where a row is compressed next."""
        if any(view.layer.rows_due(inputs)):
            view.score.copy_(self.scores(view, inputs))

    @abstractmethod
    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        """Return the score of each slot, float32 [B, H, C]."""

    def rank(self, view: KVView, context: RankingContext) -> Tensor:
        """Return the scores, float32 [B, H, C]."""
        return view.score


def attention_mass(view: KVView, inputs: AttentionInputs, queries: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and maximum attention of queries [B, Hq, m, D] at positions [B, m] to slots: float32 [B, H, C]."""
    bias = slot_bias(view.multiplicity, view.config.alpha)
    return TensorScoring().attention_mass(queries, positions, view.keys, bias, view.position, view.spec, inputs.sinks)


def asking_queries(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Return the probe's queries and positions, or those of the newest 32 tokens where there is no probe."""
    if inputs.probe_queries is not None and inputs.probe_positions is not None:
        return inputs.probe_queries, inputs.probe_positions
    return inputs.queries[:, :, -32:], inputs.positions[:, -32:]


@dataclass(frozen=True)
class Policy:
    """How a cache is configured and filled.

    Attributes:
        config: makes the configuration, from the mean number of slots per layer.
        eviction: makes the eviction policy, from the model's facts; None: the configuration's own.
        probe: whose attention decides, given to the engine; "both" is a question behind a generic probe.
        chunk: tokens per forward pass. None: everything in one pass, compressed afterwards, as policies need that rank
            a finished prefill.
        layer_weights: slots of each full-attention layer in proportion, from the mean and the number of these layers.
        layer_budget_strength: how far the layers' slots follow the model's measured layer budgets; 1 is wholly.
        newest_only: whether the text is truncated to its end instead.
        retrieval_tokens: tokens of passages that are read again before a question (`PassageSearch`).
        attention_search: whether the cache is asked where the word search finds nothing (`AttentionSearch`).
    """

    name: str
    config: Callable[[int], CacheConfig]
    eviction: Callable[[ModelFacts], EvictionPolicy] | None = None
    probe: Literal["question", "generic", "both"] | None = None
    chunk: int | None = CHUNK
    layer_weights: Callable[[int, int], Sequence[float]] | None = None
    layer_budget_strength: float = 0.0
    newest_only: bool = False
    retrieval_tokens: RetrievalTokens = 0
    attention_search: bool = False

    @property
    def needs_full_cache(self) -> bool:
        """Whether the full cache exists before anything is dropped."""
        return self.chunk is None or self.config(1024).slots is None

    def with_layer_budgets(self, budgets: Sequence[float]) -> Policy:
        """Return this policy with the model's layer budgets (mean 1), as far as it follows them."""
        if not self.layer_budget_strength:
            return self
        weights = [1 + self.layer_budget_strength * (budget - 1) for budget in budgets]
        return replace(self, layer_weights=lambda slots, layers: weights)

    def new_cache(self, specs: Sequence[LayerSpec], slots: int, facts: ModelFacts | None = None) -> Cache:
        """Return an empty cache of `slots` per layer on average, compressed by this policy."""
        config = self.config(slots)
        if self.eviction is not None:
            config = config.replace(policy=self.eviction(facts or ModelFacts()))
        if self.layer_weights is not None:
            weights = self.layer_weights(slots, sum(spec.window is None for spec in specs))
            config = config.replace(layer_budgets=tuple(weight * len(weights) / sum(weights) for weight in weights))
        return Cache(config, specs)

    def nbytes(self, specs: Sequence[LayerSpec], slots: int) -> int:
        """Return the bytes of this policy's cache of `slots`: keys, values, scores, positions, recorded queries."""
        nowhere = [replace(spec, device=torch.device("meta")) for spec in specs]
        return self.new_cache(nowhere, slots).nbytes

    def slots_for(self, specs: Sequence[LayerSpec], budget: int) -> int:
        """Return the most slots that fit into `budget` bytes."""
        low, high = 8, 1 << 20
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(specs, middle, budget) else (low, middle)
        return low

    def _fits(self, specs: Sequence[LayerSpec], slots: int, budget: int) -> bool:
        slot = sum(spec.kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize for spec in specs)
        return slots * slot <= budget and self.nbytes(specs, slots) <= budget


def plain(slots: int) -> CacheConfig:
    """Return `slots` slots and a stage, without recorded queries: for rules that score when a layer compresses."""
    return CacheConfig(slots=slots, policy="cumulative_attention", stage=STAGE)
