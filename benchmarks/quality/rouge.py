"""ROUGE-1, ROUGE-2 and ROUGE-L as F1 over lower-case words, without stemming."""

from __future__ import annotations

import re
from collections import Counter


def rouge(written: str, reference: str) -> dict[str, float]:
    """Return {"rouge1", "rouge2", "rougeL"}, each between 0 and 1."""
    own, gold = (re.findall(r"[a-z0-9]+", text.lower()) for text in (written, reference))
    common = {f"rouge{n}": _overlap(_grams(own, n), _grams(gold, n)) for n in (1, 2)}
    return {**common, "rougeL": _f1(_longest(own, gold), len(own), len(gold))}


def _grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _overlap(own: Counter[tuple[str, ...]], gold: Counter[tuple[str, ...]]) -> float:
    return _f1((own & gold).total(), own.total(), gold.total())


def _longest(own: list[str], gold: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(gold) + 1)
    for word in own:
        before = row[:]
        for at, other in enumerate(gold):
            row[at + 1] = before[at] + 1 if word == other else max(row[at], before[at + 1])
    return row[-1]


def _f1(shared: int, own: int, gold: int) -> float:
    return round(2 * shared / (own + gold), 4) if shared else 0.0
