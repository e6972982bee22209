"""Which of the passages that say the same about a question's subject come first: what is said last holds.

"What is the price of tar now?" fits each of a dozen passages about that price as well as the next. By their scores
alone the first of them would be read again, and the newest would not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal

Time = Literal["newest", "oldest"]
NEWEST = re.compile(
    r"\b(?:now(?:adays)?|current(?:ly)?|latest|newest|(?:most[ ])?recent(?:ly)?|last|at[ ]present|presently|today|still"
    r"|so[ ]far|up[ -]to[ -]date|any[ ]?more|these[ ]days)\b",
    re.IGNORECASE,
)
OLDEST = re.compile(
    r"\b(?:first|original(?:ly)?|initial(?:ly)?|earliest|(?:at|in)[ ]the[ ](?:beginning|start|outset)"
    r"|to[ ]begin[ ]with)\b",
    re.IGNORECASE,
)
"""Words that ask for what was said last or first. They are English."""
PRESENT = re.compile(r"\b(?:is|are|am|do|does|has|have)\b|['\u2019](?:s|re|m|ve)\b", re.IGNORECASE)
PAST = re.compile(r"\b(?:was|were|did|had)\b", re.IGNORECASE)
AT_FRONT = 2
"""Passages that are put before the best one: the newest that says as much may just repeat the question."""


def asked_time(question: str) -> Time | None:
    """Return whether a question asks for what was said last or first; None for neither, or for both."""
    newest, oldest = NEWEST.search(question), OLDEST.search(question)
    if bool(newest) == bool(oldest):
        return None
    return "newest" if newest else "oldest"


def without_time(question: str) -> str:
    """Return a question without these words."""
    return OLDEST.sub(" ", NEWEST.sub(" ", question))


def asks_for_state(question: str) -> bool:
    """Return whether a question is in the present tense: what was said last holds."""
    return bool(PRESENT.search(question)) and not PAST.search(question)


def in_time(ranked: Sequence[int], alike: Collection[int], time: Time) -> list[int]:
    """Return ranked passages with the few newest or oldest of those that are alike at the front.

    The others of these are left out, but for the best one: a small model that reads a dozen values takes any of them.
    """
    first = sorted(alike, reverse=time == "newest")[:AT_FRONT]
    kept = [*first, *ranked[:1]]
    others = (number for number in ranked if number not in alike)
    return list(dict.fromkeys([*kept, *others]))
