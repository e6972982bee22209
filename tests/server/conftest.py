"""A server on this machine, of a tiny random model, as programs reach it: over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.support.asgi_server import running
from tests.support.chat import LARGE_CACHE, make_llm
from zsmerge_llm import LLM
from zsmerge_llm.server.app import create_app
from zsmerge_llm.server.settings import ServerSettings

KEYS = ("key-of-ann-0123456789", "key-of-bob-0123456789")


@contextmanager
def serving(llm: LLM, settings: ServerSettings | None = None, **options: Any) -> Iterator[str]:
    """Serve a model in a thread; yield the address."""
    with running(create_app(llm, settings, **options)) as address:
        yield address


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A tiny model whose answers never end by themselves within the limits of the tests."""
    with make_llm(cache=LARGE_CACHE, sessions_dir=tmp_path_factory.mktemp("sessions"), retrieval_tokens=0) as llm:
        llm.model = "tiny"
        yield llm


@pytest.fixture(scope="module")
def address(llm: LLM) -> Iterator[str]:
    """A server without keys."""
    settings = ServerSettings(
        aliases=("gpt-tiny",), max_tokens=12, max_messages=50, max_body=8_000_000, max_responses=3
    )
    with serving(llm, settings) as address:
        yield address


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of two users."""
    folder: Path = tmp_path_factory.mktemp("locked")
    with make_llm(cache=LARGE_CACHE, sessions_dir=folder, retrieval_tokens=0) as llm:
        llm.model = "tiny"
        with serving(llm, ServerSettings(api_keys=KEYS, max_tokens=12)) as address:
            yield address


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as client:
        yield client


@pytest.fixture
def users(locked: str) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Clients of both users."""
    ann, bob = (httpx.Client(base_url=locked, timeout=60, headers={"authorization": f"Bearer {key}"}) for key in KEYS)
    with ann, bob:
        yield ann, bob


@pytest.fixture
def oai(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


@pytest.fixture
def claude(address: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Wait for something that another thread does."""

    def wait(is_so: Callable[[], bool]) -> None:
        ends = time.monotonic() + 30
        while not is_so():
            assert time.monotonic() < ends
            time.sleep(0.01)

    return wait
