"""Documents are regular files of a bounded size: nothing reads until memory ends."""

from __future__ import annotations

import io
import os
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from zsmerge_llm.cli.app import app
from zsmerge_llm.errors import ContextLimitError, InputError
from zsmerge_llm.retrieval import documents


@pytest.mark.parametrize("kind", ["device", "pipe"])
def test_a_device_or_a_pipe_is_no_document(tmp_path: Path, kind: str) -> None:
    path = Path("/dev/zero")
    if kind == "pipe":
        path = tmp_path / "pipe"
        os.mkfifo(path)
    with pytest.raises(InputError, match="no regular file"):
        documents.read_text(path)
    result = CliRunner().invoke(app, ["ask", str(path), "What?"])
    assert result.exit_code == 2
    assert "no regular file" in result.output


def test_a_file_beyond_the_limit_is_refused_and_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    path.write_text("a" * 2000)
    stream = io.BytesIO(b"a" * 100_000)
    with mock.patch.object(documents, "MAX_BYTES", 1000):
        with pytest.raises(ContextLimitError, match="more than 1,000 bytes"):
            documents.read_text(path)
        with pytest.raises(ContextLimitError, match="standard input"):
            documents.read_stream(stream, "standard input")
        assert stream.tell() == 1001
        result = CliRunner().invoke(app, ["ask", "-", "What?"], input=b"b" * 5000)
    assert result.exit_code == 2
    assert "more than 1,000 bytes" in result.output


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(InputError, match="cannot be read as text"):
            documents.read_text(path)


def test_the_ends_of_lines_are_those_of_text_files(tmp_path: Path) -> None:
    path = tmp_path / "windows.txt"
    path.write_bytes("a\r\nb\rc\né\r".encode())
    assert documents.read_text(path) == (path.read_text(encoding="utf-8"), "windows")
