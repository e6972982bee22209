"""RULER's needles in a haystack: keys with values between noise, a book's sentences, or other needles."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal

from benchmarks.quality.sources import Record, Sources, distinct, enumerated, fit, insert_at_random, random_uuid

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@dataclass(frozen=True)
class NeedleTask:
    """One of the eight variants.

    Attributes:
        haystack: what the needles lie in: one repeated line, sentences of a book, or needles like them.
        keys, values: what needles are about, and what they tell.
        num_keys: of needles in a haystack of another kind. num_values: needles of each key.
        num_queries: keys that one question asks for.
    """

    haystack: Literal["noise", "essay", "needles"]
    keys: Literal["words", "uuids"] = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    def record(self, sources: Sources, seed: str, tokens: int, questions: int) -> Record:
        """Return a text of so many tokens and at most so many questions about it."""
        return fit(lambda size: self._build(sources, Random(seed), size, questions), tokens, sources.count)

    def _build(self, sources: Sources, draw: Random, size: int, questions: int) -> Record:
        count = max(self.num_keys, self.num_queries) if self.haystack != "needles" else size
        keys = distinct(lambda: self._key(sources, draw), count)
        values = distinct(lambda: self._value(draw), count * self.num_values)
        told = {key: values[n * self.num_values : (n + 1) * self.num_values] for n, key in enumerate(keys)}
        order = [(key, value) for key in keys for value in told[key]]
        draw.shuffle(order)
        needles = [f"One of the special magic {self.values} for {key} is: {value}." for key, value in order]
        if self.haystack == "needles":
            units, depths = needles, [n / len(needles) for n in range(len(needles))]
        else:
            hay = [NOISE] * size if self.haystack == "noise" else sources.essay(draw, size)
            units, depths = insert_at_random(draw, hay, needles)
        depth = dict(zip((value for _, value in order), depths, strict=True))
        asked = [draw.sample(keys, self.num_queries) for _ in range(questions)]
        if self.num_queries == 1:
            asked = [[key] for key in draw.sample(keys, min(questions, len(keys)))]
        context = (" " if self.haystack == "essay" else "\n").join(units)
        qa = [self._question(each, told, depth) for each in asked[: questions if len(keys) > self.num_queries else 1]]
        return {"context": f"{self._instruction()}\n{context}", "qa": qa}

    def _key(self, sources: Sources, draw: Random) -> str:
        return random_uuid(draw) if self.keys == "uuids" else "-".join(draw.sample(sources.words, 2))

    def _value(self, draw: Random) -> str:
        return random_uuid(draw) if self.values == "uuids" else str(draw.randint(1_000_000, 9_999_999))

    @property
    def _is_single(self) -> bool:
        return self.num_queries * self.num_values == 1

    def _instruction(self) -> str:
        one, kind = self._is_single, self.values
        what = f"A special magic {kind[:-1]} is" if one else f"Some special magic {kind} are"
        again = kind[:-1] if one else kind
        return f"{what} hidden within the following text. Memorize it. I will quiz you about the {again} afterwards."

    def _question(self, keys: list[str], told: dict[str, list[str]], depth: dict[str, float]) -> Record:
        values, names = [value for key in keys for value in told[key]], enumerated(keys)
        one, kind = self._is_single, self.values
        what = f"special magic {kind[:-1] if one else kind} for {names} mentioned in the provided text"
        return {
            "q": f"What {'is' if one else 'are all'} the {what}?",
            "opening": f"The {what} {'is' if one else 'are'}",
            "a": values,
            "gold": enumerated(values),
            "metric": "all",
            "depth": sum(depth[value] for value in values) / len(values),
        }


NEEDLES = {
    "niah_single_1": NeedleTask("noise"),
    "niah_single_2": NeedleTask("essay"),
    "niah_single_3": NeedleTask("essay", values="uuids"),
    "niah_multikey_1": NeedleTask("essay", num_keys=4),
    "niah_multikey_2": NeedleTask("needles"),
    "niah_multikey_3": NeedleTask("needles", keys="uuids", values="uuids"),
    "niah_multivalue": NeedleTask("essay", num_values=4),
    "niah_multiquery": NeedleTask("essay", num_queries=4),
}
