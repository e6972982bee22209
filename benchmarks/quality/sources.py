"""What generated tasks are made of: texts, words and questions of a folder with evaluation data, and a fit to a length.

The folder is given as an option or in the environment variable `ZSMERGE_EVALUATION_DATA`. It holds `moby_dick.txt` and
files of JSON lines as `tasks` describes them.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

VARIABLE = "ZSMERGE_EVALUATION_DATA"
BOOK = "moby_dick.txt"
PRECISION = 50
"""A text is fitted to its length within one part in so many."""

Record = dict[str, Any]
Counting = Callable[[str], int]
"""A text → its tokens."""


@dataclass(frozen=True)
class Sources:
    """A folder of evaluation data. count: the tokens of a text by the model's tokenizer."""

    folder: Path
    count: Counting

    @classmethod
    def at(cls, folder: str | None, count: Counting) -> Sources:
        """Return the data of a folder; None takes the environment's."""
        folder = folder or os.environ.get(VARIABLE)
        if not folder:
            raise SystemExit(f"Give the folder with the evaluation data: --folder FOLDER, or set {VARIABLE}.")
        return cls(Path(folder), count)

    def lines(self, *names: str) -> list[Any]:
        """Return the JSON lines of files."""
        texts = (self.folder.joinpath(name).read_text(encoding="utf-8") for name in names)
        return [json.loads(line) for text in texts for line in text.splitlines()]

    @cached_property
    def sentences(self) -> list[str]:
        """The book's sentences in order, of 3 to 60 words."""
        text = re.sub(r"\s+", " ", self.folder.joinpath(BOOK).read_text(encoding="utf-8"))
        return [each for each in re.split(r"(?<=[.!?]) ", text) if 3 <= len(each.split()) <= 60]

    @cached_property
    def words(self) -> list[str]:
        """Words of 4 to 9 letters that the book uses at least twice, sorted."""
        counts = Counter(re.findall(r"\b[a-z]{4,9}\b", " ".join(self.sentences)))
        return sorted(word for word, times in counts.items() if times > 1)

    def essay(self, draw: Random, count: int) -> list[str]:
        """Return so many sentences of the book, one after another from a place that is drawn."""
        start = draw.randrange(len(self.sentences))
        return [self.sentences[(start + number) % len(self.sentences)] for number in range(count)]


def fit(build: Callable[[int], Record], tokens: int, count: Counting) -> Record:
    """Return the longest record of at most `tokens` (context and longest question), within a part in `PRECISION`.

    build: makes a record of a size; the longer, the larger. Raises ValueError: the smallest one is longer.
    """

    def length(record: Record) -> int:
        return count(record["context"]) + max(count(asked["q"]) for asked in record["qa"])

    low, high = 1, 2
    if (least := length(build(low))) > tokens:
        raise ValueError(f"A text of this task has at least {least} tokens: ask for more than {tokens}.")
    while length(build(high)) <= tokens:
        low, high = high, high * 2
    while high - low > max(1, low // PRECISION):
        middle = (low + high) // 2
        low, high = (middle, high) if length(build(middle)) <= tokens else (low, middle)
    return build(low)


def distinct(make: Callable[[], str], count: int) -> list[str]:
    """Return so many different texts of a source, in the order of their first appearance."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)


def random_uuid(draw: Random) -> str:
    """Return a UUID of version 4 that is drawn."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def enumerated(items: Sequence[str]) -> str:
    """Return "a, b, and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def insert_at_random(draw: Random, units: list[str], inserted: Sequence[str]) -> tuple[list[str], list[float]]:
    """Put texts between units at random places, in their order.

    Returns:
        All units, and the depth of each inserted one (0: the beginning, 1: the end).
    """
    places = sorted(draw.choices(range(len(units) + 1), k=len(inserted)))
    result: list[str] = []
    depths, start = [], 0
    for place, text in zip(places, inserted, strict=True):
        result += [*units[start:place], text]
        depths.append((len(result) - 1) / (len(units) + len(inserted)))
        start = place
    return result + units[start:], depths
