"""Blocking work as native async: it runs in a thread of its own, its items reach the event loop through a queue.

A thread per request, not the loop's default executor: requests wait for the model in turn, and twenty waiting requests
would take every thread that the rest of the program (DNS look-ups, file access) needs.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class _End:
    """The last thing in a queue: the work is done, or it failed with `error`."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class _Worker(Generic[T]):
    """Runs `source` in a thread and hands its items to the loop that made this object."""

    def __init__(self, source: Callable[[threading.Event], Generator[T, None, None]]) -> None:
        self.queue: asyncio.Queue[T | _End] = asyncio.Queue()
        self.cancel = threading.Event()
        self._source = source
        self._loop = asyncio.get_running_loop()
        # Not a daemon: a thread inside a matrix product must not outlive the interpreter. It ends within one token.
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._work,), name="zsmerge-llm").start()

    def _work(self) -> None:
        try:
            with closing(self._source(self.cancel)) as items:
                for item in items:
                    self._put(item)
                    if self.cancel.is_set():
                        break
            end = _End()
        except BaseException as error:
            end = _End(error)
        self._put(end)

    def _put(self, item: T | _End) -> None:
        try:
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the loop is closed, nobody is left to read
            self.cancel.set()


class _Stream(AsyncGenerator[T, None]):
    """The items of a source, as an asynchronous generator that stops its thread as soon as nobody holds it any more.

    A native one would wait for the event loop to finalise it: LlamaIndex's callbacks wrap a stream in a generator that
    does not close it, and by then the model has said more than one token.
    """

    def __init__(self, source: Callable[[threading.Event], Generator[T, None, None]]) -> None:
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


def stream_in_thread(source: Callable[[threading.Event], Generator[T, None, None]]) -> AsyncGenerator[T, None]:
    """The items of `source(cancel)`, made in a thread. The thread starts with the first item asked for.

    Closing the generator, letting go of it, or cancelling the task that waits on it sets `cancel`; the source is to
    stop soon after. None of them waits for the thread. Errors of the source are raised here.
    """
    return _Stream(source)


async def run_in_thread(work: Callable[[threading.Event], T]) -> T:
    """`work(cancel)`, done in a thread. Cancelling the waiting task sets `cancel`."""

    def once(cancel: threading.Event) -> Generator[T, None, None]:
        yield work(cancel)

    async with aclosing(stream_in_thread(once)) as results:
        return await anext(results)
