"""One request: its cancel event and its time limit."""

from __future__ import annotations

import threading
from types import TracebackType


class Call:
    """The cancel event of one request, set when its time is over and when the block is left.

    Args:
        timeout: seconds the request may take; None for no limit.
        cancel: the event; a new one by default.
    """

    def __init__(self, timeout: float | None = None, cancel: threading.Event | None = None) -> None:
        self.cancel = cancel or threading.Event()
        self._timeout = timeout
        self._expired = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Call:
        if self._timeout is not None:
            self._timer = threading.Timer(self._timeout, self._expire)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel.set()
        if self._timer is not None:
            self._timer.cancel()

    def check(self, finish_reason: str | None) -> None:
        """Raises TimeoutError where an answer was cut short by the time limit."""
        if finish_reason == "cancelled" and self._expired:
            raise TimeoutError(f"No whole answer within {self._timeout:g} s: raise timeout or lower max_tokens.")

    def _expire(self) -> None:
        self._expired = True
        self.cancel.set()
