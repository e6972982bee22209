"""Blocking work as native async: it runs in a thread of its own, and the event loop never waits for that thread.

```python
result = await aio.call(lambda cancel: llm.chat(messages, cancel=cancel))
async for chunk in aio.stream(lambda cancel: llm.stream(messages, cancel=cancel)):
    ...
```

A thread per request, not the loop's default executor: requests wait for the model in turn, and twenty waiting requests
would take every thread that the rest of the program (DNS look-ups, file access) needs.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing, closing
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, Generic, TypeVar

T = TypeVar("T")


async def call(work: Callable[[Event], T]) -> T:
    """`work(cancel)`, done in a thread. Cancelling the task that waits sets `cancel`; it does not wait for the work."""

    def once(cancel: Event) -> Generator[T, None, None]:
        yield work(cancel)

    async with aclosing(stream(once)) as results:
        return await anext(results)


def stream(source: Callable[[Event], Iterator[T]]) -> AsyncGenerator[T, None]:
    """The items of `source(cancel)`, made in a thread that starts when the first one is asked for.

    Closing the stream, letting go of it, or cancelling the task that waits on it sets `cancel`; at its next item the
    source is closed. None of them waits for it. The source sees the context variables of whoever asked first, and its
    errors are raised here. Where no thread can be started, RuntimeError is raised.
    """
    return _Stream(source)


class _End:
    """The last thing in a queue: the work is done, or it failed with `error`."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Stream(AsyncGenerator[T, None]):
    """An asynchronous generator that stops its thread as soon as nobody holds it any more.

    A native one would wait for the event loop to finalise it: some frameworks wrap a stream in a generator that does
    not close it, and by then the model has said more than one token.
    """

    def __init__(self, source: Callable[[Event], Iterator[T]]) -> None:
        self._source = source
        self._worker: _Worker[T] | None = None
        self._ended = False

    async def asend(self, value: None) -> T:
        if self._ended:
            raise StopAsyncIteration
        if self._worker is None:
            self._worker = _Worker(self._source)
        try:
            item = await self._worker.queue.get()
        except BaseException:  # the task is cancelled
            self._stop()
            raise
        if not isinstance(item, _End):
            return item
        self._stop()
        raise item.error or StopAsyncIteration

    async def athrow(self, typ: Any, val: Any = None, tb: Any = None) -> T:
        self._stop()
        raise typ

    def _stop(self) -> None:
        self._ended = True
        if self._worker is not None:
            self._worker.cancel.set()

    def __del__(self) -> None:
        self._stop()


class _Worker(Generic[T]):
    """Runs `source` in a thread and hands its items to the loop that made this object."""

    def __init__(self, source: Callable[[Event], Iterator[T]]) -> None:
        self.queue: asyncio.Queue[T | _End] = asyncio.Queue()
        self.cancel = Event()
        self._source = source
        self._loop = asyncio.get_running_loop()
        # Not a daemon: a thread inside a matrix product must not outlive the interpreter. It ends within one token.
        thread = Thread(target=contextvars.copy_context().run, args=(self._work,), name="zsmerge-call", daemon=False)
        _STARTER.start(thread, lambda error: self._put(_End(error)))

    def _work(self) -> None:
        try:
            with closing(self._items()) as items:
                for item in items:
                    self._put(item)
                    if self.cancel.is_set():
                        break
            end = _End()
        except BaseException as error:
            end = _End(error)
        self._put(end)

    def _items(self) -> Generator[T, None, None]:
        yield from self._source(self.cancel)

    def _put(self, item: T | _End) -> None:
        try:
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the loop is closed, nobody is left to read
            self.cancel.set()


class _Starter:
    """Starts threads from a thread of its own.

    `Thread.start` waits until the new thread runs, which takes a while where others compute; an event loop must not.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: SimpleQueue[tuple[Thread, Callable[[RuntimeError], None]]] = SimpleQueue()
        self._own: Thread | None = None

    def start(self, thread: Thread, failed: Callable[[RuntimeError], None]) -> None:
        """Start `thread` soon; where that is not possible `failed` is told why."""
        with self._lock:
            if self._own is None or not self._own.is_alive():  # the latter behind a fork
                self._own = Thread(target=self._run, name="zsmerge-starter", daemon=True)
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
