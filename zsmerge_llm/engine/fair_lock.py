"""A lock granted in order of request, whose holder may do the work of threads that wait for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from threading import Lock, get_ident
from types import TracebackType
from typing import Any

MAX_WAIT_SECONDS = 0.002
"""How long a pass waits for rows that took part in the last one: far less than a pass takes."""


class Ticket:
    """A place in the queue. `work`: what the lock's holder may do for the waiting thread; None: nothing."""

    def __init__(self, work: Any = None) -> None:
        self.work = work
        self.served = False
        self._taken = False
        self._wait = Lock()
        self._wait.acquire()


class FairLock:
    """A mutex, first come first served. A plain Lock may go again and again to the thread that has just released it."""

    def __init__(self) -> None:
        self._guard = Lock()
        self._holder: int | None = None
        self._waiting: deque[Ticket] = deque()

    @property
    def mine(self) -> bool:
        """Whether the calling thread holds the lock."""
        return self._holder == get_ident()

    def __enter__(self) -> None:
        self.wait(Ticket())

    def wait(self, ticket: Ticket) -> bool:
        """Wait for the lock; return True when it is held, False when another holder has done this ticket's work."""
        with self._guard:
            if self._holder is None:
                self._holder = get_ident()
                return True
            self._waiting.append(ticket)
        try:
            ticket._wait.acquire()  # released by whoever hands over
        except BaseException:  # interrupted: nobody may hand over to a thread that has left
            self._leave(ticket)
            raise
        if ticket.served:
            return False
        self._holder = get_ident()
        return True

    def run_until_done(self, work: Any, run: Callable[[Any], None]) -> None:
        """Run `work` under the lock, unless another holder does it first: until `work.done` is set.

        Work that fails under another thread is tried again under this one, which raises what it raises.
        """
        while not work.done:
            if self.wait(Ticket(work)):
                try:
                    run(work)
                finally:
                    self.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Hand the lock to the next ticket in the queue."""
        with self._guard:
            self._pass_on()

    def take(self, wanted: Callable[[Any], bool]) -> list[Ticket]:
        """Take waiting tickets of the wanted work out of the queue; the holder must `serve` them."""
        with self._guard:
            taken = [ticket for ticket in self._waiting if ticket.work is not None and wanted(ticket.work)]
            for ticket in taken:
                ticket._taken = True
                self._waiting.remove(ticket)
        return taken

    def waiting(self, wanted: Callable[[Any], bool]) -> int:
        """Count the waiting tickets of the wanted work."""
        with self._guard:
            return sum(ticket.work is not None and wanted(ticket.work) for ticket in self._waiting)

    def wait_for_others(self, wanted: Callable[[Any], bool], count: int) -> None:
        """Wait briefly until so many tickets of the wanted work are waiting. For the holder."""
        deadline = time.perf_counter() + MAX_WAIT_SECONDS
        while self.waiting(wanted) < count and time.perf_counter() < deadline:
            time.sleep(MAX_WAIT_SECONDS / 10)

    def serve(self, tickets: Iterable[Ticket]) -> None:
        """Let the threads of these tickets go on, without the lock: their work is done."""
        for ticket in tickets:
            ticket.served = True
            ticket._wait.release()

    def _leave(self, ticket: Ticket) -> None:
        with self._guard:
            taken = ticket._taken
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif not taken:
                self._pass_on()
        if taken and not ticket.served:
            ticket._wait.acquire()  # its work is being done just now

    def _pass_on(self) -> None:
        if self._waiting:
            self._holder = -1  # nobody's until the next thread wakes
            self._waiting.popleft()._wait.release()
        else:
            self._holder = None
