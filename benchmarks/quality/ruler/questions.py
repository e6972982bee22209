"""RULER's question answering: documents that hold an answer between others of the same data.

The first task has paragraphs and questions of SQuAD (`xquad_multi_*`), the second passages and questions of Natural
Questions (`nq_multidoc_10`), which stand in for HotpotQA.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from random import Random

from benchmarks.quality.sources import Record, Sources, fit
from benchmarks.quality.tasks import paragraphs

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@dataclass(frozen=True)
class DocumentQuestions:
    """Documents and questions of files of JSON lines."""

    files: tuple[str, ...]

    def pool(self, sources: Sources) -> dict[str, list[Record]]:
        """Return each different document with the questions that it answers."""
        found: dict[str, list[Record]] = {}
        for record in sources.lines(*self.files):
            for text, asked in paragraphs(record):
                text = re.sub(r"^Document \[\d+\] ", "", text)
                found.setdefault(text, []).extend(asked)
        return found

    def record(self, sources: Sources, seed: str, tokens: int, questions: int) -> Record:
        """Return documents of so many tokens and so many questions, each about another of them."""
        pool = self.pool(sources)

        def build(size: int) -> Record:
            draw = Random(seed)
            answering = draw.sample([text for text, asked in pool.items() if asked], questions)
            others = [text for text in draw.sample(list(pool), len(pool)) if text not in answering]
            documents = answering + first_sentences(others, size - 1)
            draw.shuffle(documents)
            shown = [f"Document {number}:\n{text}" for number, text in enumerate(documents, start=1)]
            asked = [
                self._question(draw.choice(pool[text]), documents.index(text) / len(documents)) for text in answering
            ]
            context = "\n\n".join([INSTRUCTION, "The following are given documents.", *shown])
            return {"context": context, "qa": asked}

        return fit(build, tokens, sources.count)

    def _question(self, asked: Record, depth: float) -> Record:
        return {
            "q": f"{INSTRUCTION}\n\nQuestion: {asked['q']}",
            "opening": "Answer:",
            "a": asked["a"],
            "metric": "any",
            "depth": depth,
        }


def first_sentences(documents: Sequence[str], count: int) -> list[str]:
    """Return documents of so many sentences together, the last one cut; they are repeated where they are too few."""
    found: list[str] = []
    for text in cycle(documents):
        sentences = re.split(r"(?<=[.!?]) ", text)
        if count <= 0:
            break
        found.append(" ".join(sentences[:count]))
        count -= len(sentences)
    return found


QUESTIONS = {
    "qa_1": DocumentQuestions(("xquad_multi_2k.jsonl", "xquad_multi_4k.jsonl")),
    "qa_2": DocumentQuestions(("nq_multidoc_10.jsonl",)),
}
