"""A thread in the background that exists only while there is something to do."""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock, Thread, current_thread
from weakref import WeakMethod

from zsmerge_llm.models.owner_process import is_forked


class Mover:
    """Calls a method again and again in a thread of its own, until it returns False.

    The thread starts with `wake` and ends with the work. It keeps the method's object alive during a call only, and is
    a daemon: whoever needs the work done waits for it (`wait`, `stop`).

    Args:
        step: does a part of the work, and returns whether it did any. It must not raise.
    """

    def __init__(self, step: Callable[[], bool]) -> None:
        self._step = WeakMethod(step)
        self._lock = RLock()  # a garbage collection may call `stop` anywhere
        self._thread: Thread | None = None
        self._running = self._woken = self._stopped = False

    def wake(self) -> None:
        """See to it that the work is done. Where no thread can be started, it is done before this returns."""
        with self._lock:
            self._woken = True
            if self._running or self._stopped or is_forked():
                return
            self._running = True
            try:
                self._thread = Thread(target=self._run, name="zsmerge-mover", daemon=True)
                self._thread.start()
                return
            except RuntimeError:  # the process ends, or has too many threads
                self._thread = None
        self._run()

    def wait(self) -> None:
        """Wait until the work is done and its thread has ended."""
        while True:
            with self._lock:
                thread, running = self._thread, self._running
            if thread is None or thread is current_thread() or not (running or thread.is_alive()):
                return
            thread.join()

    def stop(self) -> None:
        """Do nothing more, once the part that is being done is finished."""
        self._stopped = True
        if not is_forked():  # a fork has no such thread
            self.wait()

    def _run(self) -> None:
        while True:
            step = self._step()
            more = step is not None and not self._stopped and step()
            ended = step is None or self._stopped
            del step
            with self._lock:
                if ended or not (more or self._woken):
                    self._running = False
                    return
                self._woken = False
