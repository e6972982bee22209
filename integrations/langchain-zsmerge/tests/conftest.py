"""Fixtures: a fake model, and the threads that answer requests."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from langchain_zsmerge import ChatZSMerge

from zsmerge_llm.testing import FakeLLM


@pytest.fixture
def llm() -> FakeLLM:
    return FakeLLM("The sky is blue.")


@pytest.fixture
def chat(llm: FakeLLM) -> ChatZSMerge:
    return ChatZSMerge(llm=llm)


@pytest.fixture
def slow_llm() -> FakeLLM:
    return FakeLLM("word " * 200, delay=0.01)


@pytest.fixture
def call_threads() -> Callable[[], list[str]]:
    """The names of the threads that answer requests now."""
    return lambda: [thread.name for thread in threading.enumerate() if thread.name == "zsmerge-call"]
