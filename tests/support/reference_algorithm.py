"""Algorithm 1 of ZSMerge for one KV head, token by token, in plain Python lists: the reference for the tensor code.

Written from the paper alone; slow on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@dataclass
class Slot:
    """One token, or the mean of `multiplicity` merged tokens."""

    key: list[float]
    value: list[float]
    position: int
    multiplicity: float = 1.0
    score: float = 0.0


@dataclass
class ReferenceHead:
    """The cache of one KV head: slots of single tokens (`kept`) and residual slots (`merged`)."""

    sink: int
    context: int
    recent: int
    residual: int
    alpha: float
    decay: float
    kept: list[Slot] = field(default_factory=list)
    merged: list[Slot] = field(default_factory=list)
    seen: int = 0

    def step(
        self, queries: list[list[float]], key: list[float], value: list[float], scaling: float
    ) -> list[list[float]]:
        """Append one token, attend (one output per query of the group), score, evict and merge."""
        self.kept.append(Slot(key, value, self.seen))
        self.seen += 1
        slots = self.merged + self.kept
        outputs, attention_mass = [], [0.0] * len(slots)
        for query in queries:
            logits = [scaling * dot(query, s.key) + self.alpha * math.log(s.multiplicity) for s in slots]
            maximum = max(logits)
            weights = [math.exp(x - maximum) for x in logits]
            weights = [w / sum(weights) for w in weights]
            attention_mass = [m + w for m, w in zip(attention_mass, weights, strict=True)]
            outputs.append(
                [sum(w * s.value[d] for w, s in zip(weights, slots, strict=True)) for d in range(len(value))]
            )
        for slot, mass in zip(slots, attention_mass, strict=True):
            slot.score = self.decay * slot.score + mass
        if len(self.kept) > self.sink + self.context + self.recent:
            self.evict()
        return outputs

    def evict(self) -> None:
        """Evict the slot of the lowest score; merge it into an unused residual slot, or into the most similar one."""
        newest = self.seen - self.recent
        candidates = [s for s in self.kept if self.sink <= s.position < newest]
        evicted = min(candidates, key=lambda s: s.score)
        self.kept.remove(evicted)
        if len(self.merged) < self.residual:
            self.merged.append(evicted)
        elif self.residual:
            nearest = max(self.merged, key=lambda s: dot(s.key, evicted.key))
            w = nearest.multiplicity
            nearest.key = [(w * a + b) / (w + 1) for a, b in zip(nearest.key, evicted.key, strict=True)]
            nearest.value = [(w * a + b) / (w + 1) for a, b in zip(nearest.value, evicted.value, strict=True)]
            nearest.multiplicity = w + 1
