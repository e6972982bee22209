"""Fuzz the readers of headers with atheris, which looks for inputs that reach new code. Needs `pip install atheris`.

    python -m tests.fuzz.coverage_guided gguf|safetensors|session SEEDS [options of libFuzzer, such as -runs=100000]

SEEDS: a folder with a file of that kind or more, to begin with; inputs that reach new code are added. Ends with a
traceback at the first input that is refused by another error than ours.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import atheris  # type: ignore[import-not-found]

with atheris.instrument_imports(include=["zsmerge_llm.models", "zsmerge_llm.sessions", "gguf"]):
    from zsmerge_llm.models.gguf_header import read_header
    from zsmerge_llm.models.weight_files import stored_weights
    from zsmerge_llm.sessions.session import load_session

from tests.faults.crafted_sessions import with_checksum
from zsmerge_llm.errors import ZSMergeError


def read_gguf(folder: Path, content: bytes) -> None:
    file = folder / "model.gguf"
    file.write_bytes(content)
    read_header(file)


def read_safetensors(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    stored_weights(folder)


def read_session(folder: Path, content: bytes) -> None:
    file = folder / "it.zsmerge"
    file.write_bytes(with_checksum(content))
    load_session(file)


READERS: dict[str, Callable[[Path, bytes], None]] = {
    "gguf": read_gguf,
    "safetensors": read_safetensors,
    "session": read_session,
}


def try_one(read: Callable[[Path, bytes], None], folder: Path, content: bytes) -> None:
    with contextlib.suppress(ZSMergeError):
        read(folder, content)


def main() -> None:
    kind, *options = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        atheris.Setup([sys.argv[0], *options], partial(try_one, READERS[kind], Path(folder)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
