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
    """One token per word; a template that writes roles and contents, and refuses to start with an answer."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [len(word) for word in text.split()] + [0] * add_special_tokens

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
    ) -> str:
        from jinja2 import TemplateError

        if messages[0]["role"] == "assistant":
            raise TemplateError("a conversation starts with the user")
        lines = [f"{message['role']} {message['content']}" for message in messages]
        return " ".join([*(["tools"] * len(tools or [])), *lines, *["assistant"] * add_generation_prompt])


@dataclass
class FakeLLM:
    """Answers with `words`, one per chunk, `delay` seconds apart; keeps what it was asked in `requests`."""

    words: list[str] = field(default_factory=lambda: ["The", " sky", " is", " blue."])
    delay: float = 0.0
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    context_window: int | None = 2048
    model: str = "fake"
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    requests: list[dict[str, Any]] = field(default_factory=list)
    decoded: int = 0
    closed: int = 0

    def stream(
        self,
        messages: list[dict[str, Any]],
        *,
        sampling: SamplingParams | None = None,
        tools: list[dict[str, Any]] | None = None,
        session: str | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Chunk]:
        self.requests.append({"messages": messages, "sampling": sampling, "tools": tools, "session": session})
        return self._decode(sampling, cancel, self.tool_calls)

    def chat(self, messages: list[dict[str, Any]], **request: Any) -> Result:
        return self._whole(self.stream(messages, **request))

    def stream_complete(
        self, prompt: str, *, sampling: SamplingParams | None = None, cancel: threading.Event | None = None
    ) -> Iterator[Chunk]:
        self.requests.append({"prompt": prompt, "sampling": sampling})
        return self._decode(sampling, cancel, [])

    def complete(self, prompt: str, **request: Any) -> Result:
        return self._whole(self.stream_complete(prompt, **request))

    def batch_complete(
        self, prompts: list[str], *, sampling: SamplingParams | None = None, cancel: threading.Event | None = None
    ) -> list[Result]:
        self.requests.append({"prompts": prompts, "sampling": sampling})
        return [self._whole(self._decode(sampling, cancel, [])) for _ in prompts]

    def _decode(
        self, sampling: SamplingParams | None, cancel: threading.Event | None, tool_calls: list[dict[str, Any]]
    ) -> Iterator[Chunk]:
        try:
            count = 0
            limit = sampling.max_tokens if sampling and sampling.max_tokens else len(self.words)
            for word in self.words[:limit]:
                if cancel is not None and cancel.is_set():
                    yield Chunk("", "cancelled", _usage(count))
                    return
                time.sleep(self.delay)
                self.decoded += 1
                count += 1
                yield Chunk(word)
            reason = "tool_calls" if tool_calls else "stop"
            yield Chunk("", reason, _usage(count), tool_calls)
        finally:
            self.closed += 1

    def _whole(self, chunks: Iterator[Chunk]) -> Result:
        parts = list(chunks)
        last = parts[-1]
        return Result("".join(part.text for part in parts), last.finish_reason, last.usage, last.tool_calls)


def _usage(completion: int) -> Usage:
    return Usage(
        prompt_tokens=7,
        cached_tokens=5,
        completion_tokens=completion,
        merged_tokens=0,
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
