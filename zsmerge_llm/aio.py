"""Run blocking calls from asyncio: each in a thread of its own, for which the event loop never waits.

```python
result = await aio.call(lambda cancel: llm.chat(messages, cancel=cancel))
async for chunk in aio.stream(lambda cancel: llm.stream(messages, cancel=cancel)):
    ...
```

A thread per request, not the loop's default executor: requests wait for the model in turn, and twenty of them would
occupy all threads that the rest of the program (DNS look-ups, file access) needs.
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
    """Return `work(cancel)`, run in a thread. Cancelling the task sets `cancel` and does not wait for the work."""

    def once(cancel: Event) -> Generator[T, None, None]:
        yield work(cancel)

    async with aclosing(stream(once)) as results:
        return await anext(results)


def stream(source: Callable[[Event], Iterator[T]]) -> AsyncGenerator[T, None]:
    """Return a stream of the items of `source(cancel)`, which runs in a thread from the first request for an item on.

    Closing the stream, dropping it, or cancelling the task that waits for it sets `cancel` and does not wait; the
    source is closed at its next item. It sees the context variables of the first request. Its errors are raised here.

    Raises:
        RuntimeError: no thread can be started.
    """
    return _Stream(source)


class _End:
    """The last entry of a queue: the source has ended, or failed with `error`."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Stream(AsyncGenerator[T, None]):
    """An asynchronous generator that stops its thread as soon as it is no longer referenced.

    A native one would wait for the event loop to finalize it. Some frameworks wrap a stream in a generator that does
    not close it, and by then the model has generated more than one token.
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
    """Runs `source` in a thread and passes its items to the event loop that constructed this object."""

    def __init__(self, source: Callable[[Event], Iterator[T]]) -> None:
        self.queue: asyncio.Queue[T | _End] = asyncio.Queue()
        self.cancel = Event()
        self._source = source
        self._loop = asyncio.get_running_loop()
        # Not a daemon: a thread within a matrix product must not outlive the interpreter. It ends within one token.
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
        except RuntimeError:  # the loop is closed: nothing reads the queue any more
            self.cancel.set()


class _Starter:
    """Starts threads from a thread of its own.

    `Thread.start` waits until the new thread runs. That takes a while where others compute, and would block the loop.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: SimpleQueue[tuple[Thread, Callable[[RuntimeError], None]]] = SimpleQueue()
        self._own: Thread | None = None

    def start(self, thread: Thread, failed: Callable[[RuntimeError], None]) -> None:
        """Start `thread` soon; call `failed` with the error if that is impossible."""
        with self._lock:
            if self._own is None or not self._own.is_alive():  # not alive: after a fork
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
