"""The server as an ASGI application: `create_app(LLM("smollm2"))`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from zsmerge_llm import __version__
from zsmerge_llm.errors import ZSMergeError
from zsmerge_llm.server import chat_routes, pages, session_routes
from zsmerge_llm.server.delivery import ClientDisconnectedError, error_response
from zsmerge_llm.server.guard import Guard
from zsmerge_llm.server.metrics import Metrics
from zsmerge_llm.server.settings import ServerSettings
from zsmerge_llm.server.stored_responses import stored_responses

if TYPE_CHECKING:
    from zsmerge_llm.llm import LLM


def create_app(llm: LLM, settings: ServerSettings | None = None, *, loopback_only: bool = True) -> FastAPI:
    """Return the server of a model.

    Args:
        loopback_only: answer only where it was called by a name of this machine, such as `localhost`. Without effect
            where there are API keys.
    """
    settings = settings or ServerSettings()
    app = FastAPI(title="zsmerge-llm", version=__version__, docs_url=None, redoc_url=None)
    app.state.llm, app.state.settings = llm, settings
    app.state.metrics = Metrics(llm)
    app.state.responses = stored_responses(settings.responses_dir, settings.max_responses, settings.max_response_bytes)
    app.add_middleware(Guard, settings=settings, loopback_only=loopback_only and not settings.api_keys)
    for kind in (ZSMergeError, RequestValidationError, HTTPException, ClientDisconnectedError, Exception):
        app.add_exception_handler(kind, error_response)
    for module in (chat_routes, session_routes, pages):
        app.include_router(module.router)
    return app
