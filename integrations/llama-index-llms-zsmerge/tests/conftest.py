"""A stand-in for `zsmerge_llm.LLM`, so that the integration is tested without a model."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from zsmerge_llm import CacheConfig
from zsmerge_llm.types import Chunk, Result, Usage


class FakeLLM:
    """The surface of `zsmerge_llm.LLM`. Answers from a script (the last answer repeats) and writes down every call.

    `delay` is the time of one token in seconds; `produced` counts tokens generated. One request runs at a time.
    """

    def __init__(self, *answers: str | Result, delay: float = 0.0) -> None:
        self.model = "fake"
        self.cache = CacheConfig()
        self.answers = list(answers) or ["Paris is the capital."]
        self.delay = delay
        self.calls: list[SimpleNamespace] = []
        self.threads: set[int] = set()
        self.produced = 0
        self.closed = 0
        self.error: Exception | None = None
        self.tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: list(range(len(text.split()))))
        self._lock = threading.Lock()

    def chat(self, messages: Any, *, sampling=None, tools=None, session=None, cancel=None) -> Result:
        return self._whole(self.stream(messages, sampling=sampling, tools=tools, session=session, cancel=cancel))

    def complete(self, prompt: str, *, sampling=None, cancel=None) -> Result:
        return self._whole(self.stream_complete(prompt, sampling=sampling, cancel=cancel))

    def stream(self, messages: Any, *, sampling=None, tools=None, session=None, cancel=None) -> Iterator[Chunk]:
        call = SimpleNamespace(
            kind="chat", prompt=messages, sampling=sampling, tools=tools, session=session, cancel=cancel
        )
        return self._stream(call)

    def stream_complete(self, prompt: str, *, sampling=None, cancel=None) -> Iterator[Chunk]:
        return self._stream(SimpleNamespace(kind="complete", prompt=prompt, sampling=sampling, cancel=cancel))

    def _whole(self, chunks: Iterator[Chunk]) -> Result:
        seen = list(chunks)
        calls = [call for chunk in seen for call in chunk.tool_calls]
        last = seen[-1]
        return Result("".join(chunk.text for chunk in seen), last.finish_reason, last.usage, calls)

    def _stream(self, call: SimpleNamespace) -> Iterator[Chunk]:
        with self._lock:
            self.calls.append(call)
            self.threads.add(threading.get_ident())
            if self.error is not None:
                raise self.error
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            text, tool_calls = (answer, []) if isinstance(answer, str) else (answer.text, answer.tool_calls)
            written, reason = 0, "tool_calls" if tool_calls else "stop"
            try:
                for word in re.findall(r"\S+\s*", text):
                    if call.cancel is not None and call.cancel.is_set():
                        reason = "cancelled"
                        break
                    time.sleep(self.delay)
                    self.produced, written = self.produced + 1, written + 1
                    yield Chunk(word)
                yield Chunk("", reason, self._usage(call.prompt, written), tool_calls)
            finally:
                self.closed += 1

    def _usage(self, prompt: Any, written: int) -> Usage:
        return Usage(
            prompt_tokens=len(str(prompt).split()),
            cached_tokens=2,
            completion_tokens=written,
            merged_tokens=1,
            prefill_seconds=0.1,
            decode_seconds=0.2,
            cache_bytes=1024,
        )


@pytest.fixture
def fake() -> Callable[..., FakeLLM]:
    """Makes a FakeLLM: `fake("first answer", "second answer", delay=0.01)`."""
    return FakeLLM


@pytest.fixture
def result() -> Callable[..., Result]:
    """Makes a scripted answer with tool calls: `result("text", {"name": ..., "arguments": {...}})`."""

    def make(text: str, *functions: dict[str, Any], ids: bool = True) -> Result:
        calls = [
            {"type": "function", "function": function} | ({"id": f"id_{n}"} if ids else {})
            for n, function in enumerate(functions)
        ]
        return Result(text, "tool_calls", Usage(1, 0, 1, 0, 0.0, 0.0, 0), calls)

    return make


@pytest.fixture
def wait() -> Callable[[Callable[[], bool]], None]:
    """Waits until a condition holds, for at most five seconds."""

    def until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end, "the condition did not come true within 5 seconds"
            time.sleep(0.005)

    return until
