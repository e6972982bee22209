"""What the router makes of replicas that die, are full, or have clients that leave: with stand-ins for replicas."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.support.asgi_server import running
from zsmerge_llm.server.replicas.pool import Replica
from zsmerge_llm.server.replicas.router import create_router
from zsmerge_llm.server.settings import ServerSettings

HELLO = [{"role": "user", "content": "Hello"}]
EVENTS = {
    "/v1/chat/completions": [
        'data: {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": '
        '[{"index": 0, "delta": {"content": "Hel"}, "finish_reason": null}]}\n\n'
    ],
    "/v1/responses": [
        'event: response.output_text.delta\ndata: {"type": "response.output_text.delta", "delta": "Hel"}\n\n'
    ],
    "/v1/messages": ['event: ping\ndata: {"type": "ping"}\n\n'],
}
ENDS = {
    "/v1/chat/completions": "data: [DONE]\n\n",
    "/v1/responses": 'event: response.completed\ndata: {"type": "response.completed"}\n\n',
    "/v1/messages": 'event: message_stop\ndata: {"type": "message_stop"}\n\n',
}


@contextmanager
def router(*addresses: str, settings: ServerSettings | None = None) -> Iterator[tuple[httpx.Client, list[Replica]]]:
    """Serve a router of replicas; yield a client of it, and the replicas."""
    replicas = [Replica(number) for number in range(len(addresses))]
    for replica, address in zip(replicas, addresses, strict=True):
        replica.listen(address)
    with running(create_router(replicas, settings)) as address, httpx.Client(base_url=address, timeout=30) as client:
        yield client, replicas


@contextmanager
def dying_replica(head: bytes, requests: list[bytes]) -> Iterator[str]:
    """A replica that takes a request, answers with some bytes, and is gone."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    received = connection.recv(1_000_000)
                    if b"/health" not in received:
                        requests.append(received)
                        connection.sendall(head)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def stand_in(handler: Any) -> Starlette:
    """A replica whose routes are all one handler."""
    health = Route("/health", lambda request: JSONResponse({"status": "ok"}))
    return Starlette(routes=[health, Route("/{path:path}", handler, methods=["GET", "POST", "DELETE"])])


def streaming(*parts: str) -> Any:
    """A handler that sends these parts of an event stream and ends."""

    async def handler(request: Request) -> Response:
        async def body() -> AsyncIterator[str]:
            for part in parts:
                yield part

        return StreamingResponse(body(), media_type="text/event-stream")

    return handler


def head_of(*events: str) -> bytes:
    """The bytes of a response that has begun to stream."""
    start = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return (start + "".join(f"{len(event):x}\r\n{event}\r\n" for event in events)).encode()


@pytest.mark.parametrize("path", EVENTS)
@pytest.mark.parametrize("cut", ["between two events", "within an event", "as if it were complete"])
def test_a_stream_that_breaks_ends_with_an_error_of_its_dialect(path: str, cut: str) -> None:
    events = EVENTS[path] + ['data: {"cho'] * (cut == "within an event")
    replica = running(stand_in(streaming(*events))) if "complete" in cut else dying_replica(head_of(*events), [])
    with replica as address, router(address) as (client, _):
        text = client.post(path, json={"messages": HELLO, "stream": True}).text
    blocks = [block for block in text.split("\n\n") if block]
    assert blocks[0] + "\n\n" == EVENTS[path][0]
    error = json.loads(blocks[1].partition("data: ")[2])
    assert "ended" in error["error"]["message"]
    assert blocks[2:] == (["data: [DONE]"] if path == "/v1/chat/completions" else [])
    assert blocks[1].startswith("event: error\n") != (path == "/v1/chat/completions")


@pytest.mark.parametrize("path", EVENTS)
def test_a_complete_stream_passes_through_byte_by_byte(path: str) -> None:
    whole = [*EVENTS[path], ": ping\n\n", ENDS[path]]
    pieces = [piece for event in whole for piece in (event[:7], event[7:])]
    with running(stand_in(streaming(*pieces))) as address, router(address) as (client, _):
        assert client.post(path, json={"messages": HELLO}).text == "".join(whole)


def test_the_vendors_clients_raise_their_own_errors_when_a_replica_dies() -> None:
    start = json.dumps({"type": "message_start", "message": {"id": "m", "type": "message", "role": "assistant",
                        "content": [], "model": "m", "usage": {"input_tokens": 0, "output_tokens": 0}}})  # fmt: skip
    head = head_of(EVENTS["/v1/chat/completions"][0]), head_of(f"event: message_start\ndata: {start}\n\n")
    with dying_replica(head[0], []) as address, router(address) as (client, _):
        oai = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIError, match="ended"):
            list(oai.chat.completions.create(model="m", messages=HELLO, stream=True))
    with dying_replica(head[1], []) as address, router(address) as (client, _):
        claude = anthropic.Anthropic(base_url=str(client.base_url), api_key="none", max_retries=0)
        with pytest.raises(anthropic.APIError, match="ended"):
            list(claude.messages.create(model="m", messages=HELLO, max_tokens=9, stream=True))


def test_what_ended_one_replica_is_not_sent_to_the_next_but_reading_is() -> None:
    asked: list[bytes] = []
    with dying_replica(b"", asked) as one, dying_replica(b"", asked) as two, router(one, two) as (client, _):
        reply = client.post("/v1/messages", json={"messages": HELLO})
        assert reply.status_code == 503
        assert reply.json()["error"]["type"] == "api_error"
        assert reply.headers["retry-after"] == "1"
        assert len(asked) == 1
    with dying_replica(b"", asked) as one, dying_replica(b"", asked) as two, router(one, two) as (client, _):
        assert client.get("/v1/models").json()["error"]["code"] == "no_replica"
        assert len(asked) == 3


def test_a_replica_that_is_gone_is_passed_over() -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        closed = f"http://127.0.0.1:{gone.getsockname()[1]}"

    async def answer(request: Request) -> Response:
        return JSONResponse({"path": request.url.path})

    with running(stand_in(answer)) as address, router(closed, address) as (client, replicas):
        for number in range(20):
            body = {"messages": [{"role": "user", "content": str(number)}]}
            assert client.post("/v1/chat/completions", json=body).json() == {"path": "/v1/chat/completions"}
        assert [replica.answers for replica in replicas] == [False, True]
        assert client.get("/health").json()["status"] == "degraded"


def test_a_full_queue_is_told_as_the_replica_tells_it() -> None:
    async def refuse(request: Request) -> Response:
        return JSONResponse({"error": {"code": "queue_full"}}, 429, {"Retry-After": "1", "x-own": "kept"})

    with running(stand_in(refuse)) as address, router(address) as (client, _):
        reply = client.post("/v1/chat/completions", json={"messages": HELLO})
    assert (reply.status_code, reply.json()) == (429, {"error": {"code": "queue_full"}})
    assert reply.headers["retry-after"] == "1"
    assert reply.headers["x-own"] == "kept"


@pytest.mark.parametrize("streams", [True, False])
def test_the_replica_learns_at_once_that_a_client_is_gone(streams: bool) -> None:
    ended = threading.Event()

    async def handler(request: Request) -> Response:
        async def body() -> AsyncIterator[str]:
            try:
                while True:
                    yield EVENTS["/v1/chat/completions"][0]
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        if streams:
            return StreamingResponse(body(), media_type="text/event-stream")
        await request.body()
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        ended.set()
        return Response()

    with running(stand_in(handler)) as address, router(address) as (client, _):
        if streams:
            with client.stream("POST", "/v1/chat/completions", json={"messages": HELLO}) as reply:
                next(reply.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/chat/completions", json={"messages": HELLO}, timeout=0.3)
        assert ended.wait(5)


def test_no_event_waits_for_the_next_one() -> None:
    async def handler(request: Request) -> Response:
        async def body() -> AsyncIterator[str]:
            for _ in range(3):
                yield EVENTS["/v1/chat/completions"][0]
                await asyncio.sleep(0.3)
            yield ENDS["/v1/chat/completions"]

        return StreamingResponse(body(), media_type="text/event-stream")

    with running(stand_in(handler)) as address, router(address) as (client, _):
        began, times = time.monotonic(), []
        with client.stream("POST", "/v1/chat/completions", json={"messages": HELLO}) as reply:
            times = [time.monotonic() - began for _ in reply.iter_bytes()]
    assert times[0] < 0.25
    assert times[-1] > 0.85


def test_hung_replicas_are_passed_over_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zsmerge_llm.server.replicas.pool.CHECK_SECONDS", 0.02)
    well = True
    app = Starlette(routes=[Route("/health", lambda request: Response(status_code=200 if well else 500))])

    def wait_for(answers: bool) -> None:
        ends = time.monotonic() + 5
        while replicas[0].answers != answers:
            assert time.monotonic() < ends
            time.sleep(0.01)

    with running(app) as address, router(address) as (client, replicas):
        well = False
        wait_for(False)
        assert client.get("/health").status_code == 503
        assert client.post("/v1/chat/completions", json={}).json()["error"]["code"] == "no_replica"
        well = True
        wait_for(True)
        assert client.get("/health").json()["status"] == "ok"


def test_a_router_without_keys_answers_to_local_names_and_bodies_of_a_size_only() -> None:
    with router("http://127.0.0.1:9", settings=ServerSettings(max_body=1000)) as (client, _):
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 403
        assert client.post("/v1/messages", content=b"x" * 2000).json()["error"]["type"] == "request_too_large"
