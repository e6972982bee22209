"""RULER (arXiv 2404.06654): its thirteen tasks, generated after their published definitions.

What the model is told to do and the text are the document; the question comes afterwards, and the answer begins as the
definition says. Several questions are asked of one text where it has more than one key, chain or document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.quality.ruler.needles import NEEDLES
from benchmarks.quality.ruler.questions import QUESTIONS
from benchmarks.quality.ruler.tracking import TRACKING
from benchmarks.quality.ruler.word_counts import common_words, frequent_words
from benchmarks.quality.sources import Record, Sources

Generate = Callable[[Sources, str, int, int], Record]
"""Sources, a seed, a length in tokens, most questions → a record without its id."""
_GROUPS = (NEEDLES, TRACKING, QUESTIONS)
TASKS: dict[str, Generate] = {
    **{name: task.record for group in _GROUPS for name, task in group.items()},
    "cwe": common_words,
    "fwe": frequent_words,
}


def records(
    sources: Sources,
    lengths: Sequence[int],
    texts: int,
    questions: int,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
) -> Iterator[Record]:
    """Yield `texts` texts of each task and length, one of each task at a time. The same seed gives the same texts."""
    for tokens in lengths:
        for number in range(texts):
            for name in tasks:
                record = TASKS[name](sources, f"{seed}/{name}/{tokens}/{number}", tokens, questions)
                yield {**record, "id": f"{name}-{number}", "task": name, "file": f"ruler-{tokens}", "complete": True}
