"""Algorithm 1 of ZSMerge for one KV head, one token at a time, in plain Python lists: the oracle for the tensor code.

Written from the paper alone; slow on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


@dataclass
class Slot:
    key: list[float]
    value: list[float]
    position: int
    count: float = 1.0
    score: float = 0.0


@dataclass
class NaiveHead:
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
        """One token: append, attend (one output per query of the group), score, evict, merge."""
        self.kept.append(Slot(key, value, self.seen))
        self.seen += 1
        slots = self.merged + self.kept
        outputs, paid = [], [0.0] * len(slots)
        for query in queries:
            logits = [scaling * dot(query, s.key) + self.alpha * math.log(s.count) for s in slots]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            weights = [w / sum(weights) for w in weights]
            paid = [p + w for p, w in zip(paid, weights, strict=True)]
            outputs.append(
                [sum(w * s.value[d] for w, s in zip(weights, slots, strict=True)) for d in range(len(value))]
            )
        for slot, share in zip(slots, paid, strict=True):
            slot.score = self.decay * slot.score + share
        if len(self.kept) > self.sink + self.context + self.recent:
            self.evict()
        return outputs

    def evict(self) -> None:
        newest = self.seen - self.recent
        candidates = [s for s in self.kept if self.sink <= s.position < newest]
        loser = min(candidates, key=lambda s: s.score)
        self.kept.remove(loser)
        if len(self.merged) < self.residual:
            self.merged.append(loser)
        elif self.residual:
            home = max(self.merged, key=lambda s: dot(s.key, loser.key))
            w = home.count
            home.key = [(w * a + b) / (w + 1) for a, b in zip(home.key, loser.key, strict=True)]
            home.value = [(w * a + b) / (w + 1) for a, b in zip(home.value, loser.value, strict=True)]
            home.count = w + 1
