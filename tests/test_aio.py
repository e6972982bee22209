"""Blocking calls from asyncio: the event loop is never blocked, and closing a stream stops its work."""

from __future__ import annotations

import asyncio
import contextvars
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

import pytest

from tests.support.chat import LARGE_CACHE, make_llm, record_passes
from zsmerge_llm import SamplingParams, aio
from zsmerge_llm.testing import event_loop_gaps

LIMIT = 0.05
"""Longest time in seconds for which a call may block the loop."""
ATTEMPTS = 5
"""Other load on the machine causes gaps too; one attempt without gaps shows that the calls cause none."""


@pytest.fixture(autouse=True)
def _no_thread_remains() -> Iterator[None]:
    yield
    wait_until(lambda: not call_threads())


def call_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "zsmerge-call"]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "the condition did not come true within 10 seconds"
        time.sleep(0.002)


class Counter:
    """Yields a number every two milliseconds until it is cancelled or closed."""

    def __init__(self) -> None:
        self.count = 0
        self.closed = False

    def __call__(self, cancel: Event) -> Iterator[int]:
        try:
            while not cancel.is_set():
                time.sleep(0.002)
                self.count += 1
                yield self.count
        finally:
            self.closed = True


async def test_results_and_items_come_in_order() -> None:
    assert await aio.call(lambda cancel: (threading.current_thread().name, cancel.is_set())) == ("zsmerge-call", False)
    assert [item async for item in aio.stream(lambda cancel: iter([1, None, 3]))] == [1, None, 3]


async def test_twenty_calls_of_a_model_never_block_the_loop() -> None:
    llm, params = make_llm(cache=LARGE_CACHE), SamplingParams(max_tokens=12)
    llm.chat("Hello", sampling=params)  # loaded

    def ask(cancel: Event) -> Any:
        return llm.chat("Hello", sampling=params, cancel=cancel)

    longest = []
    for _ in range(ATTEMPTS):
        async with event_loop_gaps() as gaps:
            assert len(await asyncio.gather(*(aio.call(ask) for _ in range(20)))) == 20
        assert len(gaps) > 20
        longest.append(max(gaps))
        if longest[-1] < LIMIT:
            break
    print(f"longest gaps {[round(gap * 1000) for gap in longest]} ms")
    assert min(longest) < LIMIT


async def test_a_thread_that_is_slow_to_start_does_not_block_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def start_slowly(thread: threading.Thread) -> None:
        if thread.name == "zsmerge-call":
            time.sleep(4 * LIMIT)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_slowly)
    async with event_loop_gaps() as gaps:
        assert await asyncio.gather(*(aio.call(lambda cancel: 1) for _ in range(3))) == [1, 1, 1]
    assert max(gaps) < 4 * LIMIT
    assert len(gaps) > 20


async def test_breaking_out_of_a_stream_stops_a_model_within_one_token() -> None:
    llm = make_llm(cache=LARGE_CACHE)
    with record_passes() as passes:
        chunks = aio.stream(
            lambda cancel: llm.stream("Hello", sampling=SamplingParams(max_tokens=500, ignore_eos=True), cancel=cancel)
        )
        async for _ in chunks:
            break
        await chunks.aclose()
        before = len(passes)
        await asyncio.to_thread(wait_until, lambda: not call_threads())
    assert len(passes) <= before + 1


@pytest.mark.parametrize("way", ["close", "drop", "throw"])
async def test_leaving_a_stream_closes_its_source(way: str) -> None:
    counter = Counter()
    stream = aio.stream(counter)
    assert await anext(stream) == 1
    if way == "close":
        await stream.aclose()
    elif way == "throw":
        with pytest.raises(KeyError):
            await stream.athrow(KeyError("enough"))
    del stream
    before = counter.count
    await asyncio.to_thread(wait_until, lambda: counter.closed)
    assert counter.count <= before + 1


async def test_a_closed_stream_is_exhausted() -> None:
    stream = aio.stream(Counter())
    await anext(stream)
    await stream.aclose()
    assert [item async for item in stream] == []


async def test_a_stream_starts_at_the_first_request_for_an_item() -> None:
    counter = Counter()
    stream = aio.stream(counter)
    await asyncio.sleep(0.02)
    assert counter.count == 0
    await stream.aclose()


async def test_cancelling_a_task_stops_the_work_and_does_not_wait_for_it() -> None:
    cancelled, go = Event(), Event()

    def work(cancel: Event) -> None:
        assert cancel.wait(10)
        cancelled.set()
        assert go.wait(10)

    task = asyncio.create_task(aio.call(work))
    await asyncio.to_thread(wait_until, lambda: bool(call_threads()))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(cancelled.wait, 10)
    assert call_threads()  # the task has ended, and its work still runs
    go.set()


async def test_errors_of_the_work_are_raised_in_the_waiting_task() -> None:
    def broken(cancel: Event) -> Iterator[int]:
        yield 1
        raise ValueError("no luck")

    stream = aio.stream(broken)
    assert await anext(stream) == 1
    with pytest.raises(ValueError, match="no luck"):
        await anext(stream)
    with pytest.raises(ValueError, match="no luck"):
        await aio.call(lambda cancel: [*broken(cancel)])


async def test_a_thread_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    await aio.call(lambda cancel: None)  # starts the thread that starts the others
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start"):
        await aio.call(lambda cancel: None)


async def test_the_work_sees_its_callers_context_variables_and_changes_none() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")

    def work(cancel: Event) -> str:
        seen = variable.get()
        variable.set("worker")
        return seen

    variable.set("caller")
    assert await aio.call(work) == "caller"
    assert variable.get() == "caller"


def test_closing_the_loop_ends_the_work() -> None:
    counter = Counter()
    loop = asyncio.new_event_loop()
    stream = aio.stream(counter)
    loop.run_until_complete(anext(stream))
    loop.close()  # without closing the stream first
    wait_until(lambda: counter.closed)


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_calls_work_in_a_forked_process() -> None:
    program = """
import asyncio, os
from zsmerge_llm import aio
asyncio.run(aio.call(lambda cancel: None))
child = os.fork()
if child == 0:
    os._exit(asyncio.run(aio.call(lambda cancel: 7)))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "7"


def test_importing_aio_does_not_import_torch() -> None:
    program = "import sys, zsmerge_llm.aio; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_a_call_needs_a_running_loop() -> None:
    coroutine: Any = aio.call(lambda cancel: None)
    with pytest.raises(RuntimeError):
        coroutine.send(None)
