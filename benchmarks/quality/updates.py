"""Facts that change: prices in a story, results in a log, budgets in a chat. What was said last holds.

Four things have sixteen values each, one after another, at places drawn by a seed. A question asks for the last value
of one, or for its first. All sentences about a thing are alike but for the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import NamedTuple

from benchmarks.quality.generated import GeneratedSuite
from benchmarks.quality.sources import Record, Sources, fit, insert_at_random

GOODS = ("whale oil", "rum", "tar", "salted cod", "hemp", "sugar", "candles", "canvas", "pepper", "timber")
THINGS, VALUES = 4, 16


class Kind(NamedTuple):
    """How one kind of text tells a value, and asks for it. `{thing}` and `{value}` are filled in.

    last, first: questions. opening: how an answer begins. separator: what stands between two sentences or lines.
    """

    told: str
    last: str
    first: str
    opening: str
    separator: str


KINDS = {
    "prose": Kind(
        "The harbour master announced that the price of {thing} is now {value} guilders a barrel.",
        "What is the price of {thing} now?",
        "What was the price of {thing} at first?",
        "The price in guilders is",
        "\n\n",
    ),
    "log": Kind(
        "2024-03-{day:02d} {hour:02d}:{minute:02d} {thing} returned {value}",
        "What is the last value that {thing} returned?",
        "What is the first value that {thing} returned?",
        "The value is",
        "\n",
    ),
    "chat": Kind(
        "By the way, my budget for {thing} is {value} guilders.",
        "What is my budget for {thing}?",
        "What was my original budget for {thing}?",
        "The budget in guilders is",
        "\n",
    ),
}


def _generated(name: str, sources: Sources, seed: str, tokens: int, questions: int) -> Record:
    """Return a text of one kind, with questions for last and first values by turns."""
    kind = KINDS[name]

    def build(size: int) -> Record:
        draw = Random(seed)
        jobs = [f"job_{number}" for number in draw.sample(range(10, 100), THINGS)]
        things = jobs if name == "log" else draw.sample(GOODS, THINGS)
        changed = draw.sample(things * VALUES, THINGS * VALUES)
        values = draw.sample(range(1000, 10000), len(changed))
        told = [
            kind.told.format(thing=thing, value=value, day=1 + at // 4, hour=6 + at % 4, minute=value % 60)
            for at, (thing, value) in enumerate(zip(changed, values, strict=True))
        ]
        filler = _heartbeats(draw, size) if name == "log" else sources.essay(draw, size)
        units, depths = insert_at_random(draw, filler, told)
        qa = []
        for number in range(questions):
            thing, asks_for_last = things[number // 2 % THINGS], number % 2 == 0
            places = [at for at, each in enumerate(changed) if each == thing]
            at = places[-1] if asks_for_last else places[0]
            question = (kind.last if asks_for_last else kind.first).format(thing=thing)
            facts = {"opening": kind.opening, "metric": "all", "depth": depths[at]}
            qa.append({"q": question, "a": [str(values[at])], **facts})
        record: Record = {"context": kind.separator.join(units), "qa": qa}
        return {**record, "messages": _messages(units, set(told))} if name == "chat" else record

    return fit(build, tokens, sources.count)


def _heartbeats(draw: Random, count: int) -> list[str]:
    """Return lines of a log that say nothing."""
    return [f"2024-03-01 00:00 worker heartbeat, load {draw.random():.2f}" for _ in range(count)]


def _messages(units: Sequence[str], told: set[str]) -> list[Record]:
    """Return units as a chat: the user tells what is new and asks for more, and gets what stands behind it."""
    messages: list[Record] = [{"role": "user", "content": "Tell me about the voyage."}]
    answer: list[str] = []
    for unit in units:
        if unit in told:
            messages.append({"role": "assistant", "content": " ".join(answer) or "All right."})
            messages.append({"role": "user", "content": f"{unit} Go on."})
            answer = []
        else:
            answer.append(unit)
    return [*messages, {"role": "assistant", "content": " ".join(answer) or "All right."}]


TASKS = {name: partial(_generated, name) for name in KINDS}

SUITE = GeneratedSuite("updates", TASKS)
records = SUITE.records
