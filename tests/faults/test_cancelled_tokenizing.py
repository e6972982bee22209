"""A text so long that tokenizing it takes a minute: `cancel` and `timeout` stop that too, whatever the request."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event, Timer
from typing import Any

import pytest

from tests.support.chat import SHORT, Chat, make_llm
from zsmerge_llm import LLM
from zsmerge_llm.errors import DeadlineExceededError

TEXT = "word and more " * 700_000
"""Ten million characters: tokenized in tens of seconds."""
REQUESTS: dict[str, Callable[..., Any]] = {
    "chat": lambda llm, **options: llm.chat(TEXT, sampling=SHORT, **options),
    "continued chat": lambda llm, **options: Chat(llm, "it", llm.known).ask(TEXT, **options),
    "stream": lambda llm, **options: list(llm.stream(TEXT, sampling=SHORT, **options))[-1],
    "complete": lambda llm, **options: llm.complete(TEXT, sampling=SHORT, **options),
    "batch": lambda llm, **options: llm.batch([TEXT, "Hello"], sampling=SHORT, **options)[1],
    "batch_complete": lambda llm, **options: llm.batch_complete([TEXT, "Hello"], sampling=SHORT, **options)[1],
}
SECONDS = 8.0
"""Longest time from the event to the end, on a busy machine."""


@pytest.fixture(scope="module")
def llm() -> LLM:
    made = make_llm()
    chat = Chat(made, "it")
    chat.ask("Hello")
    made.known = chat.messages  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("request_name", REQUESTS)
def test_cancel_stops_tokenizing(llm: LLM, request_name: str) -> None:
    event = Event()
    timer = Timer(0.3, event.set)
    timer.start()
    started = time.monotonic()
    result = REQUESTS[request_name](llm, cancel=event)

    assert time.monotonic() - started < SECONDS
    assert result.finish_reason == "cancelled"
    assert result.usage.completion_tokens == 0
    assert len(llm.store) == 1


@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_timeout_stops_tokenizing(llm: LLM, request_name: str) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        REQUESTS[request_name](llm, timeout=0.3)
    assert time.monotonic() - started < SECONDS


def test_after_it_the_conversation_goes_on(llm: LLM) -> None:
    assert Chat(llm, "it", llm.known).ask("Go on").usage.reuse == "continued"  # type: ignore[attr-defined]
