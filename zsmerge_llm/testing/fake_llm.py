"""`FakeLLM`: the public surface of `LLM`, answered from a script."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from threading import Event, Lock
from typing import Any, Literal

from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.engine.scheduling import Deadline
from zsmerge_llm.types import Chunk, FinishReason, Message, Progress, Result, ToolCallDelta, Usage

FAKE_USAGE = Usage(
    prompt_tokens=7,
    cached_tokens=5,
    completion_tokens=0,
    dropped_tokens=1,
    prefill_seconds=0.1,
    decode_seconds=0.2,
    cache_bytes=1024,
)


def scripted_answer(
    text: str = "",
    *functions: dict[str, Any],
    ids: bool = True,
    invalid_tool_calls: Sequence[dict[str, Any]] = (),
    reasoning: str = "",
) -> Result:
    """Return an answer for `FakeLLM`. `functions`: `{"name": ..., "arguments": ...}` of its tool calls, with or
    without ids."""
    calls = [
        {"type": "function", "function": function} | ({"id": f"id_{index}"} if ids else {})
        for index, function in enumerate(functions)
    ]
    reason: FinishReason = "tool_calls" if calls else "stop"
    return Result(text, reason, FAKE_USAGE, calls, list(invalid_tool_calls), reasoning)


@dataclass(frozen=True)
class FakeRequest:
    """One request: the method that began it, its prompt (messages, a text or several texts) and its keywords."""

    method: Literal["chat", "complete", "batch_complete"]
    prompt: Any
    sampling: SamplingParams | None = None
    tools: Sequence[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] | None = None
    grammar: Any = None
    session: Any = None
    namespace: str | None = None
    probe: str | None = None
    reread: bool = False
    retry_invalid: bool = False
    template_args: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    timeout: float | None = None
    priority: int = 0
    cancel: Event | None = None


class FakeTokenizer:
    """One token per word; its id is the word's length."""

    def encode(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        return [len(word) for word in text.split()] + [0] * add_special_tokens


@dataclass(frozen=True)
class FakeSession:
    """What `FakeLLM.read_document` returns."""

    name: str


@dataclass(frozen=True)
class FakeStore:
    """As much of `LLM.store` as an integration reads."""

    fingerprint: str = "fake"


class FakeLLM:
    """Answer from a script, one word per chunk, calls in pieces, and record every request.

    Args:
        answers: texts or `scripted_answer` results, given in order; the last one repeats. Assign `answers` to change
            the script.
        delay: seconds per word, and per document read.
        error: an exception that every request raises.

    Attributes:
        requests: what was asked, oldest first.
        decoded_words, closed_streams: words generated and streams ended, left or closed so far.
        threads: ids of the threads that have run a request.
        documents: text of each document read, by session name; documents_read: how often one was read.
    """

    def __init__(self, *answers: str | Result, delay: float = 0.0, error: Exception | None = None) -> None:
        self.answers = list(answers) or ["The sky is blue."]
        self.delay = delay
        self.error = error
        self.model = self.name = "fake"
        self.cache = CacheConfig()
        self.context_window: int | None = 2048
        self.tokenizer = FakeTokenizer()
        self.store = FakeStore()
        self.requests: list[FakeRequest] = []
        self.threads: set[int] = set()
        self.documents: dict[str, str] = {}
        self.decoded_words = self.closed_streams = self.documents_read = 0
        self.is_warm = False
        self._lock = Lock()

    def warm_up(self) -> None:
        """As `LLM.warm_up`; sets `is_warm`."""
        self.is_warm = True

    def chat(self, messages: list[Message], **request: Any) -> Result:
        """As `LLM.chat`."""
        return _collect(self.stream(messages, **request))

    def stream(self, messages: list[Message], *, progress: Progress | None = None, **request: Any) -> Iterator[Chunk]:
        """As `LLM.stream`. Raises TypeError on a keyword that `LLM.stream` does not have."""
        return self._answer(FakeRequest("chat", messages, **request))

    def complete(self, prompt: str, **request: Any) -> Result:
        """As `LLM.complete`."""
        return _collect(self.stream_complete(prompt, **request))

    def stream_complete(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        response_format: dict[str, Any] | None = None,
        grammar: Any = None,
        cancel: Event | None = None,
        timeout: float | None = None,
        priority: int = 0,
        progress: Progress | None = None,
    ) -> Iterator[Chunk]:
        """As `LLM.stream_complete`."""
        request = FakeRequest("complete", prompt, sampling, response_format=response_format, grammar=grammar)
        return self._answer(replace(request, cancel=cancel, timeout=timeout, priority=priority))

    def batch_complete(
        self,
        prompts: Sequence[str],
        *,
        sampling: SamplingParams | None = None,
        response_format: dict[str, Any] | None = None,
        grammar: Any = None,
        cancel: Event | None = None,
        timeout: float | None = None,
        priority: int = 0,
    ) -> list[Result]:
        """As `LLM.batch_complete`."""
        request = FakeRequest("batch_complete", prompts, sampling, response_format=response_format, grammar=grammar)
        request = replace(request, cancel=cancel, timeout=timeout, priority=priority)
        self._record(request)
        return [_collect(self._decode(request)) for _ in prompts]

    def count_prompt_tokens(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> int:
        """Count one token for each word, role, tool and the beginning of the answer."""
        words = [word for message in messages for word in [message["role"], *message["content"].split()]]
        return len(words) + len(tools or ()) + (messages[-1]["role"] != "assistant")

    def read_document(
        self,
        document: Any = None,
        *,
        text: str | None = None,
        name: str | None = None,
        probe: str | None = None,
        notes: str | bool = False,
        cancel: Event | None = None,
        progress: Progress | None = None,
    ) -> FakeSession:
        """As `LLM.read_document`; a text that is in `documents` is not read again."""
        read = str(document if text is None else text)
        with self._lock:
            name = name or f"document-{abs(hash(read)):x}"
            if self.documents.get(name) != read:
                time.sleep(self.delay)
                self.documents[name] = read
                self.documents_read += 1
            self.document_probe, self.document_notes = probe, notes
            return FakeSession(name)

    def _answer(self, request: FakeRequest) -> Iterator[Chunk]:
        self._record(request)
        yield from self._decode(request)

    def _record(self, request: FakeRequest) -> None:
        self.requests.append(request)
        self.threads.add(threading.get_ident())
        if self.error is not None:
            raise self.error

    def _decode(self, request: FakeRequest) -> Iterator[Chunk]:
        with self._lock:
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        answer = scripted_answer(answer) if isinstance(answer, str) else answer
        limit = request.sampling.max_tokens if request.sampling else None
        stop = request.cancel if request.timeout is None else Deadline(request.cancel, request.timeout)
        reason, count = answer.finish_reason, 0
        try:
            if answer.reasoning:
                yield Chunk("", reasoning=answer.reasoning)
            for word in re.findall(r"\S+\s*", answer.text)[:limit]:
                if stop is not None and stop.is_set():
                    reason = "cancelled"
                    break
                time.sleep(self.delay)
                self.decoded_words, count = self.decoded_words + 1, count + 1
                yield Chunk(word)
            for delta in _deltas(answer.tool_calls) if reason != "cancelled" else ():
                yield Chunk("", tool_call_deltas=[delta])
            if isinstance(stop, Deadline):
                stop.check()
            usage = replace(FAKE_USAGE, completion_tokens=count)
            yield Chunk("", reason, usage, answer.tool_calls, answer.invalid_tool_calls)
        finally:
            self.closed_streams += 1


def _deltas(calls: Sequence[dict[str, Any]]) -> Iterator[ToolCallDelta]:
    """Yield the id and name of each call, and then its arguments in pieces."""
    for index, call in enumerate(calls):
        function = call["function"]
        yield ToolCallDelta(index, "", call.get("id") or "", function["name"])
        given = function.get("arguments") or ""
        for piece in re.findall(r"(?s).{1,8}", given if isinstance(given, str) else json.dumps(given)):
            yield ToolCallDelta(index, piece)


def _collect(chunks: Iterator[Chunk]) -> Result:
    parts = list(chunks)
    last = parts[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    text, reasoning = "".join(part.text for part in parts), "".join(part.reasoning for part in parts)
    return Result(text, last.finish_reason, last.usage, last.tool_calls, last.invalid_tool_calls, reasoning)
