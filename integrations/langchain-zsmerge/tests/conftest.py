"""A stand-in for `zsmerge_llm.LLM`, so that the integration is tested without a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from zsmerge_llm import Chunk, Result, SamplingParams, Usage


class FakeTokenizer:
    """One token per word."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [len(word) for word in text.split()] + [0] * add_special_tokens


@dataclass
class FakeSession:
    name: str


@dataclass
class FakeLLM:
    """Answers with `words`, one per chunk, `delay` seconds apart; keeps what it was asked in `requests`."""

    words: list[str] = field(default_factory=lambda: ["The", " sky", " is", " blue."])
    delay: float = 0.0
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    invalid_tool_calls: list[dict[str, Any]] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    context_window: int | None = 2048
    model: str = "fake"
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    requests: list[dict[str, Any]] = field(default_factory=list)
    decoded: int = 0
    closed: int = 0
    documents: dict[str, str] = field(default_factory=dict)
    reads: int = 0
    warm: bool = False

    def warm_up(self) -> None:
        self.warm = True

    def stream(
        self, messages: list[dict[str, Any]], *, cancel: threading.Event | None = None, **request: Any
    ) -> Iterator[Chunk]:
        known = {"sampling", "tools", "tool_choice", "parallel_tool_calls", "response_format", "grammar", "session"}
        assert request.keys() <= known | {"reread"}
        self.requests.append({"messages": messages, "tools": None, "session": None, **request})
        return self._decode(request.get("sampling"), cancel, request.get("tools") is not None)

    def chat(self, messages: list[dict[str, Any]], **request: Any) -> Result:
        return self._whole(self.stream(messages, **request))

    def stream_complete(self, prompt: str, *, cancel: threading.Event | None = None, **request: Any) -> Iterator[Chunk]:
        assert request.keys() <= {"sampling", "response_format", "grammar"}
        self.requests.append({"prompt": prompt, **request})
        return self._decode(request.get("sampling"), cancel, False)

    def complete(self, prompt: str, **request: Any) -> Result:
        return self._whole(self.stream_complete(prompt, **request))

    def batch_complete(
        self, prompts: list[str], *, sampling: SamplingParams | None = None, cancel: threading.Event | None = None
    ) -> list[Result]:
        self.requests.append({"prompts": prompts, "sampling": sampling})
        return [self._whole(self._decode(sampling, cancel, False)) for _ in prompts]

    def count_prompt_tokens(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> int:
        """A word is a token; a role, a tool and the beginning of the answer are one each."""
        words = [word for message in messages for word in [message["role"], *message["content"].split()]]
        return len(words) + len(tools or ()) + (messages[-1]["role"] != "assistant")

    def read_document(
        self, *, text: str, name: str | None, probe: str | None, cancel: threading.Event | None
    ) -> FakeSession:
        if text not in self.documents.values():
            time.sleep(self.delay)
            self.reads += 1
        self.documents[name or "document"] = text
        return FakeSession(name or "document")

    def _decode(
        self, sampling: SamplingParams | None, cancel: threading.Event | None, calling: bool
    ) -> Iterator[Chunk]:
        try:
            count = 0
            limit = sampling.max_tokens if sampling and sampling.max_tokens else len(self.words)
            for thought in self.thoughts:
                yield Chunk("", reasoning=thought)
            for word in self.words[:limit]:
                if cancel is not None and cancel.is_set():
                    yield Chunk("", "cancelled", _usage(count))
                    return
                time.sleep(self.delay)
                self.decoded += 1
                count += 1
                yield Chunk(word)
            calls = self.tool_calls if calling else []
            yield Chunk("", "tool_calls" if calls else "stop", _usage(count), calls, self.invalid_tool_calls)
        finally:
            self.closed += 1

    def _whole(self, chunks: Iterator[Chunk]) -> Result:
        parts = list(chunks)
        last = parts[-1]
        text, thought = "".join(part.text for part in parts), "".join(part.reasoning for part in parts)
        return Result(text, last.finish_reason, last.usage, last.tool_calls, last.invalid_tool_calls, thought)


def _usage(completion: int) -> Usage:
    return Usage(
        prompt_tokens=7,
        cached_tokens=5,
        completion_tokens=completion,
        dropped_tokens=0,
        prefill_seconds=0.1,
        decode_seconds=0.2,
        cache_bytes=1024,
    )


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM()


@pytest.fixture
def slow_llm() -> FakeLLM:
    return FakeLLM(words=["word "] * 200, delay=0.01)


@pytest.fixture
def call_threads() -> Any:
    """The names of the threads that answer requests now."""

    def names() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "zsmerge-call"]

    return names
