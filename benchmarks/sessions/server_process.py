"""`zsmerge-llm serve` as a process of its own, for benchmarks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

COMMAND = [sys.executable, "-c", "from zsmerge_llm.cli.app import main; main()", "serve", "--port", "0"]


@contextmanager
def serving(*options: str, **environment: str) -> Iterator[tuple[str, psutil.Process]]:
    """Start a server with options of the command; yield its address and its process."""
    command, variables = [*COMMAND, *options], {**os.environ, **environment}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
    assert process.stdout is not None
    found = None
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            break
    assert found is not None, "the server did not start"
    threading.Thread(target=process.stdout.read, daemon=True).start()
    try:
        yield found[0], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)
