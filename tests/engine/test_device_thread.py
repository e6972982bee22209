"""One thread does all work of a device: in order, interleaved, interruptible, and nothing waits for ever."""

from __future__ import annotations

import gc
import itertools
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import pytest
import torch

from zsmerge_llm.engine.device_thread import DeviceThread, Job, Kind
from zsmerge_llm.engine.scheduling import Cancelled, Deadline, RequestLimit
from zsmerge_llm.errors import DeadlineExceededError, QueueFullError

LIMIT = 60


@contextmanager
def held(device: DeviceThread) -> Iterator[None]:
    """Keep the device busy, so that what is submitted meanwhile waits."""
    running, go_on = Event(), Event()

    def hold() -> None:
        running.set()
        assert go_on.wait(LIMIT)

    job = device.submit(Job(hold, Kind.SHORT))
    assert running.wait(LIMIT)
    try:
        yield
    finally:
        go_on.set()
        job.wait()


def order_of(
    device: DeviceThread, jobs: list[tuple[str, Kind, int]], seconds: dict[str, float] | None = None
) -> list[str]:
    """Submit jobs (name, kind, priority) while the device is busy: the order in which they ran."""
    order: list[str] = []

    def run(name: str) -> None:
        time.sleep((seconds or {}).get(name[0], 0))
        order.append(name)

    with held(device):
        waiting = [device.submit(Job(lambda name=name: run(name), kind, priority)) for name, kind, priority in jobs]
    for job in waiting:
        job.wait()
    return order


def test_jobs_of_a_kind_run_in_the_order_in_which_they_arrive() -> None:
    names = [f"job {number}" for number in range(20)]
    assert order_of(DeviceThread(), [(name, Kind.CHUNK, 0) for name in names]) == names


def test_the_lowest_priority_number_goes_first_and_short_work_before_all() -> None:
    jobs = [
        ("c5", Kind.CHUNK, 5),
        ("s5", Kind.STEP, 5),
        ("s1", Kind.STEP, 1),
        ("c0", Kind.CHUNK, 0),
        ("x", Kind.SHORT, 9),
    ]
    assert order_of(DeviceThread(), jobs)[:3] == ["x", "c0", "s1"]


def test_a_step_runs_between_two_chunks_however_large_the_share_of_reading() -> None:
    jobs = [(f"c{number}", Kind.CHUNK, 0) for number in range(5)] + [
        (f"s{number}", Kind.STEP, 0) for number in range(5)
    ]
    order = "".join(name[0] for name in order_of(DeviceThread(reading_share=1.0), jobs))
    assert order == "cscscscscs"


def test_short_prompts_that_wait_together_are_read_before_the_next_step_up_to_one_chunk() -> None:
    device = DeviceThread(reading_share=1.0, max_tokens=512)
    sizes = [64, 200, 248, 1, 512, 512]
    order: list[str] = []
    with held(device):
        jobs = [
            device.submit(Job(lambda size=size: order.append(f"c{size}"), Kind.CHUNK, tokens=size)) for size in sizes
        ]
        jobs += [device.submit(Job(lambda: order.append("s"), Kind.STEP)) for _ in range(4)]
    for job in jobs:
        job.wait()
    # 64 + 200 + 248 tokens are one chunk. The one token counts as 64, beside which 512 do not fit.
    assert order == ["c64", "c200", "c248", "s", "c1", "s", "c512", "s", "c512", "s"]


def test_streams_have_their_share_of_the_time_after_several_short_prompts() -> None:
    device, order = DeviceThread(reading_share=0.5, max_tokens=512), []

    def run(name: str, seconds: float) -> None:
        time.sleep(seconds)
        order.append(name)

    with held(device):
        jobs = [device.submit(Job(lambda: run("c", 0.05), Kind.CHUNK, tokens=128)) for _ in range(5)]
        jobs += [device.submit(Job(lambda: run("s", 0.01), Kind.STEP)) for _ in range(40)]
    for job in jobs:
        job.wait()
    assert order[:4] == ["c"] * 4
    steps = order[4:].index("c")  # of 10 ms and more each, after 200 ms of reading
    assert 6 <= steps <= 30  # one chunk alone would leave them 50 ms


def test_reading_gets_its_share_of_the_time_while_streams_wait() -> None:
    jobs = [(f"c{number}", Kind.CHUNK, 0) for number in range(3)] + [
        (f"s{number}", Kind.STEP, 0) for number in range(40)
    ]
    order = order_of(DeviceThread(reading_share=0.5), jobs, {"c": 0.1, "s": 0.01})
    chunks = [at for at, name in enumerate(order) if name[0] == "c"]
    assert chunks[0] == 0
    assert all(5 <= later - earlier <= 12 for earlier, later in itertools.pairwise(chunks))


def test_reading_gets_its_share_also_where_each_client_comes_back_when_its_job_is_done() -> None:
    device, order, ended = DeviceThread(reading_share=0.5), [], Event()

    def run(kind: Kind, seconds: float) -> None:
        started = time.perf_counter()
        time.sleep(seconds)
        order.append((kind, time.perf_counter() - started))

    def stream() -> None:
        while not ended.is_set():
            device.call(lambda: run(Kind.STEP, 0.01), Kind.STEP)

    client = Thread(target=stream)
    client.start()
    for _ in range(4):
        device.call(lambda: run(Kind.CHUNK, 0.1), Kind.CHUNK)
    ended.set()
    client.join(LIMIT)
    chunks = [at for at, (kind, _) in enumerate(order) if kind is Kind.CHUNK]
    # Over all chunks: on a loaded machine a client may come back late once.
    steps = sum(seconds for kind, seconds in order[chunks[0] : chunks[-1]] if kind is Kind.STEP)
    reading = sum(order[at][1] for at in chunks[:-1])
    assert reading / 3 <= steps <= reading * 3  # without a share it would be a tenth


def test_an_error_of_what_jobs_run_within_reaches_the_caller() -> None:
    failing = [True]

    @contextmanager
    def within(threads: int) -> Iterator[None]:
        if failing.pop():
            raise OSError("no such file")
        yield

    device = DeviceThread(within=within)
    with pytest.raises(OSError, match="no such file"):
        device.call(lambda: 7)
    failing.append(False)
    assert device.call(lambda: 7) == 7


def test_only_the_device_thread_runs_jobs_one_at_a_time() -> None:
    device, running, threads = DeviceThread(), [], set()

    def work() -> None:
        threads.add(threading.get_ident())
        running.append(1)
        time.sleep(0.0005)
        assert len(running) == 1
        running.pop()

    clients = [Thread(target=lambda: [device.call(work) for _ in range(50)]) for _ in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(LIMIT)
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_error_reaches_the_caller_and_the_thread_goes_on() -> None:
    device = DeviceThread()
    with pytest.raises(ZeroDivisionError):
        device.call(lambda: 1 // 0)
    assert device.call(lambda: 7) == 7
    assert device.call(lambda: device.call(lambda: 8)) == 8  # from within the thread: at once


def test_an_event_that_is_set_while_a_job_waits_gives_it_up() -> None:
    device, cancel, ran = DeviceThread(), Event(), []
    with held(device):
        timer = threading.Timer(0.05, cancel.set)
        timer.start()
        with pytest.raises(Cancelled):
            device.call(lambda: ran.append(1), Kind.CHUNK, cancel=cancel)
    device.call(lambda: None)
    assert not ran


def test_a_job_does_waiting_ones_along_with_its_own() -> None:
    device, results = DeviceThread(), []

    def lead() -> int:
        device.wait_for(lambda row: row in ("b", "c"), 2)
        for job in device.take(lambda row: row in ("b", "c")):
            job.finish(f"with a: {job.row}")
        return 0

    def never() -> Any:
        raise AssertionError("done along with another")

    with held(device):
        jobs = [device.submit(Job(lead, Kind.STEP, 0, "a"))]
        jobs += [device.submit(Job(never, Kind.STEP, 0, row)) for row in ("b", "c")]
    results = [job.wait() for job in jobs]
    assert results == [0, "with a: b", "with a: c"]


def interrupt() -> None:
    """Do what Ctrl-C does."""
    ident = threading.main_thread().ident
    assert ident is not None
    signal.pthread_kill(ident, signal.SIGINT)


@contextmanager
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores SIGINT
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_interrupt_gives_up_a_job_that_waits() -> None:
    device, ran = DeviceThread(), []
    with interruptible(), held(device):
        threading.Timer(0.05, interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            device.call(lambda: ran.append(1), Kind.STEP)
    device.call(lambda: None)
    assert not ran


@pytest.mark.parametrize("kind", Kind)
def test_an_interrupt_waits_for_a_job_that_runs(kind: Kind) -> None:
    device, ended = DeviceThread(), []

    def work() -> None:
        interrupt()
        time.sleep(0.2)
        ended.append(1)

    with interruptible(), pytest.raises(KeyboardInterrupt):
        device.call(work, kind)
    assert ended  # nothing uses the caller's cache any more


def test_the_thread_ends_with_its_owner_and_keeps_nothing_alive() -> None:
    class Thing:
        pass

    device, thing = DeviceThread(), Thing()
    device.call(lambda thing=thing: None)
    gone, thread = weakref.ref(thing), device._thread
    assert thread is not None
    del thing
    gc.collect()
    assert gone() is None
    del device
    gc.collect()
    thread.join(LIMIT)
    assert not thread.is_alive()


def test_a_deadline_stops_and_says_so_unless_the_caller_did() -> None:
    cancel = Event()
    passed, ahead = Deadline(cancel, 1e-9), Deadline(cancel, 1e9)
    assert passed.is_set()
    assert not ahead.is_set()
    ahead.check()
    with pytest.raises(DeadlineExceededError, match="timeout"):
        passed.check()
    cancel.set()
    assert ahead.is_set()
    passed.check()


def test_requests_beyond_the_limit_are_refused_and_those_that_end_make_room() -> None:
    limit = RequestLimit(2)
    with limit.admit():
        with limit.admit(), pytest.raises(QueueFullError, match="2 requests"), limit.admit():
            pass
        with pytest.raises(ZeroDivisionError), limit.admit():
            raise ZeroDivisionError
        with limit.admit():
            pass


def test_jobs_run_within_what_the_backend_makes_for_the_callers_number_of_threads() -> None:
    seen = []

    @contextmanager
    def within(threads: int) -> Iterator[None]:
        seen.append(threads)
        yield
        seen.append("ended")

    device = DeviceThread(within=within)
    assert device.call(lambda: list(seen)) == [torch.get_num_threads()]
    assert seen == [torch.get_num_threads(), "ended"]
