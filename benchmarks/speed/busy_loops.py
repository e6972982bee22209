"""Other programs on the machine: a busy loop on each core. Imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

LOOP = [sys.executable, "-c", "while True: pass"]


@contextmanager
def busy_loops() -> Iterator[None]:
    """Keep every core busy with a program of its own."""
    loops = [subprocess.Popen(LOOP) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.3)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
