"""How requests share a device: settings, a limit of their number, deadlines and cancelling. Imports nothing heavy."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock

from zsmerge_llm.config import check_integer, check_number
from zsmerge_llm.errors import DeadlineExceededError, QueueFullError
from zsmerge_llm.types import NamedSettings


@dataclass(frozen=True)
class SchedulingConfig(NamedSettings):
    """How requests that run at the same time share the device.

    Args:
        max_requests: a request beyond so many that wait, are read or answered raises QueueFullError.
        reading_share: how much of the time the reading of prompts gets while answers are decoded, above 0, at most 1.
            A stream waits for one chunk (`LLM(chunk=...)`) at most, or for as many tokens of several short prompts,
            whatever the share: with 1, after each token.
        batch_invariant: whether an answer must not depend on the requests beside it, not even by rounding. On a CPU
            with our kernels that holds anyway. Without them rows decode in turns; on a GPU all steps have the largest
            size, and no draft.

    Raises:
        ConfigError: a setting out of its range.
    """

    max_requests: int = 256
    reading_share: float = 0.5
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        check_integer("max_requests", self.max_requests, 1)
        check_number("reading_share", self.reading_share, 0.01, 1.0)


class Cancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """The caller's event was set. Everything read or generated before stays in the cache."""


class Deadline(Event):
    """An event that sets itself after some time, or with the caller's own event.

    Args:
        cancel: the caller's event. seconds: until the time is up.
    """

    def __init__(self, cancel: Event | None, seconds: float) -> None:
        super().__init__()
        self._cancel = cancel
        self._seconds = seconds
        self._ends = time.monotonic() + seconds

    def is_set(self) -> bool:
        """Return whether to stop."""
        return time.monotonic() >= self._ends or self._is_cancelled()

    def check(self) -> None:
        """Raise DeadlineExceededError if the time is up, and the caller has not cancelled."""
        if time.monotonic() >= self._ends and not self._is_cancelled():
            raise DeadlineExceededError(
                f"The answer was not complete after timeout={self._seconds:g} s, so the conversation is as it was "
                "before: allow more time, or fewer tokens (max_tokens)."
            )

    def _is_cancelled(self) -> bool:
        return super().is_set() or (self._cancel is not None and self._cancel.is_set())


def check_cancelled(cancel: Event | None) -> None:
    """Raise Cancelled where the event is set."""
    if cancel is not None and cancel.is_set():
        raise Cancelled


class RequestLimit:
    """Counts the requests that wait, are read or answered.

    Args:
        most: how many there may be.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._running = 0
        self._lock = Lock()

    @property
    def num_running(self) -> int:
        """How many there are now."""
        return self._running

    @contextmanager
    def admit(self, count: int = 1) -> Iterator[None]:
        """Count so many requests while they run.

        Raises:
            QueueFullError: there would be too many.
        """
        with self._lock:
            if self._running + count > self._most:
                raise QueueFullError(
                    f"{self._running} requests are waiting or being answered, of {self._most} allowed: send this one "
                    "again later, or raise SchedulingConfig(max_requests=...)."
                )
            self._running += count
        try:
            yield
        finally:
            with self._lock:
                self._running -= count
