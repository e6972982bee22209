"""Fixtures: a tiny random model, LlamaIndex's events, and a wait for what another thread does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler

from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.testing import tiny_model


@pytest.fixture
def wait() -> Callable[[Callable[[], bool]], None]:
    """Waits until a condition holds, for at most five seconds."""

    def until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end, "the condition did not come true within 5 seconds"
            time.sleep(0.005)

    return until


class RecordedEvents(BaseEventHandler):
    """Records the names of LlamaIndex's events, and the usage of the models' answers."""

    names: list[str]
    usages: list[dict[str, Any]]

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.names.append(event.class_name())
        if event.class_name() == "LLMChatEndEvent":
            self.usages.append(event.response.raw["usage"])


@pytest.fixture
def events() -> Iterator[RecordedEvents]:
    """All events while the test runs."""
    handler = RecordedEvents(names=[], usages=[])
    get_dispatcher().add_event_handler(handler)
    yield handler
    get_dispatcher().event_handlers.remove(handler)


@pytest.fixture(scope="session")
def tiny_parts() -> tuple[Any, Any]:
    """The random model and its tokenizer."""
    return tiny_model()


@pytest.fixture
def tiny(tiny_parts: tuple[Any, Any]) -> LLM:
    """The random model with a cache that no test fills, and without sessions of other tests."""
    model, tokenizer = tiny_parts
    return LLM(model, tokenizer=tokenizer, cache=CacheConfig(slots=8192))
