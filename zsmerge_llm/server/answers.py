"""Answers to requests, whole or as events, and who asks for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Event
from typing import Annotated

from fastapi import Depends, Request
from starlette.responses import Response

from zsmerge_llm import aio
from zsmerge_llm.server.delivery import EventForm, Events, run, stream
from zsmerge_llm.server.errors import ErrorReply, RequestError
from zsmerge_llm.server.metrics import Metrics
from zsmerge_llm.server.requests import Context
from zsmerge_llm.types import Chunk, Result


def _context(request: Request) -> Context:
    """Return who asks. Raises RequestError: without one of the keys."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key")
    state = request.app.state
    try:
        return Context(state.llm, state.settings, state.settings.owner(key))
    except PermissionError:
        message = "This needs an API key: send it as `Authorization: Bearer ...` or `x-api-key`."
        raise RequestError(ErrorReply(401, "authentication_error", message, "invalid_api_key")) from None


def _answers(request: Request) -> Answers:
    return Answers(request, request.app.state.metrics)


class Answers:
    """Answers one request, and counts it."""

    def __init__(self, request: Request, metrics: Metrics) -> None:
        self._request = request
        self._metrics = metrics

    async def whole(self, work: Callable[[Event], Result]) -> Result:
        """Return a whole answer. Raises as `run`."""
        started = time.monotonic()
        try:
            result = await run(self._request, work)
        except BaseException:
            self._metrics.fail()
            raise
        self._metrics.record(result.usage, result.finish_reason, time.monotonic() - started)
        return result

    async def events(self, work: Callable[[Event], Iterator[Chunk]], events: Events, form: EventForm) -> Response:
        """Return a response that sends an answer as events. Raises as `stream`."""
        return await stream(self._metrics.watch(aio.stream(work)), events, form)


Asking = Annotated[Context, Depends(_context)]
Answering = Annotated[Answers, Depends(_answers)]
