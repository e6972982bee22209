"""Stop code of others that does not end, such as a model's chat template. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, Thread, get_ident

PERIOD = 0.5
"""Seconds between two looks at the clock: what runs is stopped so much later at most."""


STEPS = 100
"""Steps of Python within which an error is raised in a thread; one is enough."""


class TimeExceeded(Exception):  # noqa: N818 - it interrupts
    """The time of the running code is up."""


class Watchdog:
    """Raises TimeExceeded in threads that stay too long in a `limit` block. Safe to use from several threads.

    It stops Python code between two of its steps. One step in C, such as a power of huge numbers, cannot be stopped.
    """

    def __init__(self) -> None:
        self._ends: dict[int, float] = {}
        self._lock = Lock()
        self._thread: Thread | None = None

    @contextmanager
    def limit(self, seconds: float) -> Iterator[None]:
        """Let the block run for so long. Blocks are not nested. Raises TimeExceeded."""
        own = get_ident()
        with self._lock:
            self._ends[own] = time.monotonic() + seconds
            if self._thread is None or not self._thread.is_alive():  # not alive: after a fork
                self._thread = Thread(target=self._watch, name="zsmerge-watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                is_over = self._ends.pop(own, None) is None
            for _ in range(STEPS if is_over else 0):
                pass  # what is still to be raised is raised here, and not in the code behind the block

    def _watch(self) -> None:
        while True:
            time.sleep(PERIOD)
            with self._lock:
                if not self._ends:  # nothing runs: the next block starts another thread
                    self._thread = None
                    return
                for thread, ends in list(self._ends.items()):
                    if time.monotonic() >= ends:
                        del self._ends[thread]
                        _raise_in(thread, TimeExceeded)


def _raise_in(thread: int, error: type[Exception]) -> None:
    """Raise an error in a thread at its next step.

    It is never taken back: CPython 3.11 would look for it before every later step, and a traced function, as in a
    debugger, would never begin.
    """
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(error))
