"""Milliseconds of host work in a turn of a conversation of up to 500,000 tokens, without the model.

    python benchmarks/sessions/host_work.py [--turns 10,100,1000] [--jump] [--label after]

Template, tokenizer and sessions are those of SmolLM2. The model is not run: `Engine.read` only counts tokens,
`Engine.decode` yields the ids of a prepared answer, and copies of the cache share its tensors. What is left is what a
turn costs on the host: checking and comparing messages, rendering, tokenising, searching passages, keeping snapshots.

One conversation is brought to each of the given turns. Then they take turns, so that whatever else the machine does
hits all alike. Each figure is the median of these turns: CPU time, and time by the clock. Each request has new dicts of
the same strings, as in one process, or new strings (`--new-strings`), as from a server. `--jump` hands in what was said
before in one request, instead of playing every turn. Adds to results/host_work.json under the label.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.cache import Cache

ROOT = Path(__file__).parents[2]
RESULT = Path(__file__).parents[1] / "results" / "host-work.json"
QUESTION_WORDS, ANSWER_WORDS, RETRIEVED_WORDS = 140, 60, 130
"""Words of a message, of an answer, and of what is read again before a question: about 500 tokens a turn."""
MEASURED = 25
"""Turns of which the median is taken."""
WARM_UP = 4
"""Turns that are played after a jump, before others are measured."""


class Conversation:
    """A conversation with prepared messages and answers, on an engine that only counts tokens."""

    def __init__(self, llm: LLM, new_strings: bool) -> None:
        text = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "zsmerge_llm/data").glob("*.txt")))
        self.llm = llm
        self.new_strings = new_strings
        self.words = text.split()
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": "You are a helpful and brief assistant."}]
        self.session = "host-work"
        self.answer_ids: list[int] = []

    def words_from(self, start: int, count: int) -> str:
        return " ".join(self.words[(start + at) % len(self.words)] for at in range(count))

    def question(self, turn: int) -> str:
        return f"{self.words_from(turn * 617, QUESTION_WORDS)}\n\nWhat was said about {self.words_from(turn * 131, 6)}?"

    def answer(self, turn: int) -> str:
        return f"Answer {turn}: {self.words_from(turn * 389, ANSWER_WORDS)}."

    def skip_to(self, turn: int) -> None:
        """Append messages up to the end of a turn without asking for answers."""
        for number in range(len(self.messages) // 2, turn):
            retrieved = self.words_from(number * 211, RETRIEVED_WORDS)
            self.messages.append({"role": "user", "content": f"{retrieved}\n\n{self.question(number)}"})
            self.messages.append({"role": "assistant", "content": self.answer(number)})

    def play_turn(self) -> tuple[float, float, int]:
        """Ask one question; CPU seconds and seconds until the answer is kept, and the tokens of the conversation."""
        turn = len(self.messages) // 2
        self.messages.append({"role": "user", "content": self.question(turn)})
        self.answer_ids = self.llm.tokenizer(self.answer(turn), add_special_tokens=False)["input_ids"]
        request = [dict(message) for message in self.messages]
        if self.new_strings:
            request = json.loads(json.dumps(request))
        started, cpu_started = time.perf_counter(), time.process_time()
        result = self.llm.chat(request, session=self.session)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        self.messages.append({"role": "assistant", "content": result.text})
        return cpu_seconds, seconds, result.usage.prompt_tokens + result.usage.completion_tokens

    def read(self, _: Engine, cache: Cache, ids: Any, **__: Any) -> torch.Tensor:
        cache.lengths = [cache.seen + len(ids)]
        cache.logits = torch.zeros(1, 1)
        return cache.logits[0]

    def decode(self, _: Engine, cache: Cache, *__: Any, **___: Any) -> Iterator[list[int]]:
        for token in self.answer_ids:
            yield [token]
        cache.lengths = [cache.seen + len(self.answer_ids) - 1]


def shared_copy(cache: Cache) -> Cache:
    other = copy.copy(cache)
    other.lengths = list(cache.lengths)
    return other


def measure(llm: LLM, turns: list[int], jump: bool, new_strings: bool) -> list[dict[str, Any]]:
    talks: list[Conversation] = []
    with (
        mock.patch.object(Engine, "read", lambda engine, *given, **named: talk.read(engine, *given, **named)),
        mock.patch.object(Engine, "decode", lambda engine, *given, **named: talk.decode(engine, *given, **named)),
        mock.patch.object(Cache, "clone", shared_copy),
        mock.patch.object(Cache, "compress_stage", return_value=None),
    ):
        largest = []
        for number, turn in enumerate(turns):
            talk = Conversation(llm, new_strings)
            talk.session = f"host-work-{number}"
            if jump:
                talk.skip_to(turn - WARM_UP)
            before = [talk.play_turn()[0] for _ in range(len(talk.messages) // 2, turn)]
            largest.append(max(before[WARM_UP // 2 :], default=0.0))
            talks.append(talk)
        times: list[list[tuple[float, float, int]]] = [[] for _ in talks]
        for _ in range(MEASURED):
            for talk, results in zip(talks, times, strict=True):
                results.append(talk.play_turn())
    return [
        {
            "turn": turn,
            "tokens": results[0][2],
            "cpu_ms": round(1000 * statistics.median(cpu for cpu, _, _ in results), 2),
            "clock_ms": round(1000 * statistics.median(clock for _, clock, _ in results), 2),
            "largest_cpu_ms_before": round(1000 * most, 2),
        }
        for turn, most, results in zip(turns, largest, times, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", default="10,100,1000")
    parser.add_argument("--jump", action="store_true", help="hand in what was said before in one request")
    parser.add_argument("--new-strings", action="store_true", help="requests hold new strings, as if parsed from JSON")
    parser.add_argument("--label", default="played", help="the key of these figures in the result file")
    parser.add_argument("--commit", help="the commit that is measured; default: HEAD")
    arguments = parser.parse_args()
    llm = LLM("smollm2", cache=CacheConfig(slots=1024), compile=False)
    rows = measure(llm, [int(turn) for turn in arguments.turns.split(",")], arguments.jump, arguments.new_strings)
    for row in rows:
        print(json.dumps(row))
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    known[arguments.label] = {
        "commit": arguments.commit or head.stdout.strip(),
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "case": f"{'history handed in at once' if arguments.jump else 'every turn played'}"
        f"{', every request with new strings' if arguments.new_strings else ''}",
        "turns": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
