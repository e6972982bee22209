"""The thread in the background: it is there while there is work, and keeps nothing alive."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from threading import Event, Thread
from unittest import mock

from zsmerge_llm.sessions.mover import Mover

LIMIT = 60


class Work:
    """Some steps to be done; `go_on` lets each finish."""

    def __init__(self, steps: int) -> None:
        self.left = steps
        self.begun, self.go_on = Event(), Event()
        self.mover = Mover(self.step)

    def step(self) -> bool:
        self.begun.set()
        assert self.go_on.wait(LIMIT)
        if not self.left:
            return False
        self.left -= 1
        return True


def test_the_thread_ends_with_the_work() -> None:
    before = set(threading.enumerate())
    work = Work(5)
    assert set(threading.enumerate()) == before, "it starts when there is something to do"
    work.go_on.set()
    for _ in range(3):
        work.left = 5
        work.mover.wake()
        work.mover.wait()
        assert work.left == 0
        assert set(threading.enumerate()) <= before


def test_work_that_comes_while_it_ends_is_done() -> None:
    work = Work(0)
    work.mover.wake()
    assert work.begun.wait(LIMIT)
    work.left = 1
    work.mover.wake()
    work.go_on.set()
    work.mover.wait()
    assert work.left == 0


def test_it_does_not_keep_its_owner_alive_and_stops_without_it() -> None:
    work = Work(1_000_000)
    dead, go_on = weakref.ref(work), work.go_on
    work.mover.wake()
    assert work.begun.wait(LIMIT)
    mover = work.mover
    del work
    go_on.set()
    mover.wait()
    gc.collect()
    assert dead() is None


def test_stopping_finishes_the_step_and_makes_no_other() -> None:
    work = Work(9)
    work.mover.wake()
    assert work.begun.wait(LIMIT)
    stopping = Thread(target=work.mover.stop)
    stopping.start()
    while not work.mover._stopped:
        pass
    work.go_on.set()
    stopping.join(LIMIT)
    assert work.left == 8
    work.mover.wake()
    work.mover.wait()
    assert work.left == 8


def test_where_no_thread_can_be_started_the_work_is_done_at_once() -> None:
    work = Work(3)
    work.go_on.set()
    with mock.patch.object(Thread, "start", side_effect=RuntimeError("can't start new thread")):
        work.mover.wake()
    assert work.left == 0
    work.mover.wait()


SCRIPT = """
import time
from zsmerge_llm.sessions.mover import Mover
import weakref

class Owner:
    def __init__(self):
        self.mover = Mover(self.step)
        weakref.finalize(self, Mover.stop, self.mover)

    def step(self):
        print("begun", flush=True)
        time.sleep(0.5)
        print("finished", flush=True)
        return True

owner = Owner()
owner.mover.wake()
time.sleep(0.2)
"""


def test_the_end_of_the_process_waits_for_the_step_that_is_being_made() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=LIMIT, check=True)
    assert ended.stdout.split() == ["begun", "finished"]
    assert not ended.stderr
