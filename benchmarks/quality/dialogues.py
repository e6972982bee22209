"""Long conversations that exist: BEAM's (arXiv 2510.27246) with ten kinds of questions, and PrefEval's preferences
(arXiv 2502.09597) with other conversations between."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from random import Random

from benchmarks.quality.sources import Record, Sources

BEAM_FILE, PREFERENCES_FILE, FILLER_FILE = "beam_100k_dev.jsonl", "prefeval_dev.jsonl", "filler_turns.jsonl"
DEMAND = re.compile(r"^LLM response should (?:state|mention|contain|include)[^:]*:\s*", re.IGNORECASE)
"""How a rubric begins; what follows is the fact."""
REPLY = "Thank you for telling me. I will keep that in mind."


def beam(sources: Sources, most_turns: int | None = None, kinds: Sequence[str] | None = None) -> Iterator[Record]:
    """Yield BEAM's conversations, or their first messages, each with its questions, or those of some kinds."""
    for record in sources.lines(BEAM_FILE):
        qa = [
            {
                "q": asked["q"],
                "a": [DEMAND.sub("", fact) for fact in asked["rubric"]] or asked["a"],
                "gold": asked["a"][0],
                "metric": "rubric",
                "kind": asked["kind"],
            }
            for asked in record["qa"]
            if kinds is None or asked["kind"] in kinds
        ]
        messages = alternating(record["turns"][:most_turns])
        yield {"id": record["id"], "task": "beam", "file": "beam-100k", "messages": messages, "qa": qa}


def preferences(
    sources: Sources, between: Sequence[int], count: int, together: int = 1, seed: int = 0
) -> Iterator[Record]:
    """Yield conversations that begin with preferences, go on about other things, and then need them.

    between: turns (a user's message and its answer) between the two. count: preferences in all. together: preferences
    that one conversation begins with, a turn each; each of them is asked about.
    """
    conversations = [alternating(turns) for turns in sources.lines(FILLER_FILE)]
    chosen = Random(seed).sample(sources.lines(PREFERENCES_FILE), count)
    for turns in between:
        for start in range(0, count, together):
            own = chosen[start : start + together]
            replies = [{"role": "assistant", "content": REPLY}] * len(own)
            told = [{"role": "user", "content": each["preference"]} for each in own]
            first = [message for turn in zip(told, replies, strict=True) for message in turn]
            qa = [{"q": each["question"], "a": each["options"][:1], "options": each["options"]} for each in own]
            yield {
                "id": f"{own[0]['id']}x{together}",
                "task": "prefeval",
                "file": f"prefeval-{turns}",
                "messages": first + filler_turns(Random(f"{seed}/{start}"), conversations, turns),
                "qa": qa,
            }


def filler_turns(draw: Random, conversations: Sequence[list[Record]], turns: int) -> list[Record]:
    """Return so many turns of conversations in random order. More turns of the same draw begin with the same ones."""
    found: list[Record] = []
    while len(found) < 2 * turns:
        found += (message for each in draw.sample(conversations, len(conversations)) for message in each)
    return found[: 2 * turns]


def alternating(turns: Sequence[Record]) -> list[Record]:
    """Return messages as user and assistant by turns: what one says twice is joined, and an open end is left out."""
    found: list[Record] = []
    for turn in turns:
        role, content = turn["role"], turn["content"].strip()
        if not content or (not found and role != "user"):
            continue
        if found and found[-1]["role"] == role:
            found[-1] = {"role": role, "content": f"{found[-1]['content']}\n\n{content}"}
        else:
            found.append({"role": role, "content": content})
    return found[: len(found) // 2 * 2]
