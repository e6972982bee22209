"""Suites whose texts are generated: so many of each task and length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.sources import Record, Sources

Generate = Callable[[Sources, str, int, int], Record]
"""Sources, a seed, a length in tokens, most questions → a record without its id."""


@dataclass(frozen=True)
class GeneratedSuite:
    """A suite by its name and what makes the texts of each task."""

    name: str
    tasks: Mapping[str, Generate]

    def records(
        self,
        sources: Sources,
        lengths: Sequence[int],
        texts: int,
        questions: int,
        seed: int = 0,
        tasks: Sequence[str] | None = None,
    ) -> Iterator[Record]:
        """Yield `texts` texts of each task and length, one of each task at a time. A seed gives the same texts.

        tasks: None takes all.
        """
        for tokens in lengths:
            for number in range(texts):
                for name in tasks or self.tasks:
                    record = self.tasks[name](sources, f"{seed}/{name}/{tokens}/{number}", tokens, questions)
                    facts = {"id": f"{name}-{number}", "task": name, "file": f"{self.name}-{tokens}", "complete": True}
                    yield {**record, **facts}
