"""`zsmerge-llm serve` as a process of its own, on a free port of this machine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[2]
SERVE = [sys.executable, "-c", "from zsmerge_llm.cli.app import main; main()", "serve", "--port", "0"]


@contextmanager
def server_process(
    options: list[str],
    environment: Mapping[str, str],
    start_seconds: float,
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[tuple[str, int]]:
    """Start a server; yield its address and the id of its process. At the end it gets the signal."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([*SERVE, *options], env={**os.environ, **environment}, cwd=ROOT, text=True, **output)
    lines: Queue[str] = Queue()
    assert process.stdout is not None
    stdout = process.stdout
    threading.Thread(target=lambda: [lines.put(line) for line in stdout], daemon=True).start()
    try:
        while (found := re.search(r"http://127\.0\.0\.1:\d+", lines.get(timeout=start_seconds))) is None:
            pass
        yield found[0], process.pid
    finally:
        process.send_signal(stop)
        process.wait(60)
