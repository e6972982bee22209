"""RULER (arXiv 2404.06654): its thirteen tasks, generated after their published definitions.

What the model is told to do and the text are the document; the question comes afterwards, and the answer begins as the
definition says. Several questions are asked of one text where it has more than one key, chain or document.
"""

from __future__ import annotations

from benchmarks.quality.generated import Generate, GeneratedSuite
from benchmarks.quality.ruler.needles import NEEDLES
from benchmarks.quality.ruler.questions import QUESTIONS
from benchmarks.quality.ruler.tracking import TRACKING
from benchmarks.quality.ruler.word_counts import common_words, frequent_words

_GROUPS = (NEEDLES, TRACKING, QUESTIONS)
TASKS: dict[str, Generate] = {
    **{name: task.record for group in _GROUPS for name, task in group.items()},
    "cwe": common_words,
    "fwe": frequent_words,
}

records = GeneratedSuite("ruler", TASKS).records
