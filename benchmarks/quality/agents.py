"""Agents that read results of tools one after another: a request comes first, and any of them may hold its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

from benchmarks.quality.sources import Record, Sources
from benchmarks.quality.tasks import paragraphs

FILES = {"xquad": "xquad_multi_4k.jsonl", "nq": "nq_multidoc_10.jsonl"}
"""By kind of questions: a file whose paragraphs the results are made of."""
PER_RESULT = 3
"""Paragraphs of one result."""
REQUEST = "Open the pages one after another with the tool. "
QUESTION = "Answer with a few words from the pages.\nQuestion: "
OPENING = "The answer is:"


def records(sources: Sources, lengths: Sequence[int], texts: int, seed: int = 0) -> Iterator[Record]:
    """Yield so many loops of each length and kind. Each has one request, and results of tools of `length` tokens."""
    for kind, file in FILES.items():
        known = {text: asked for line in sources.lines(file) for text, asked in paragraphs(line)}
        for length in lengths:
            for number in range(texts):
                draw = Random(f"{seed}/{kind}/{length}/{number}")
                yield {**_loop(sources, known, draw, length), "id": f"{kind}-{number}", "task": kind}


def _loop(sources: Sources, known: dict[str, list[Record]], draw: Random, length: int) -> Record:
    """Return one loop: the question is about one of its paragraphs."""
    chosen: list[str] = []
    left = length
    for text in draw.sample(sorted(known), len(known)):
        left -= sources.count(text)
        if left < 0:
            break
        chosen.append(text)
    at = draw.choice([place for place, text in enumerate(chosen) if known[text]])
    asked = draw.choice(known[chosen[at]])
    messages = [{"role": "user", "content": f"{REQUEST}{QUESTION}{asked['q']}"}]
    for page, start in enumerate(range(0, len(chosen), PER_RESULT), start=1):
        result = "\n\n".join(chosen[start : start + PER_RESULT])
        messages.append({"role": "assistant", "content": f"I open page {page}."})
        messages.append({"role": "tool", "content": result, "tool_call_id": str(page)})
    own = {"q": QUESTION + asked["q"], "a": asked["a"], "depth": at / len(chosen), "opening": OPENING, "metric": "any"}
    return {"file": f"agents-{length}", "messages": messages, "qa": [own]}
