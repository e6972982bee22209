"""`zsmerge-llm serve` as a process: what it refuses, and that a conversation goes on after a restart."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server_process import ROOT, SERVE, server_process

KEY = "a-key-of-some-length"


@contextmanager
def server(folder: Path, stop: signal.Signals) -> Iterator[httpx.Client]:
    """Start a server of SmolLM2; yield a client of it. At the end it gets the signal."""
    options = ["--sessions-dir", str(folder), "--slots", "256"]
    with (
        server_process(options, {"ZSMERGE_API_KEYS": KEY}, 120, stop) as (address, _),
        httpx.Client(base_url=address, timeout=120, headers={"x-api-key": KEY}) as client,
    ):
        yield client


def ask(client: httpx.Client, messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"model": "smollm2", "messages": messages, "max_tokens": 16}
    answer: dict[str, Any] = client.post("/v1/chat/completions", json=body).json()
    return answer


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--workers", "2"], "--replicas"),
        (["--host", "0.0.0.0"], "ZSMERGE_API_KEYS"),
        (["--api-key-file", "no/such/file"], "one API key a line"),
    ],
)
def test_what_cannot_be_served_is_said_with_the_remedy(options: list[str], remedy: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "ZSMERGE_API_KEYS"}
    done = subprocess.run([*SERVE, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert remedy in " ".join(done.stderr.split())


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_a_conversation_goes_on_after_the_server_was_stopped_or_killed(tmp_path: Path, stop: signal.Signals) -> None:
    messages = [{"role": "user", "content": "What is the capital of Germany?"}]
    with server(tmp_path, stop) as client:
        assert client.get("/v1/sessions", headers={"x-api-key": "another"}).status_code == 401
        first = ask(client, messages)
    assert "Berlin" in first["choices"][0]["message"]["content"]
    messages += [first["choices"][0]["message"], {"role": "user", "content": "And of France?"}]
    with server(tmp_path, stop) as client:
        second = ask(client, messages)
        assert second["usage"]["zsmerge"]["reuse"] == "continued"
        assert second["session_id"] == first["session_id"]
