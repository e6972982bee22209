"""One system, one row of `peers`, in a process of its own: reads a job as JSON from stdin, prints its figures as JSON.

    echo '{...}' | python benchmarks/speed/peer_process.py

Imports only what the system needs, because the time to the first token counts from the start of the process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed.busy_loops import busy_loops
from benchmarks.speed.peer_systems import SYSTEMS, Setting, System, versions

WARM_UP_TOKENS = 16
PROMPT = "The history of lighthouses begins with fires on hills, "
LONGEST = 10.0
"""Seconds of decoding after which an answer ends before its last token."""

Figures = dict[str, float]


@dataclass
class Stamps:
    """Notes when each token is there, by the wall clock, which all processes share; ends a slow answer."""

    times: list[float] = field(default_factory=list)

    def __call__(self) -> bool:
        self.times.append(time.time())
        return self.times[-1] - self.times[0] < LONGEST

    @property
    def rate(self) -> float:
        """Tokens a second after the first."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def cold(system: System, job: dict[str, Any]) -> Figures:
    """Answer a short prompt: seconds from the start of this process to the first token and to the last."""
    stamps = Stamps()
    system.answer(system.encode(PROMPT), job["tokens"], stamps)
    return {"first": stamps.times[0] - job["started"], "last": stamps.times[-1] - job["started"]}


def history(system: System, job: dict[str, Any]) -> Figures:
    """Read a prompt of `length` tokens and decode behind it: tokens a second of both. The first token ends reading."""
    ids, stamps = prompt_ids(system, job["text"], job["length"]), Stamps()
    warm_up(system)
    with busy_loops() if job["loaded"] else nullcontext():
        started = time.time()
        system.answer(ids, job["tokens"], stamps)
    return {"prefill": len(ids) / (stamps.times[0] - started), "decode": stamps.rate}


def together(system: System, job: dict[str, Any]) -> Figures:
    """Answer several prompts at once: tokens a second of all, the reading included."""
    count, length = job["conversations"], job["length"]
    ids = prompt_ids(system, job["text"], count * length)
    prompts = [ids[at : at + length] for at in range(0, len(ids), length)]
    system.answers(prompts, WARM_UP_TOKENS)
    started = time.time()
    tokens = system.answers(prompts, job["tokens"])
    return {"all": tokens / (time.time() - started)}


ROWS: dict[str, Callable[[System, dict[str, Any]], Figures]] = {"cold": cold, "history": history, "together": together}


def prompt_ids(system: System, text: str, length: int) -> list[int]:
    """Return `length` token ids of a text, from its beginning again where it ends."""
    ids = system.encode(text)
    return (ids * (length // len(ids) + 1))[:length]


def warm_up(system: System) -> None:
    """Answer a prompt that no row asks."""
    system.answer(system.encode("Name a few trees."), WARM_UP_TOKENS, Stamps())


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return the versions and figures of a job, or its error."""
    try:
        system = SYSTEMS[job["kind"]](Setting(**job["setting"]))
        return {"figures": ROWS[job["row"]](system, job), "versions": versions(job["kind"])}
    except Exception as error:  # a peer that cannot do a row is a result
        return {"error": f"{type(error).__name__}: {error}"}


def main() -> None:
    print(json.dumps(run(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
