"""What a turn with a question costs as its conversation grows: reading, search and host work; and its index's bytes.

    python benchmarks/sessions/turn_cost.py --text BOOK --keep FOLDER [--model smollm2] [--tokens 5000,50000,100000]

One conversation about a text is read, and saved in the folder at each of the lengths; what is there is not read again.
Then these conversations take turns, so that whatever else the machine does hits all alike. Each is asked two questions
about other places, and put back to where it was. The second one is measured: it continues the conversation, and finds
the first one's turn not yet indexed. Figures are medians. `search_seconds` is all that chooses what is read again,
`index_seconds` the part of it that updates and ranks passages, and `host_seconds` what else is not the model's work.

`restored` is a turn after the conversation was saved and loaded: only its index comes from the file, all else is made
anew. Bytes of the index are those that a new one takes, its passages included. Writes results/turn-cost-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import long_text, write
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.retrieval.passage_index import PassageIndex
from zsmerge_llm.retrieval.passage_search import PassageSearch
from zsmerge_llm.retrieval.questions import Query
from zsmerge_llm.runtime import token_vectors
from zsmerge_llm.sessions.session import Snapshot
from zsmerge_llm.types import Message

NAME = "turn-cost"
MESSAGE_WORDS, STEP_MESSAGES = 180, 20
"""Words of a message that brings text, and how many such messages are read at a time."""
ASKED_WORDS = 6
ANSWER = 16
"""Tokens of each answer."""
WARM_UP, RESTORED = 1, 3
"""Rounds that do not count, and rounds in which every conversation is loaded anew."""
Timed = Callable[..., Any]
Row = dict[str, float]


class Clock:
    """Seconds spent in some methods during a turn."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("read", "search", "index"), 0.0)

    def timed(self, name: str, method: Timed) -> Timed:
        def run(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*given, **named)
            finally:
                self.seconds[name] += time.perf_counter() - started

        return run

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the methods while this lasts."""
        with (
            mock.patch.object(Engine, "read", self.timed("read", Engine.read)),
            mock.patch.object(PassageSearch, "augment", self.timed("search", PassageSearch.augment)),
            mock.patch.object(PassageIndex, "find", self.timed("index", PassageIndex.find)),
        ):
            yield


@dataclass
class Conversation:
    """A conversation about a text, which its messages bring part by part.

    said: words of the text so far. point: the snapshots to which it is put back.
    """

    llm: LLM
    words: list[str]
    name: str = NAME
    said: int = 0
    messages: list[Message] = field(default_factory=list)
    point: dict[str, Snapshot] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return len(self.llm.session(self.name).tokens) if self.messages else 0

    def grow(self, tokens: int) -> None:
        """Let the conversation bring more of the text until it has so many tokens."""
        while self.tokens < tokens:
            for number in range(STEP_MESSAGES):
                role = "user" if number % 2 == 0 else "assistant"
                self.messages.append({"role": role, "content": self._next_words()})
            self.messages.append({"role": "user", "content": "Go on."})
            result = self.llm.chat(self.messages, session=self.name, sampling=SamplingParams(max_tokens=2))
            self.messages.append({"role": "assistant", "content": result.text})
            print(f"{self.tokens:,} tokens", flush=True)

    def _next_words(self) -> str:
        start, self.said = self.said, self.said + MESSAGE_WORDS
        if self.said > len(self.words):
            raise SystemExit("The text is too short for these lengths: give a longer one with --text.")
        return " ".join(self.words[start : self.said])

    def save(self, path: Path) -> None:
        """Keep a copy of the conversation, under a name of its own."""
        self.llm.session(self.name).fork(f"{NAME}-{path.stem}").save(path)
        path.with_suffix(".json").write_text(json.dumps({"said": self.said, "messages": self.messages}))

    def load(self, path: Path) -> Conversation:
        """Return the conversation that was saved there."""
        session = self.llm.load_session(path)
        return replace(
            self, name=session.name, point=dict(session.snapshots), **json.loads(path.with_suffix(".json").read_text())
        )

    def question(self, depth: float) -> str:
        """Ask about words at a place of what was said. depth: 0 for its beginning."""
        start = int(depth * (self.said - ASKED_WORDS))
        return f"What was said about {' '.join(self.words[start : start + ASKED_WORDS])}?"

    def ask(self, messages: list[Message], question: str) -> tuple[list[Message], Row]:
        """Return the conversation after one more turn, and what that cost."""
        clock, first, chunk, text = Clock(), 0.0, None, ""
        messages = [*messages, {"role": "user", "content": question}]
        started = time.perf_counter()
        with clock.running():
            sampling = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
            for chunk in self.llm.stream(messages, sampling=sampling, session=self.name):
                first = first or time.perf_counter() - started
                text += chunk.text
        seconds = time.perf_counter() - started
        assert chunk is not None
        assert chunk.usage is not None
        usage, spent = chunk.usage, clock.seconds
        assert usage.reuse == "continued", usage.reuse
        row = {
            "first_token_seconds": first,
            "seconds": seconds,
            "read_seconds": spent["read"],
            "decode_seconds": usage.decode_seconds,
            "search_seconds": spent["search"],
            "index_seconds": spent["index"],
            "host_seconds": seconds - spent["read"] - spent["search"] - usage.decode_seconds,
            "read_tokens": usage.prompt_tokens - usage.cached_tokens,
            "retrieved_tokens": usage.retrieved_tokens,
            "cache_bytes": usage.cache_bytes,
        }
        return [*messages, {"role": "assistant", "content": text}], row

    def ask_twice(self, depth: float) -> Row:
        """Ask about a place, then about another, and return what that turn cost. The conversation stays as it was."""
        messages, _ = self.ask(self.messages, self.question(depth))
        _, row = self.ask(messages, self.question((depth + 0.4) % 1))
        self.llm.store.commit(replace(self.llm.session(self.name), snapshots=dict(self.point)))
        return row

    def restore(self, folder: Path, depth: float) -> Row:
        """Save the conversation, load it, and return what its next turn cost. It stays as it was."""
        path = self.llm.session(self.name).save(folder / "session.zsmerge")
        self.llm.store.remove(self.name)
        started = time.perf_counter()
        session = self.llm.load_session(path)
        loading = time.perf_counter() - started
        self.point = dict(session.snapshots)
        _, row = self.ask(self.messages, self.question(depth))
        self.llm.store.commit(replace(self.llm.session(self.name), snapshots=dict(self.point)))
        return {"file_bytes": path.stat().st_size, "loading_seconds": loading, **row}

    def index_size(self) -> Row:
        """Return the bytes of the text and of a new index of it, and the seconds that building it takes."""
        vectors = token_vectors(self.llm.engine, self.llm.tokenizer)
        asked = [Query("lighthouse")]
        PassageIndex(vectors=vectors).find(self.messages, asked)  # the vectors are made once for all indexes
        started = time.perf_counter()
        PassageIndex(vectors=vectors).find(self.messages, asked)
        seconds = time.perf_counter() - started
        tracemalloc.start()
        index = PassageIndex(vectors=vectors)
        index.find(self.messages, asked)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        text = sum(len(message["content"].encode()) for message in self.messages)
        return {"text_bytes": text, "index_bytes": size, "passages": len(index.passages), "building_seconds": seconds}


def medians(rows: list[Row]) -> Row:
    return {key: round(statistics.median(row[key] for row in rows), 5) for key in rows[0]}


def measure(talks: list[Conversation], rounds: int) -> list[dict[str, Any]]:
    """Return what a turn costs in each conversation. They take turns."""
    asked: list[list[Row]] = [[] for _ in talks]
    restored: list[list[Row]] = [[] for _ in talks]
    for number in range(WARM_UP + rounds):
        for talk, rows in zip(talks, asked, strict=True):
            rows.append(talk.ask_twice(number / (WARM_UP + rounds)))
        print(f"round {number}", *(f"{rows[-1]['first_token_seconds']:.3f}" for rows in asked), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(RESTORED):
            for talk, rows in zip(talks, restored, strict=True):
                rows.append(talk.restore(Path(folder), number / RESTORED))
    measured = []
    for talk, rows, again in zip(talks, asked, restored, strict=True):
        row = {"tokens": talk.tokens, **medians(rows[WARM_UP:]), **talk.index_size()}
        row["index_over_cache"] = row["index_bytes"] / row["cache_bytes"]
        measured.append({**row, "restored": medians(again)})
        print(json.dumps(measured[-1]), flush=True)
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", help="a text file with about as many tokens as the longest conversation")
    parser.add_argument("--tokens", default="5000,20000,50000,100000")
    parser.add_argument("--keep", type=Path, required=True, help="a folder for the conversations that were read")
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=8, help="0: read only")
    arguments = parser.parse_args()
    llm = LLM(arguments.model, cache=CacheConfig(slots=arguments.slots))
    llm.warm_up()
    talk = Conversation(llm, long_text(arguments.text).split())
    paths = [arguments.keep / f"{tokens}.zsmerge" for tokens in arguments.tokens.split(",")]
    for path in paths:
        if path.is_file():
            talk = talk.load(path)
        else:
            talk.grow(int(path.stem))
            talk.save(path)
    if not arguments.rounds:
        return
    talks = [talk.load(path) for path in paths]
    rows = measure(talks, arguments.rounds)
    ratios = {key: rows[-1][key] / rows[0][key] for key in ("first_token_seconds", "seconds")}
    print(json.dumps(ratios, indent=1))
    model = Path(arguments.model).stem
    write(f"turn-cost-{model}", {"model": model, "slots": arguments.slots, "last_over_first": ratios, "lengths": rows})


if __name__ == "__main__":
    main()
