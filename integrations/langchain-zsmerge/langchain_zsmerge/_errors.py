"""Errors of zsmerge-llm that are of a class of LangChain as well, so that code for any model catches them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from langchain_core import exceptions

from zsmerge_llm import errors

_CLASSES = (
    (errors.ContextLimitError, "ContextOverflowError"),
    (errors.InputError, "ModelInvalidRequestError"),
    (errors.ConfigError, "ModelInvalidRequestError"),
    (errors.ModelNotFoundError, "ModelNotFoundError"),
    (errors.QueueFullError, "ModelRateLimitError"),
    (errors.DeadlineExceededError, "ModelTimeoutError"),
    (errors.DeviceMemoryError, "ModelAPIError"),
    (errors.ZSMergeError, "ModelError"),
)
"""LangChain's class for ours, the first that fits. Where a version lacks it, it is `LangChainException`."""


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Raise errors of zsmerge-llm in the block, or in a function that this decorates, as LangChain's too."""
    try:
        yield
    except errors.ZSMergeError as error:
        if isinstance(error, exceptions.LangChainException):
            raise
        raise as_langchain(error).with_traceback(error.__traceback__) from error.__cause__


def as_langchain(error: errors.ZSMergeError) -> errors.ZSMergeError:
    """Return the same error as an instance of its own class and of LangChain's."""
    converted: errors.ZSMergeError = _both(type(error))(*error.args)  # type: ignore[arg-type]  # mypy takes a class for its object's hash
    converted.__dict__.update(vars(error))
    return converted


@cache
def _both(kind: type[errors.ZSMergeError]) -> type[Any]:
    name = next(name for own, name in _CLASSES if issubclass(kind, own))
    theirs = getattr(exceptions, name, exceptions.LangChainException)

    def reduce(self: errors.ZSMergeError) -> tuple[Any, ...]:  # the class has no place that pickle could find it at
        return as_langchain, (kind(*self.args),)

    return type(kind.__name__, (kind, theirs), {"__module__": kind.__module__, "__reduce__": reduce})
