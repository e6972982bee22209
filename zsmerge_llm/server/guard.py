"""What every request passes first: the name by which the server was called, and the size and pace of the body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from zsmerge_llm.server.delivery import json_reply
from zsmerge_llm.server.errors import ErrorReply, anthropic_error, openai_error
from zsmerge_llm.server.settings import ServerSettings, is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

DISCARD_SECONDS = 2.0
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


class Guard:
    """An ASGI application in front of another one.

    Args:
        loopback_only: refuse names that are none of this machine's. A web page elsewhere may otherwise reach a server
            without keys under a name of its own (DNS rebinding).
    """

    def __init__(self, app: App, settings: ServerSettings, loopback_only: bool) -> None:
        self._app = app
        self._settings = settings
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._loopback_only and not _is_local(headers.get("host", "")):
            await self._refuse(
                scope, receive, send, ErrorReply(403, "permission_error", "This server is for local use.")
            )
        elif _length(headers) > self._settings.max_body:
            await self._refuse(scope, receive, send, ErrorReply(413, "request_too_large", self._too_large))
        else:
            await self._app(scope, _Limited(receive, self._settings, self._too_large), _secured(send))

    @property
    def _too_large(self) -> str:
        return f"The body is larger than {self._settings.max_body:,} bytes."

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, reply: ErrorReply) -> None:
        """Send an error, after a while for the client to send its body: it would not read an answer before."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_discard(receive), DISCARD_SECONDS)
        body = anthropic_error if scope["path"].startswith("/v1/messages") else openai_error
        response = json_reply(body(reply), reply.status, {"connection": "close"})
        await response(scope, receive, send)


async def _discard(receive: Receive) -> None:
    while (await receive()).get("more_body", False):
        pass


class _Limited:
    """Receives a body up to a size, and within a time."""

    def __init__(self, receive: Receive, settings: ServerSettings, too_large: str) -> None:
        self._receive = receive
        self._settings = settings
        self._too_large = too_large
        self._ends = time.monotonic() + settings.body_timeout
        self._left = settings.max_body
        self._complete = False

    async def __call__(self) -> Message:
        if self._complete:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._ends - time.monotonic()))
        except asyncio.TimeoutError:
            raise HTTPException(408, "The body did not arrive in time.", {"connection": "close"}) from None
        self._left -= len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._left < 0:
            raise HTTPException(413, self._too_large, {"connection": "close"})
        return message


def _secured(send: Send) -> Send:
    """Return `send`, with headers that keep browsers from guessing what a response is."""

    async def with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name.lower() for name, _ in message["headers"]}
            extra = [(name.encode(), value.encode()) for name, value in SECURITY_HEADERS.items()]
            message["headers"] = [*message["headers"], *(each for each in extra if each[0] not in given)]
        await send(message)

    return with_headers


def _is_local(host: str) -> bool:
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def _length(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0
