"""Runs programs in forks of a process that has imported what they import: each in a process of its own, and at once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

IMPORTED = [
    *("zsmerge_llm.runtime", "zsmerge_llm.models.loader", "zsmerge_llm.cpu.compiled_steps"),
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2"),
    *("langchain.agents", "langchain_zsmerge", "llama_index.core.agent.workflow", "llama_index.llms.zsmerge"),
]
"""Modules that the process imports before the first program runs."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(IMPORTED)


def run_program(path: Path, *arguments: str, timeout: float = 900) -> str:
    """Run a Python file as a program without a terminal, and return what it prints.

    Fails with what it says on standard error if it does not end well within `timeout` seconds.
    """
    with TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = FORKS.Process(target=_run, args=(path, arguments, output, errors))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode == 0, f"{process.exitcode}: {errors.read_text(encoding='utf-8')}"
        return output.read_text(encoding="utf-8")


def _run(path: Path, arguments: tuple[str, ...], output: Path, errors: Path) -> None:
    for stream, file in ((1, output), (2, errors)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")
