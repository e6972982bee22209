"""LoCoMo's dialogues (arXiv 2402.17753): two people talk over months, and what they said is asked for.

The folder with the evaluation data holds `locomo10.json` of its repository (snap-research/locomo). Asked are its kinds
of questions about one session, about several, and about dates; not those that need other knowledge, or that the
dialogue does not answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from benchmarks.quality.sources import Record, Sources

FILE = "locomo10.json"
WHOLE = "whole"
"""Instead of a length, where no session was left out."""
SEVERAL_SESSIONS, DATES, ONE_SESSION = 1, 2, 4
ASKED = (SEVERAL_SESSIONS, DATES, ONE_SESSION)
"""LoCoMo's numbers of the kinds of questions that are asked."""


def records(sources: Sources, lengths: Sequence[int], most: int) -> Iterator[Record]:
    """Yield the first `most` dialogues at each length, as documents of sessions from the first one on."""
    dialogues = json.loads(sources.folder.joinpath(FILE).read_text(encoding="utf-8"))[:most]
    for length in lengths:
        for dialogue in dialogues:
            yield {**_document(sources, dialogue, length), "task": "locomo"}


def _document(sources: Sources, dialogue: dict[str, Any], length: int) -> Record:
    """Return the sessions that have room in `length` tokens, and the questions that they answer."""
    shown: list[str] = []
    name, left = WHOLE, length
    for session in sessions(dialogue["conversation"]):
        left -= sources.count(session)
        if left < 0:
            name = str(length)
            break
        shown.append(session)
    asked = []
    for each in dialogue["qa"]:
        told_in = [int(number) for place in each["evidence"] for number in re.findall(r"D(\d+):", place)]
        if each["category"] in ASKED and told_in and max(told_in) <= len(shown):
            answer, depth = str(each["answer"]), (max(told_in) - 0.5) / len(shown)
            asked.append({"q": each["question"], "a": [answer], "depth": depth, "metric": "f1"})
    return {"id": dialogue["sample_id"], "context": "\n\n".join(shown), "qa": asked, "file": f"locomo-{name}"}


def sessions(conversation: dict[str, Any]) -> Iterator[str]:
    """Yield the text of each session, in order: its date, and who says what."""
    for number in count(1):
        if f"session_{number}" not in conversation:
            return
        lines = [f"{each['speaker']}: {each['text']}" for each in conversation[f"session_{number}"]]
        yield "\n".join([conversation[f"session_{number}_date_time"], *lines])
