"""Milliseconds of host work in a turn of a conversation of up to 500,000 tokens, without the model.

    python benchmarks/sessions/host_work.py [--turns 10,100,1000] [--jump] [--label after]

Template, tokenizer and sessions are those of SmolLM2. The model is not run: `Engine.read` only counts tokens,
`Engine.decode` yields the ids of a prepared answer, and copies of the cache share its tensors. What is left is what a
turn costs on the host: checking and comparing messages, rendering, tokenising, searching passages, keeping snapshots.

Each figure is the median over the turns that end at the given one. `--jump` hands in the conversation up to there in
one request, instead of playing every turn. Adds to results/host_work.json under the label.
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
RESULT = Path(__file__).parent / "results" / "host_work.json"
QUESTION_WORDS, ANSWER_WORDS = 270, 85
"""Words of a message and of an answer: together about 500 tokens a turn."""
MEASURED = 9
"""Turns of which the median is taken."""


class Conversation:
    """A conversation with prepared messages and answers, on an engine that only counts tokens."""

    def __init__(self, llm: LLM) -> None:
        text = " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "zsmerge_llm/data").glob("*.txt")))
        self.llm = llm
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
            self.messages.append({"role": "user", "content": self.question(number)})
            self.messages.append({"role": "assistant", "content": self.answer(number)})

    def play_turn(self) -> tuple[float, int]:
        """Ask one question; seconds until the answer is complete and kept, and the tokens of the conversation."""
        turn = len(self.messages) // 2
        self.messages.append({"role": "user", "content": self.question(turn)})
        self.answer_ids = self.llm.tokenizer(self.answer(turn), add_special_tokens=False)["input_ids"]
        # A server parses a new list of new strings for each request.
        request = json.loads(json.dumps(self.messages))
        started = time.perf_counter()
        result = self.llm.chat(request, session=self.session)
        seconds = time.perf_counter() - started
        self.messages.append({"role": "assistant", "content": result.text})
        return seconds, result.usage.prompt_tokens + result.usage.completion_tokens

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


def measure(llm: LLM, turns: list[int], jump: bool) -> list[dict[str, Any]]:
    rows = []
    talk = Conversation(llm)
    with (
        mock.patch.object(Engine, "read", lambda engine, *given, **named: talk.read(engine, *given, **named)),
        mock.patch.object(Engine, "decode", lambda engine, *given, **named: talk.decode(engine, *given, **named)),
        mock.patch.object(Cache, "clone", shared_copy),
        mock.patch.object(Cache, "compress_stage", lambda cache: None),
    ):
        talk.play_turn()  # what is made once for a model
        for number, turn in enumerate(turns):
            if jump:
                talk = Conversation(llm)
                talk.session = f"host-work-{number}"
                talk.skip_to(turn - MEASURED - 2)
            seconds = [0.0]
            while len(talk.messages) // 2 < turn:
                one, tokens = talk.play_turn()
                seconds.append(one)
            median = statistics.median(seconds[-MEASURED:])
            most = max(seconds[2:] if jump else seconds)
            row = {"turn": turn, "tokens": tokens, "ms": round(1000 * median, 2), "max_ms": round(1000 * most, 2)}
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", default="10,100,1000")
    parser.add_argument("--jump", action="store_true", help="hand in what was said before in one request")
    parser.add_argument("--label", default="after", help="the key of these figures in the result file")
    parser.add_argument("--commit", help="the commit that is measured; default: HEAD")
    arguments = parser.parse_args()
    llm = LLM("smollm2", cache=CacheConfig(slots=1024), compile=False)
    rows = measure(llm, [int(turn) for turn in arguments.turns.split(",")], arguments.jump)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    known[arguments.label] = {
        "commit": arguments.commit or head.stdout.strip(),
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "every_turn_played": not arguments.jump,
        "turns": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
