"""The router: one address for several replicas. Each request goes to the replica that holds its conversation.

It loads no model, and keeps nothing but which conversation the newest responses belong to.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from zsmerge_llm.errors import ZSMergeError
from zsmerge_llm.server.delivery import ClientDisconnectedError, error_response, json_reply
from zsmerge_llm.server.errors import RequestError
from zsmerge_llm.server.guard import Guard
from zsmerge_llm.server.replicas.merging import merge_lists, merge_metrics
from zsmerge_llm.server.replicas.pool import Replica, ReplicaPool
from zsmerge_llm.server.replicas.relay import NONE_ANSWERS, relay
from zsmerge_llm.server.replicas.routing import conversation_key
from zsmerge_llm.server.settings import ServerSettings

LONG_BODY = 1_000_000
"""Bytes from which a body is parsed in a thread, so that other streams go on."""
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
CONNECT_SECONDS = 5.0

RESPONSE_ID = re.compile(rb"resp_[0-9a-f]{32}")
MOST_RESPONSES = 10_000


def create_router(
    replicas: list[Replica],
    settings: ServerSettings | None = None,
    *,
    while_serving: Callable[[], AbstractAsyncContextManager[None]] | None = None,
    loopback_only: bool = True,
) -> Starlette:
    """Return the router as an ASGI application.

    Args:
        settings: of the replicas, which check keys and fields themselves.
        while_serving: a context to serve in, such as `ReplicaProcesses.watched`.
        loopback_only: as for `create_app`.
    """
    settings = settings or ServerSettings()
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # an answer's time is the replica's to limit
    client = httpx.AsyncClient(timeout=timeout, limits=httpx.Limits(max_keepalive_connections=0), trust_env=False)
    pool = ReplicaPool(replicas, client)
    routes = _Routes(pool)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with client, (while_serving or nullcontext)():
            watching = asyncio.ensure_future(pool.watch())
            try:
                yield
            finally:
                watching.cancel()

    kinds = (ZSMergeError, HTTPException, ClientDisconnectedError, Exception)
    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/v1/sessions", routes.union, methods=["GET"]),
            Route("/v1/documents", routes.union, methods=["GET"]),
            Route("/v1/sessions/{name}", routes.delete, methods=["DELETE"]),
            Route("/v1/documents/{name}", routes.delete, methods=["DELETE"]),
            Route("/{path:path}", routes.pass_on, methods=METHODS),
        ],
        exception_handlers=dict.fromkeys(kinds, error_response),
        lifespan=lifespan,
    )
    app.add_middleware(Guard, settings=settings, loopback_only=loopback_only and not settings.api_keys)
    return app


class _Routes:
    def __init__(self, pool: ReplicaPool) -> None:
        self._pool = pool
        self._responses = ResponseKeys()

    async def health(self, request: Request) -> Response:
        """Say which replicas answer; 503 where none does."""
        replicas = self._pool.replicas
        answering = len(self._pool.answering)
        status = "ok" if answering == len(replicas) else "degraded" if answering else "unavailable"
        listed = [{"replica": each.number, "answers": each.answers, "restarts": each.restarts} for each in replicas]
        return json_reply({"status": status, "loaded": answering > 0, "replicas": listed}, 200 if answering else 503)

    async def metrics(self, request: Request) -> Response:
        """Return the figures of all replicas, each with the label `replica`."""
        replies = await self._ask_all(request)
        if refused := _refusal(replies):
            return refused
        texts = {number: bytes(reply.body).decode() for number, reply in replies.items()}
        headers = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}
        return Response(merge_metrics(texts, self._pool.replicas), headers=headers)

    async def union(self, request: Request) -> Response:
        """Return the union of what all replicas list."""
        replies = await self._ask_all(request)
        if refused := _refusal(replies):
            return refused
        lists = [json.loads(bytes(reply.body))["data"] for reply in replies.values()]
        return json_reply({"object": "list", "data": merge_lists(lists)})

    async def delete(self, request: Request) -> Response:
        """Delete a session everywhere: several replicas may hold it in memory."""
        replies = list((await self._ask_all(request)).values())
        return min(replies, key=lambda reply: reply.status_code)

    async def pass_on(self, request: Request) -> Response:
        """Pass a request on to the replica that holds its conversation."""
        try:
            body = await request.body()
        except ClientDisconnect as error:
            raise ClientDisconnectedError from error
        content = await asyncio.to_thread(_parse, body) if len(body) > LONG_BODY else _parse(body)
        key = self._responses.find(content) or conversation_key(
            request.url.path, request.query_params, request.headers, content
        )
        reply = await relay(request, body, self._pool, key)
        return self._responses.notice(reply, key) if request.url.path == "/v1/responses" else reply

    async def _ask_all(self, request: Request) -> dict[int, Response]:
        """Return the replies of all replicas that answer, by their numbers. Raises RequestError: none does."""
        asked = self._pool.answering
        body = await request.body()

        async def ask(replica: Replica) -> Response:
            alone = ReplicaPool([replica], self._pool.client)
            return await relay(request, body, alone, "")

        replies = await asyncio.gather(*(ask(each) for each in asked), return_exceptions=True)
        found = {each.number: reply for each, reply in zip(asked, replies, strict=True) if isinstance(reply, Response)}
        if not found:
            raise RequestError(NONE_ANSWERS)
        return found


def _parse(body: bytes) -> Any:
    """Return the JSON of a body; None where it is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _refusal(replies: dict[int, Response]) -> Response | None:
    """Return a reply that is an error, if there is one."""
    return next((reply for reply in replies.values() if reply.status_code != 200), None)


class ResponseKeys:
    """Which conversations the newest responses belong to: a request may name nothing but the response before it."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, str] = OrderedDict()

    def find(self, body: Any) -> str | None:
        """Return the key of the conversation that a request goes on with, if it names an earlier response."""
        name = body.get("previous_response_id") if isinstance(body, dict) else None
        return self._keys.get(name) if isinstance(name, str) else None

    def notice(self, reply: Response, key: str) -> Response:
        """Return a reply to /v1/responses; its id is recorded, here or while it is sent."""
        if isinstance(reply, StreamingResponse):
            reply.body_iterator = self._watch(reply.body_iterator, key)
        else:
            self._record(bytes(reply.body), key)
        return reply

    async def _watch(self, parts: Any, key: str) -> AsyncIterator[Any]:
        is_first = True
        async for part in parts:
            if is_first:
                self._record(part, key)
            is_first = False
            yield part

    def _record(self, content: bytes, key: str) -> None:
        if found := RESPONSE_ID.search(content):
            self._keys[found[0].decode()] = key
            if len(self._keys) > MOST_RESPONSES:
                self._keys.popitem(last=False)
