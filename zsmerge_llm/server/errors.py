"""Errors as replies: an HTTP status, and a body in the form of each dialect."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from zsmerge_llm.errors import (
    ConfigError,
    ContextLimitError,
    DeadlineExceededError,
    DeviceMemoryError,
    InputError,
    MissingDependencyError,
    MissingTemplateError,
    QueueFullError,
    SessionCorruptError,
    SessionMismatchError,
    SessionNotFoundError,
    SessionStorageError,
    ZSMergeError,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ErrorReply:
    """What a client is told.

    Attributes:
        kind: as Anthropic names it. code: OpenAI's finer distinction. param: the field that is wrong.
    """

    status: int
    kind: str
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


class RequestError(ZSMergeError):
    """A request that the server refuses by itself.

    Args:
        reply: what the client is told.
    """

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(reply.message)
        self.reply = reply


def invalid(message: str, param: str | None = None) -> RequestError:
    """Return the error for a request of the wrong form."""
    return RequestError(ErrorReply(400, "invalid_request_error", message, param=param))


def not_found(message: str, code: str = "not_found") -> RequestError:
    """Return the error for something that is not there, or belongs to someone else."""
    return RequestError(ErrorReply(404, "not_found_error", message, code))


_REPLIES: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (ContextLimitError, 400, "invalid_request_error", "context_length_exceeded"),
    (InputError, 400, "invalid_request_error", None),
    (ConfigError, 400, "invalid_request_error", None),
    (MissingTemplateError, 400, "invalid_request_error", "no_chat_template"),
    (MissingDependencyError, 400, "invalid_request_error", None),
    (SessionNotFoundError, 404, "not_found_error", "not_found"),
    (SessionCorruptError, 400, "invalid_request_error", "session_corrupt"),
    (SessionMismatchError, 409, "invalid_request_error", "session_mismatch"),
    (SessionStorageError, 500, "api_error", "storage"),
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (DeadlineExceededError, 504, "timeout_error", "timeout"),
    (DeviceMemoryError, 503, "overloaded_error", "out_of_memory"),
)
"""The first that fits: error, status, kind, code."""
_HTTP_KINDS = {404: "not_found_error", 408: "timeout_error", 413: "request_too_large"}


def reply_to(error: BaseException) -> ErrorReply:
    """Return what a client is told of an error. What is no error of ours is logged, and not told."""
    if isinstance(error, RequestError):
        return error.reply
    if isinstance(error, RequestValidationError):
        return _validation_reply(error.errors())
    if isinstance(error, HTTPException):
        kind = _HTTP_KINDS.get(error.status_code, "invalid_request_error")
        return ErrorReply(error.status_code, kind, str(error.detail))
    for known, status, kind, code in _REPLIES:
        if isinstance(error, known):
            headers = {"Retry-After": "1"} if status in (429, 503) else {}
            return ErrorReply(status, kind, str(error), code, headers=headers)
    log.error("A request failed", exc_info=error)
    return ErrorReply(500, "api_error", "The server failed; its log says why.")


def _validation_reply(errors: Any) -> ErrorReply:
    """Return the reply for a body that is not as its dialect describes it: the first thing that is wrong."""
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "extra_forbidden":
        return ErrorReply(400, "invalid_request_error", f"Unknown parameter: {where}.", "unknown_parameter", where)
    if first["type"] == "json_invalid":
        return ErrorReply(400, "invalid_request_error", "The body is no valid JSON.")
    return ErrorReply(400, "invalid_request_error", f"{where or 'The body'}: {first['msg']}.", param=where or None)


def openai_error(reply: ErrorReply) -> dict[str, Any]:
    """Return the body of an error as OpenAI writes it."""
    return {"error": {"message": reply.message, "type": reply.kind, "param": reply.param, "code": reply.code}}


def anthropic_error(reply: ErrorReply) -> dict[str, Any]:
    """Return the body of an error as Anthropic writes it."""
    return {"type": "error", "error": {"type": reply.kind, "message": reply.message}}
