"""`zsmerge-llm serve --replicas` as a process: replicas are killed, and conversations go on as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.asgi_server import running
from tests.support.chat import equal_caches
from tests.support.server_process import ROOT, SERVE, server_process
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.server.replicas.processes import ReplicaProcesses, ReplicaSettings
from zsmerge_llm.server.replicas.router import create_router

SLOTS, TOKENS = 256, 24
QUESTIONS = ("Tell me about the sea.", "And about ships?", "What does a keeper do?", "Sum it up.")
START_SECONDS = 90


@contextmanager
def replicas(folder: Path, number: int) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """Serve SmolLM2 in several processes; yield a client of the router, and the router's process."""
    options = ["--sessions-dir", str(folder), "--slots", str(SLOTS), "--replicas", str(number)]
    with (
        server_process(options, {"OMP_NUM_THREADS": "1"}, START_SECONDS) as (address, pid),
        httpx.Client(base_url=address, timeout=START_SECONDS) as client,
    ):
        yield client, psutil.Process(pid)


def processes(router: psutil.Process) -> list[psutil.Process]:
    """Return the replicas' processes."""
    return [each for each in router.children() if any("spawn_main" in word for word in each.cmdline())]


def kill_the_busy_one(router: psutil.Process) -> None:
    """Kill the replica that the router keeps a connection to; its checks last a moment only."""
    ends = time.monotonic() + 10
    while time.monotonic() < ends:
        busy = [
            [each for each in processes(router) if any(open.status == "ESTABLISHED" for open in each.net_connections())]
            for _ in range(3)
        ]
        if all(len(each) == 1 for each in busy) and busy[0] == busy[-1]:
            busy[0][0].kill()
            return
    raise AssertionError("no replica was found busy")


def wait_for_all(client: httpx.Client) -> None:
    ends = time.monotonic() + START_SECONDS
    while client.get("/health").json()["status"] != "ok":
        assert time.monotonic() < ends
        time.sleep(0.2)


def events(client: httpx.Client, messages: list[dict[str, Any]], kill: Any = None) -> list[dict[str, Any]]:
    """Return the events of an answer. kill: called after the fifth."""
    body = {"model": "smollm2", "messages": messages, "max_tokens": TOKENS, "stream": True}
    found = []
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line[6:]))
                if len(found) == 5 and kill is not None:
                    kill()
    return found


def answer(client: httpx.Client, messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = {"model": "smollm2", "messages": messages, "max_tokens": TOKENS}
    return dict(client.post("/v1/chat/completions", json=body).raise_for_status().json())


@pytest.mark.slow
def test_a_turn_goes_on_elsewhere_bit_for_bit_after_its_replica_was_killed(tmp_path: Path) -> None:
    settings = {"cache": CacheConfig(slots=SLOTS), "compile": False}  # compiled steps round otherwise than eager ones
    own = ReplicaProcesses([ReplicaSettings("smollm2", {**settings, "sessions_dir": str(tmp_path)}) for _ in range(2)])
    messages: list[dict[str, Any]] = []
    name = ""
    own.start()
    with (
        running(create_router(own.replicas, while_serving=own.watched)) as address,
        httpx.Client(base_url=address, timeout=START_SECONDS) as client,
    ):
        for question in QUESTIONS[:3]:
            messages.append({"role": "user", "content": question})
            if len(messages) > 1:
                wait_for_all(client)
                broken = events(client, messages, lambda: kill_the_busy_one(psutil.Process()))
                assert broken[-1]["error"]["code"] == "replica_lost"
            found = answer(client, messages)  # at once: the other replica
            assert found["usage"]["zsmerge"]["reuse"] == ("continued" if len(messages) > 1 else "new")
            assert name in ("", found["session_id"])
            name = found["session_id"]
            messages.append(found["choices"][0]["message"])
        wait_for_all(client)
        assert sum(replica.restarts for replica in own.replicas) == 2
    assert not processes(psutil.Process())

    with LLM("smollm2", **settings) as alone, LLM("smollm2", **settings, sessions_dir=tmp_path) as kept:
        undisturbed: list[dict[str, Any]] = []
        for question in QUESTIONS[:3]:
            undisturbed.append({"role": "user", "content": question})
            result = alone.chat(undisturbed, session="alone", sampling=SamplingParams(max_tokens=TOKENS))
            undisturbed.append({"role": "assistant", "content": result.text})
        assert [each["content"] for each in messages] == [each["content"] for each in undisturbed]
        assert kept.session(name).tokens == alone.session("alone").tokens
        assert equal_caches(kept.session(name).cache, alone.session("alone").cache)  # with its logits


@pytest.mark.slow
def test_after_all_replicas_were_killed_every_answered_conversation_goes_on(tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": f"({number}) {QUESTIONS[0]}"}] for number in range(4)]
    with replicas(tmp_path, 2) as (client, router):
        for messages in chats:
            messages.append(answer(client, messages)["choices"][0]["message"])
        for each in processes(router):
            each.kill()
        reply = client.post("/v1/chat/completions", json={"model": "smollm2", "messages": chats[0]})
        assert reply.status_code == 503
        wait_for_all(client)
        for messages in chats:
            messages.append({"role": "user", "content": QUESTIONS[1]})
            assert answer(client, messages)["usage"]["zsmerge"]["reuse"] == "continued"


@pytest.mark.slow
def test_replicas_end_with_a_router_that_was_killed(tmp_path: Path) -> None:
    with replicas(tmp_path, 2) as (_, router):
        children = processes(router)
        router.kill()
        gone, alive = psutil.wait_procs(children, timeout=30)
        assert len(gone) == 2
        assert not alive


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--replicas", "2", "--no-keep"], "leave out --no-keep"),
        (["--replicas", "2", "--model", "no/such-folder/x"], "no/such-folder"),
    ],
)
def test_what_replicas_cannot_serve_is_said_in_one_line(options: list[str], remedy: str) -> None:
    done = subprocess.run([*SERVE, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert remedy in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
