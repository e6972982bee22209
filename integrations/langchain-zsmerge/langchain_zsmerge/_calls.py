"""One request: its cancel event, its time limit, and its way from a blocking engine to an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")


class Call:
    """The cancel event of one request, set when its time is over and when the block is left.

    Args:
        timeout: seconds the request may take; None for no limit.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.cancel = threading.Event()
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


class _Starter:
    """Starts threads from a thread of its own.

    `Thread.start` waits until the new thread runs, which takes a while where others compute; an event loop must not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[threading.Thread, Callable[[RuntimeError], None]]] = queue.SimpleQueue()
        self._own: threading.Thread | None = None

    def start(self, thread: threading.Thread, failed: Callable[[RuntimeError], None]) -> None:
        """Start `thread` soon; where that is not possible `failed` is told why."""
        with self._lock:
            if self._own is None or not self._own.is_alive():  # the latter behind a fork
                self._own = threading.Thread(target=self._run, name="zsmerge-starter", daemon=True)
                self._own.start()
        self._waiting.put((thread, failed))

    def _run(self) -> None:
        while True:
            thread, failed = self._waiting.get()
            try:
                thread.start()
            except RuntimeError as error:
                failed(error)


_STARTER = _Starter()


async def stream_in_thread(
    produce: Callable[[], Generator[T, None, None]], cancel: threading.Event
) -> AsyncGenerator[T, None]:
    """Runs a blocking generator in a thread of its own and yields its items; the event loop never waits for it.

    Leaving early (break, `aclose`, a cancelled task) sets `cancel`, and the thread ends at its next item. It is not one
    of the loop's executor threads: requests that wait for the model would keep those from everybody else.
    """
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[list[T], BaseException | None]] = asyncio.Queue()

    def post(items: list[T], error: BaseException | None = None) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, (items, error))
        except RuntimeError:  # the loop was closed: nobody listens any more
            cancel.set()

    def work() -> None:
        failure: BaseException | None = None
        try:
            with closing(produce()) as items:
                for item in items:
                    post([item])
                    if cancel.is_set():
                        break
        except BaseException as error:
            failure = error
        post([], failure)

    # the context carries tracing and the runnable config into the thread, as LangChain's own executor does
    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), name="zsmerge-call")
    _STARTER.start(thread, lambda error: post([], error))
    try:
        while True:
            items, failure = await pieces.get()
            if failure is not None:
                raise failure
            if not items:
                return
            yield items[0]
    finally:
        cancel.set()


async def run_in_thread(function: Callable[[], T], cancel: threading.Event) -> T:
    """Runs a blocking function in a thread of its own; a cancelled task sets `cancel`."""

    def once() -> Generator[T, None, None]:
        yield function()

    async with aclosing(stream_in_thread(once, cancel)) as results:
        return await anext(results)
