"""Who is compared, by name: cache policies, the library as users call it, and retrieval without a memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.policies import POLICIES
from benchmarks.policies.base import Policy
from benchmarks.quality.evaluator import Budget, Evaluator
from benchmarks.quality.product import Product
from benchmarks.quality.reconstruction import Reconstruction
from benchmarks.quality.retrieval_only import RetrievalOnly
from benchmarks.quality.tasks import Item
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.retrieval.passage_search import DEFAULT_TOKENS


class Contender(Protocol):
    """One way to answer questions about what was read. Other settings are methods of the same form."""

    def unknown(self, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Read an item before its questions are known, then ask each of the same state: one line a question."""


@dataclass
class CachePolicy:
    """A cache policy with all settings of the evaluator."""

    evaluator: Evaluator
    policy: Policy

    def unknown(self, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        return self.evaluator.unknown(self.policy, budget, item)

    def turns(self, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        return self.evaluator.turns(self.policy, budget, item)

    def known(self, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        return self.evaluator.known(self.policy, budget, item)

    def summary(self, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        return self.evaluator.summary(self.policy, budget, item)


def contenders(evaluator: Evaluator, retrieval_tokens: int | str = DEFAULT_TOKENS) -> dict[str, Contender]:
    """Return all of them by name. retrieval_tokens: as for `LLM`."""
    own = (
        Product("ours", evaluator, retrieval_tokens=retrieval_tokens),
        Product("ours-cache-alone", evaluator, retrieval_tokens=0),
        Product("cache-alone-without-gate", evaluator, retrieval_tokens=0, gated=False),
        Product("streaming-look-up", evaluator, CacheConfig.streaming, retrieval_tokens),
    )
    policies = {name: CachePolicy(evaluator, policy) for name, policy in POLICIES.items()}
    others = (RetrievalOnly(evaluator), Reconstruction(evaluator), *own)
    return {**policies, **{each.name: each for each in others}}
