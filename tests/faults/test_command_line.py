"""Closed streams, full disks and arguments that cannot be: the command line ends in an exit code, not a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.chat import make_llm
from zsmerge_llm.cli import app as cli
from zsmerge_llm.cli.console import printable
from zsmerge_llm.cli.sessions import _file
from zsmerge_llm.errors import InputError

PROGRAM = f"{sys.executable} -c 'from zsmerge_llm.cli.app import main; main()'"
HUGE = "9" * 30
NO_NUMBERS = (f"-{HUGE}", "1e999", "nan", "", "\0", "\ud800", "0x10")


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command line of the shell, in which ZS is the program, in a folder. Its last line on stderr is its code."""
    command = command.replace("ZS", PROGRAM) + '; echo "code $?" >&3'
    environment = {**os.environ, "ZSMERGE_CACHE_DIR": str(folder / "cache")}
    reading, writing = os.pipe()
    done = subprocess.run(
        ["bash", "-c", f"exec 3>&{writing}; {command}"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        pass_fds=[writing],
        timeout=60,
    )
    os.close(writing)
    with os.fdopen(reading) as pipe:
        done.returncode = int(pipe.read().split()[-1])
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
    return done


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with files that are nothing for the program."""
    (tmp_path / "text.txt").write_text("The cat sat.")
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4\n1 0 obj << /Length 8 >> stream\nhello\n")
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "folder").mkdir()
    (tmp_path / "damaged.zsmerge").write_bytes(b"{}")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("ZS models <&-", 0),
        ("ZS models >&-", 0),
        ("ZS models 2>&-", 0),
        ("ZS models <&- >&- 2>&-", 0),
        ("ZS models >/dev/full", 2),
        ("ZS --help >/dev/full", 2),
        ("ZS nonsense 2>/dev/full", 2),
        ("ZS ask a.pdf Why? 2>/dev/full", 2),
        ("ZS ask a.pdf Why? >&- 2>&-", 2),
        ("ZS ask - Why? <&-", 2),
        ("set -o pipefail; (sleep 3; ZS models) | true", 1),
    ],
)
def test_closed_streams_and_full_disks_end_in_an_exit_code(place: Path, command: str, code: int) -> None:
    assert shell(command, place).returncode == code


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    ("option", "value"),
    [("--slots", HUGE), ("--max-tokens", HUGE)]  # a temperature may be as large
    + [(option, value) for option in ("--slots", "--max-tokens", "--temperature") for value in NO_NUMBERS],
)
def test_numbers_that_cannot_be_are_wrong_use(place: Path, option: str, value: str) -> None:
    assert run("ask", str(place / "text.txt"), "Why?", option, value, "--model", "./none").exit_code == 2


@pytest.mark.parametrize("option", ["--slots", "--sessions", "--chunk", "--memory"])
@pytest.mark.parametrize("value", [HUGE, f"-{HUGE}", "1e999", "nan", "", "\0"])
def test_numbers_of_a_plan_that_cannot_be_are_wrong_use(option: str, value: str) -> None:
    assert run("plan", option, value, "--model", "./none").exit_code == 2


@pytest.mark.parametrize("name", ["a.pdf", "bytes", "folder", "none", "x" * 5000, "\0", "~nobody-of-that-name/x"])
def test_what_is_no_text_is_not_read(place: Path, name: str) -> None:
    result = run("ask", str(place / name) if "~" not in name else name, "Why?")
    assert result.exit_code == 2
    assert "Error" in result.stderr


def test_an_endless_file_is_refused() -> None:
    result = run("ask", "/dev/zero", "Why?")
    assert result.exit_code == 2
    assert "is no regular file" in result.stderr


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "~nobody-of-that-name/x", "", ".", "/dev/null", "a@b@c", "-"])
def test_a_model_that_cannot_be_is_named(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert run("plan", f"--model={name}", "--device=cpu").exit_code == 2


@pytest.mark.parametrize("name", ["text.txt", "bytes", "a.pdf"])
def test_a_file_that_is_no_session_is_not_to_be_deleted(place: Path, name: str) -> None:
    result = run("inspect", str(place / name))
    assert result.exit_code == 2
    assert "is no saved session" in result.stderr
    assert "elete" not in result.stderr


@pytest.mark.parametrize("name", ["damaged.zsmerge", "folder", "none", "x" * 5000, "\0"])
def test_a_session_that_cannot_be_inspected_is_named(place: Path, name: str) -> None:
    assert run("inspect", str(place / name)).exit_code == 2


@pytest.mark.parametrize("command", [["list"], ["show", "x"], ["rm", "x"]])
@pytest.mark.parametrize("folder", ["text.txt", "none", "x" * 5000])
def test_a_sessions_folder_that_is_none_is_named(place: Path, command: list[str], folder: str) -> None:
    result = run("sessions", *command, "--dir", str(place / folder))
    assert result.exit_code == 2
    assert "is no folder that can be read" in result.stderr


def test_a_cache_folder_that_cannot_be_made_does_not_hide_the_list_of_models(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZSMERGE_CACHE_DIR", str(place / "text.txt"))
    assert run("models").exit_code == 0
    monkeypatch.setenv("ZSMERGE_CACHE_DIR", "~nobody-of-that-name")
    assert run("models").exit_code == 2


@pytest.mark.parametrize("text", ["\x1b[2J\x1b]0;title\x07", "\x9b31m", "a\rb", "\x08\x08\x7f"])
def test_control_characters_do_not_reach_the_terminal(text: str, place: Path) -> None:
    assert not set(printable(text)) & set("\x1b\x07\x9b\r\x08\x7f")
    assert printable("a\n\tb\u00e9") == "a\n\tb\u00e9"
    result = run("sessions", "show", text, "--dir", str(place))
    assert not set(result.stderr) & set("\x1b\x07\x9b\r\x08\x7f")


def test_a_session_is_found_by_its_name_where_a_file_has_that_name_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.txt").write_text("The ship sailed.", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    llm = make_llm(sessions_dir=tmp_path / "kept")
    llm.read_document("report.txt", name="report.txt")
    assert _file("report.txt", tmp_path / "kept").parent == tmp_path / "kept"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no saved session"):
        _file("report.txt", tmp_path / "empty")
