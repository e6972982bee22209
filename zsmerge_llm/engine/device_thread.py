"""The thread that owns the device: all forward passes of an engine run in it, one after another.

Requests of other threads submit jobs and wait. The thread chooses the next job by priority, then by order of arrival,
and interleaves the chunks of prompts with decode steps: where both wait, prompts get a share of the time. No stream
waits for more than one chunk, or for several short prompts that have no more tokens together: streams that begin
together share all of their steps.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Lock, RLock, Thread, get_ident
from typing import Any, Generic, TypeVar

import torch

from zsmerge_llm.engine.scheduling import Cancelled
from zsmerge_llm.models.owner_process import check_process, is_forked

T = TypeVar("T")

MAX_WAIT_SECONDS = 0.002
"""How long a pass waits for rows that took part in the last one: far less than a pass takes."""
POLL_SECONDS = 0.05
"""How often a waiting request looks whether it was cancelled."""
MIN_PASS_TOKENS = 64
"""A shorter chunk counts as so many tokens: every pass reads all weights."""

Within = Callable[[int], AbstractContextManager[None]]
"""Makes what a job runs within, from the number of threads that its caller lets PyTorch use."""


class Kind(Enum):
    """What a job is: a chunk of a prompt, a decode step, or something short that goes before both."""

    CHUNK = "chunk"
    STEP = "step"
    SHORT = "short"


class Job(Generic[T]):
    """Work for the device thread, and its result.

    Args:
        run: does the work.
        priority: jobs of a lower number go first.
        row: what a step is for, where another step may do it along with its own (`DeviceThread.take`).
        tokens: how many a chunk reads.

    Attributes:
        most_threads: how many threads the caller lets PyTorch use.
    """

    def __init__(
        self, run: Callable[[], T], kind: Kind, priority: int = 0, row: Any = None, *, tokens: int = 0
    ) -> None:
        self.kind, self.priority, self.row = kind, priority, row
        self.tokens = max(tokens, MIN_PASS_TOKENS)
        self.most_threads = torch.get_num_threads()
        self._run: Callable[[], T] | None = run
        self._claimed = Lock()
        self._done = Event()
        self._result: T | None = None
        self._error: BaseException | None = None

    def claim(self) -> bool:
        """Return True to the first caller: the device thread that begins the job, or whoever gives it up."""
        return self._claimed.acquire(blocking=False)

    def execute(self, instead: Callable[[], T] | None = None, within: Within = lambda threads: nullcontext()) -> None:
        """Do the work, or another in its place, in the device thread."""
        run = instead or self._run
        assert run is not None
        try:
            with within(self.most_threads):
                self._result = run()
        except BaseException as error:
            self._error = error
        self._end()

    def finish(self, result: T) -> None:
        """Give the job its result: another one did its work."""
        self._result = result
        self._end()

    def wait(self, cancel: Event | None = None) -> T:
        """Wait for the result.

        Raises:
            Cancelled: `cancel` was set before the job began. Otherwise what the work raises.
        """
        try:
            while not self._done.wait(None if cancel is None else POLL_SECONDS):
                if cancel is not None and cancel.is_set() and self.claim():
                    raise Cancelled
        except Cancelled:
            raise
        except BaseException:  # interrupted: a job that runs uses the caller's cache until it has ended
            if self.kind is Kind.SHORT or not self.claim():
                self._wait_uninterrupted()
            raise
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # a traceback references the frames that it went through
        return self._result  # type: ignore[return-value]

    def _end(self) -> None:
        self._run = None  # it references caches
        self._done.set()

    def _wait_uninterrupted(self) -> None:
        while not self._done.is_set():
            try:
                self._done.wait()
            except KeyboardInterrupt:
                continue


class DeviceThread:
    """Runs jobs in a thread of its own, which starts with the first job and ends when this object is collected.

    Args:
        reading_share: how much of the time the chunks of prompts get while streams wait for decode steps, 0 to 1.
        within: see `Within`.
        before_wait: what each caller runs before it waits for a job.
        max_tokens: how many tokens of several chunks are read at most while a stream waits. One chunk may have more.
    """

    def __init__(
        self,
        reading_share: float = 0.5,
        within: Within = lambda threads: nullcontext(),
        before_wait: Callable[[], None] = lambda: None,
        max_tokens: int = 0,
    ) -> None:
        check_process()
        self._before_wait = before_wait
        self._inbox: SimpleQueue[Job[Any] | None] = SimpleQueue()  # reentrant: a finalizer may submit at any time
        self._within = within
        self._agenda = _Agenda(self._inbox, reading_share, within, max_tokens)
        self._thread: Thread | None = None
        self._starting = RLock()

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is the device thread."""
        return self._thread is not None and self._thread.ident == get_ident()

    @property
    def num_waiting(self) -> int:
        """Jobs that wait, about."""
        return self._inbox.qsize() + len(self._agenda.waiting)

    def call(
        self,
        run: Callable[[], T],
        kind: Kind = Kind.SHORT,
        *,
        priority: int = 0,
        cancel: Event | None = None,
        tokens: int = 0,
    ) -> T:
        """Run something in the device thread and return its result; in the device thread itself, at once.

        Raises:
            Cancelled: `cancel` was set before it began. Otherwise what it raises.
            ForkedProcessError: this is a fork of the process that has the thread.
        """
        check_process()
        return run() if self.is_current else self.submit(Job(run, kind, priority, tokens=tokens)).wait(cancel)

    def submit(self, job: Job[T]) -> Job[T]:
        """Put a job into the queue, and return it. Raises ForkedProcessError."""
        check_process()
        if self._thread is None:
            self._start()
        elif not self._thread.is_alive():  # the process ends, and no thread can be started any more
            if job.claim():
                job.execute(within=self._within)
            return job
        self._before_wait()
        self._inbox.put(job)
        return job

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                thread = Thread(target=self._agenda.serve, name="zsmerge-device", daemon=True)
                thread.start()
                self._thread = thread  # not before: to `submit`, one that does not run is one that has ended
                # A daemon that runs while the interpreter is taken apart would abort the process.
                end = partial(_end, self._inbox, thread)
                atexit.register(end)
                weakref.finalize(self, _let_go, self._inbox, end).atexit = False

    # -- for the job that runs ---------------------------------------------------------------------------------------

    def take(self, wanted: Callable[[Any], bool]) -> list[Job[Any]]:
        """Take the waiting steps of the wanted rows, the most urgent first; the caller must end them."""
        return self._agenda.take(wanted)

    def wait_for(self, wanted: Callable[[Any], bool], count: int) -> None:
        """Wait briefly until steps of so many wanted rows are waiting."""
        deadline = time.perf_counter() + MAX_WAIT_SECONDS
        while sum(wanted(job.row) for job in self._agenda.shareable) < count and self._agenda.receive(deadline):
            pass


class _Agenda:
    """The jobs that wait, and which comes next. It does not reference the thread's owner."""

    def __init__(
        self, inbox: SimpleQueue[Job[Any] | None], reading_share: float, within: Within, max_tokens: int
    ) -> None:
        self.waiting: list[Job[Any]] = []  # in order of arrival
        self._inbox = inbox
        self._share = reading_share
        self._within = within
        self._max_tokens = max_tokens
        self._tokens = 0  # of the chunks that ran since the last step
        self._owed = 0.0  # seconds that streams have before the next chunk, where both wait
        self._last, self._last_priority = Kind.SHORT, 0  # of the chunk or step that ran last
        self._ending = False

    @property
    def steps(self) -> list[Job[Any]]:
        """The decode steps that wait."""
        return [job for job in self.waiting if job.kind is Kind.STEP]

    @property
    def _short(self) -> list[Job[Any]]:
        return [job for job in self.waiting if job.kind is Kind.SHORT]

    @property
    def shareable(self) -> list[Job[Any]]:
        """The steps that another step may do along."""
        return [job for job in self.steps if job.row is not None]

    def serve(self) -> None:
        """Run jobs until None arrives."""
        while (job := self._next()) is not None:
            started = time.perf_counter()
            if job.claim():
                job.execute(within=self._within)
                self._record(job, time.perf_counter() - started)
            del job  # it references its caller's caches

    def receive(self, deadline: float | None) -> bool:
        """Receive a job, and all that have arrived by then; False if none has until the deadline (None: no limit)."""
        try:
            timeout = None if deadline is None else max(0.0, deadline - time.perf_counter())
            self._accept(self._inbox.get(timeout=timeout))
            while True:
                self._accept(self._inbox.get_nowait())
        except Empty:
            return deadline is None or time.perf_counter() < deadline

    def take(self, wanted: Callable[[Any], bool]) -> list[Job[Any]]:
        """Take waiting steps of the wanted rows."""
        taken = [job for job in sorted(self.shareable, key=_urgency) if wanted(job.row) and job.claim()]
        self.waiting = [job for job in self.waiting if job not in taken]
        return taken

    def _accept(self, job: Job[Any] | None) -> None:
        if job is None:
            self._ending = True
        else:
            self.waiting.append(job)

    def _next(self) -> Job[Any] | None:
        """Wait for a job, and take the next one; None: the end."""
        self.receive(time.perf_counter())
        while not self.waiting and not self._ending:
            self.receive(None)
        if not self.waiting:
            return None
        job = min(self._candidates(), key=_urgency)
        self.waiting.remove(job)
        return job

    def _candidates(self) -> list[Job[Any]]:
        """Return the waiting jobs among which the most urgent one comes next."""
        # Who had the last turn comes back at once: without waiting, a less urgent job or a chunk would go before it.
        deadline = time.perf_counter() + MAX_WAIT_SECONDS
        while self._expects_another() and self.receive(deadline):
            pass
        if self._short:
            return self._short
        first = min(job.priority for job in self.waiting)
        urgent = [job for job in self.waiting if job.priority == first]
        by_kind = [[job for job in urgent if job.kind is kind] for kind in (Kind.CHUNK, Kind.STEP)]
        if all(by_kind):
            if self._last is Kind.CHUNK:
                is_due = self._tokens + by_kind[0][0].tokens <= self._max_tokens
            else:
                is_due = self._owed <= 0
            return by_kind[0] if is_due else by_kind[1]
        return urgent

    def _expects_another(self) -> bool:
        """Return whether a request that is more urgent than all that wait, or a stream, has just had its turn."""
        if self._short:  # goes first anyway
            return False
        is_urgent = self._last_priority < min(job.priority for job in self.waiting)
        return is_urgent or (self._last is Kind.STEP and not self.steps)

    def _record(self, job: Job[Any], seconds: float) -> None:
        """Record what a job took. After chunks, streams have as much time as the share of reading leaves them."""
        if job.kind is Kind.CHUNK:
            in_a_row = self._last is Kind.CHUNK
            self._owed = (self._owed if in_a_row else 0.0) + seconds * (1 - self._share) / self._share
            self._tokens = (self._tokens if in_a_row else 0) + job.tokens
        elif job.kind is Kind.STEP:
            self._owed -= seconds
        if job.kind is not Kind.SHORT:
            self._last, self._last_priority = job.kind, job.priority


def _urgency(job: Job[Any]) -> int:
    """Sort by priority; sorting keeps the order of arrival."""
    return job.priority


def _end(inbox: SimpleQueue[Job[Any] | None], thread: Thread) -> None:
    """End a device thread before the interpreter ends."""
    if not is_forked():
        inbox.put(None)
        thread.join()


def _let_go(inbox: SimpleQueue[Job[Any] | None], end: Callable[[], None]) -> None:
    """Let a device thread end whose owner is gone. Nobody waits for it: this runs in a garbage collection."""
    atexit.unregister(end)
    inbox.put(None)
