"""Which process computes with the models that are in memory: a fork has their memory, but not the threads.

OpenMP and the device thread wait for threads that a fork does not have. So whatever would compute or take a lock
raises at once in a process that is a fork of one that has computed.
"""

from __future__ import annotations

import os
from threading import Condition

from zsmerge_llm.errors import ForkedProcessError

_COMPUTING: set[int] = set()
"""This process's id, or its parent's, once it has computed. A fact of the whole process, as are OpenMP's threads."""


def is_forked() -> bool:
    """Return whether this process is a fork of one that had computed before."""
    return bool(_COMPUTING) and os.getpid() not in _COMPUTING


def check_process() -> None:
    """Note that this process computes.

    Raises:
        ForkedProcessError: it is a fork of one that had computed before.
    """
    if is_forked():
        raise ForkedProcessError(
            f"Process {os.getpid()} is a fork of process {next(iter(_COMPUTING))}, which had loaded a model, and a "
            "fork has none of its threads. Load the model in the child, and none before it is made; or start children "
            'by the method "spawn" of multiprocessing.'
        )
    _COMPUTING.add(os.getpid())


class ProcessCondition(Condition):
    """A condition that another thread may hold for ever in a fork, which gets a ForkedProcessError instead."""

    def __enter__(self) -> bool:
        check_process()
        return super().__enter__()
