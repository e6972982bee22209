"""Choose how many threads a forward pass runs on: what the process may use, and fewer where its threads wait for cores.

The threads of a pass wait for each other some 150 times in a decode step, so one that has no core holds up all others.
Linux says how long threads that could run waited for a core, a CPU quota's pauses included, and how long cores were
idle. Both are independent of how much work a pass is. Elsewhere the number that a process begins with stays.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

CGROUPS, PROCESS, PROCESSOR = Path("/sys/fs/cgroup"), Path("/proc/self"), Path("/proc/stat")

# -- what the process may use ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoreLimit:
    """How many cores the process may use, at least 1, and by what."""

    cores: int
    reason: str


def core_limit(process: Path = PROCESS, cgroups: Path = CGROUPS) -> CoreLimit:
    """Return the cores that the process may use: all, those of its affinity, or the whole cores of its CPU quota."""
    cores, allowed = os.cpu_count() or 1, len(_affinity())
    limit = CoreLimit(allowed, f"of {cores}: the process's affinity" if allowed < cores else "all cores")
    quota = cpu_quota(process, cgroups)
    # A part of a core is none: a thread too many is paused in each period, and the others wait for it.
    if quota is not None and int(quota) < limit.cores:
        limit = CoreLimit(max(1, int(quota)), f"of {allowed}: a CPU quota of {quota:.2g}")
    return limit


def cpu_quota(process: Path = PROCESS, cgroups: Path = CGROUPS) -> float | None:
    """Return the smallest CPU quota of the process's cgroups and their ancestors, in cores; None where there is none.

    Args:
        process: the process's folder in /proc. cgroups: where cgroups are mounted, of version 1, 2 or both.
    """
    quotas = [quota for folder in _cgroup_folders(process, cgroups) if (quota := _folder_quota(folder)) is not None]
    return min(quotas, default=None)


def _affinity() -> Sequence[int]:
    """Return the processors that the calling thread may run on; all, where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def _cgroup_folders(process: Path, cgroups: Path) -> Iterator[Path]:
    """Yield the folders that may limit the process's CPU time, up to the mount.

    In a container the path is often that of the host, and only its end, the mount itself, is there to be read.
    """
    for line in _text(process / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            mounts = [cgroups, cgroups / "unified"]
        elif "cpu" in controllers.split(","):
            mounts = [cgroups / controllers, cgroups / "cpu"]
        else:
            continue
        for mount in mounts:
            folder = Path(os.path.normpath(f"{mount}/{path}"))
            yield from (each for each in (folder, *folder.parents) if each.is_relative_to(mount))


def _folder_quota(folder: Path) -> float | None:
    """Return a cgroup's own quota in cores; None where it has none, or says what is no number."""
    fields = _text(folder / "cpu.max").split()
    if not fields:
        fields = [_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    with suppress(ValueError, ZeroDivisionError):
        quota, period = (int(field) for field in fields)
        return quota / period if quota > 0 and period > 0 else None
    return None


def _text(path: Path) -> str:
    """Return the text of a file; an empty one where it cannot be read."""
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="ascii")
    return ""


# -- how contended the cores are ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CoreTimes:
    """Seconds since some start: of the clock, that this process's threads waited for a core, and that cores idled."""

    clock: float
    waited: float
    idle: float

    def __sub__(self, before: CoreTimes) -> CoreTimes:
        return CoreTimes(self.clock - before.clock, self.waited - before.waited, self.idle - before.idle)


def read_core_times(process: Path = PROCESS, processor: Path = PROCESSOR) -> CoreTimes | None:
    """Read the times of all threads of the process and of the cores it may use; None where the system has none."""
    waited, read_any = 0, False
    with suppress(OSError):
        for task in os.scandir(process / "task"):
            fields = _text(Path(task.path) / "schedstat").split()  # none, where the thread has just ended
            if len(fields) == 3:
                waited, read_any = waited + int(fields[1]), True
    names = {f"cpu{each}" for each in _affinity()}
    lines = [line.split() for line in _text(processor).splitlines() if line.startswith("cpu")]
    idle = [int(line[4]) + int(line[5]) for line in lines if line[0] in names and len(line) > 5]
    if not read_any or not idle:
        return None
    return CoreTimes(time.perf_counter(), waited / 1e9, sum(idle) / os.sysconf("SC_CLK_TCK"))


# -- how many threads --------------------------------------------------------------------------------------------------


class ThreadGovernor:
    """Steps down to fewer threads while threads wait for cores, and back up once cores are idle.

    Attributes:
        limit: the most threads. threads: the most threads now.
    """

    WAITING = 0.2
    """Threads waiting for a core, on average, that are nothing to act on: 0.01 on a quiet machine, 0.5 to 1.5 where two
    threads run beside one or two busy loops or in a quota (docs/research/kernels)."""
    EXCESS = 0.15
    """Seconds of waiting above that before the number changes: one hiccup is less."""
    SPARE = 0.8
    """Idle cores that another thread needs."""
    PATIENCE = (0.5, 60.0)
    """Seconds for which cores must be idle, at first and at most. They double when a return did not last so long."""

    def __init__(self, limit: int) -> None:
        self.limit = self.threads = limit
        self._excess = 0.0
        self._patience = self.PATIENCE[0]
        self._seconds = self._spare = 0.0  # since cores began to be idle, and how much so
        self._since_return: float | None = None

    def observe(self, used: int, times: CoreTimes) -> None:
        """Learn from some time in which passes ran on `used` threads; on 0 of them, none did."""
        if self._since_return is not None:
            self._since_return += times.clock
        self._excess = max(0.0, self._excess + times.waited - self.WAITING * times.clock)
        if used <= 1:
            self._excess = 0.0
        elif self._excess >= self.EXCESS:
            self._step_down(used - max(1, round(times.waited / times.clock)))
            return
        if self.threads < self.limit:
            self._look_for_cores(used, times)

    def _step_down(self, threads: int) -> None:
        shortest, longest = self.PATIENCE
        lasted, self._since_return = self._since_return, None
        failed = lasted is not None and lasted < max(1.0, 4 * self._patience)
        self._patience = min(2 * self._patience, longest) if failed else shortest
        self.threads = max(1, threads)
        self._excess = self._seconds = self._spare = 0.0

    def _look_for_cores(self, used: int, times: CoreTimes) -> None:
        """Step up once cores have been idle, beside the threads that there are, for as long as patience asks."""
        unused = times.idle - (self.threads - used) * times.clock
        if unused < self.SPARE / 2 * times.clock:  # the system counts idle time roughly
            self._seconds = self._spare = 0.0
            return
        self._seconds += times.clock
        self._spare += unused
        if self._seconds < self._patience:
            return
        spare = self._spare / self._seconds
        if spare >= self.SPARE:
            self.threads = min(self.limit, self.threads + max(1, int(spare)))
            self._since_return = 0.0
        self._seconds = self._spare = 0.0


OMP_PAUSE_SOFT = 1
"""Of OpenMP 5.0: what was set for the calling thread stays."""


class OpenMP:
    """Sets the number of threads of the calling thread alone.

    `torch.set_num_threads` would also set it for every thread that uses PyTorch for the first time while a pass runs.
    It is what remains where PyTorch's OpenMP cannot be found (Windows).
    """

    def __init__(self) -> None:
        library: Any = None
        with suppress(OSError):
            library = ctypes.CDLL(torch._C.__file__)  # looks in the libraries that it needs, too
        self._set: Any = getattr(library, "omp_set_num_threads", None)
        is_gnu = not hasattr(library, "__kmpc_fork_call")  # LLVM's would release the threads of all
        self._pause: Any = getattr(library, "omp_pause_resource_all", None) if is_gnu else None
        # MKL, where PyTorch has it, keeps a number of its own for a thread that has called torch.set_num_threads.
        self._set_mkl: Any = getattr(library, "MKL_Set_Num_Threads_Local", lambda _: 0)

    def set(self, threads: int) -> Callable[[], None]:
        """Use `threads` threads from now on; return what brings back the former number."""
        before = torch.get_num_threads()
        if threads == before:
            return lambda: None
        if self._set is None:
            torch.set_num_threads(threads)
            return partial(torch.set_num_threads, before)
        self._set(threads)
        mkl = self._set_mkl(threads)
        return partial(self._restore, before, mkl)

    def release(self) -> None:
        """End the idle threads that the calling thread keeps for its next parallel loop; that loop starts others.

        GNU's OpenMP counts them. Where a process has more threads than cores, those of a pass no longer wait actively
        for each other, and two decode more slowly than one (docs/research/kernels).
        """
        if self._pause is not None:
            self._pause(OMP_PAUSE_SOFT)

    def _restore(self, threads: int, mkl: int) -> None:
        self._set(threads)
        self._set_mkl(mkl)


class PassThreads:
    """Runs the passes of an engine, one after another, on as many threads as help.

    Attributes:
        limit: what the process may use. governor: how much of that is used now.
    """

    INTERVAL = 0.1
    """Seconds between two looks at the system's times, which take 0.1 ms. Without passes for so long, nothing is
    learned about waiting."""

    def __init__(self) -> None:
        self.limit = core_limit()
        self.governor = ThreadGovernor(self.limit.cores)
        self._openmp = OpenMP()
        self._times = read_core_times() if self.limit.cores > 1 else None
        self._ended = time.perf_counter()

    @contextmanager
    def running(self, most: int) -> Iterator[None]:
        """Run a pass within it, on `most` threads at most. The calling thread's own number is the same afterwards."""
        if time.perf_counter() - self._ended > self.INTERVAL:
            self._observe(0)
        used = min(most, self.governor.threads)
        restore = self._openmp.set(used)
        try:
            yield
        finally:
            restore()
            self._ended = time.perf_counter()
            self._observe(used)

    def release(self) -> None:
        """End the idle threads of the calling thread, which waits for a pass in another one."""
        self._openmp.release()

    def choice(self) -> tuple[int, str]:
        """Return how many threads a pass of the calling thread would use now, and why not more."""
        mine, governed = torch.get_num_threads(), self.governor.threads
        if mine < governed:
            return mine, "PyTorch's own number: OMP_NUM_THREADS, torch.set_num_threads or its default"
        if governed < self.limit.cores:
            return governed, f"of {self.limit.cores}: threads waited for cores that other work has"
        return governed, self.limit.reason

    def _observe(self, used: int) -> None:
        """Show the governor the time since the last look, if it is long enough."""
        before = self._times
        if before is None or time.perf_counter() - before.clock < self.INTERVAL:
            return
        self._times = read_core_times()
        if self._times is not None:
            self.governor.observe(used, self._times - before)
