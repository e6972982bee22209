"""A disk that refuses: turns are answered, deletions happen whole or not at all, and nothing unfinished stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat import SHORT, SNAPSHOT_NBYTES, Chat, make_llm
from zsmerge_llm.errors import ConfigError, SessionStorageError
from zsmerge_llm.models.file_locks import locked
from zsmerge_llm.sessions.folder import Folder, delete_files

ROOT = Path(__file__).parents[2]


def refuse(*_: Any, **__: Any) -> None:
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("name", ["it", None])
@pytest.mark.filterwarnings("ignore:Session:UserWarning")
def test_turns_go_on_where_the_file_of_a_conversation_has_become_a_folder(tmp_path: Path, name: str | None) -> None:
    llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0, session_memory=3 * SNAPSHOT_NBYTES)
    chat = Chat(llm, name)
    chat.ask("Hello")
    (file,) = tmp_path.glob("*.zsmerge")
    for path in (file, file.with_suffix(".earlier")):
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "inside").write_text("x")
    for turn in range(3):
        assert chat.ask(f"Question {turn}").usage.reuse == "continued"
        llm.chat(f"Another {turn}", sampling=SHORT)
    assert Chat(make_llm(sessions_dir=tmp_path), "new").ask("Hello").usage.reuse == "new"


@pytest.mark.parametrize("operation", ["replace", "link", "unlink", "open", "stat"])
@pytest.mark.filterwarnings("ignore:Session:UserWarning")
def test_turns_go_on_where_the_system_refuses(tmp_path: Path, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0, session_memory=3 * SNAPSHOT_NBYTES)
    chats = [Chat(llm, "one"), Chat(llm, "two"), Chat(llm)]
    for chat in chats:
        chat.ask("Hello")
    llm.store.flush()
    with monkeypatch.context() as patch:
        if operation == "open":
            patch.setattr("tempfile.mkstemp", refuse)
        elif operation in ("stat", "unlink"):
            patch.setattr(Path, operation, refuse)
        else:
            patch.setattr(os, operation, refuse)
        for turn in range(2):
            for chat in chats:
                assert chat.ask(f"Question {turn}").text is not None
            llm.chat(f"Nobody {turn}", sampling=SHORT)
        llm.store.flush()
    for chat in chats:
        assert chat.ask("Go on").text is not None


def test_a_deletion_that_the_system_refuses_deletes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0)
    chat = Chat(llm, "it")
    chat.ask("Hello")
    chat.ask("Go on")
    before = sorted(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(SessionStorageError, match=r"cannot be deleted .*so its session stays: allow writing"):
            llm.store.remove("it")
        with pytest.raises(SessionStorageError):
            delete_files(before[-1])
    assert sorted(tmp_path.iterdir()) == before
    assert chat.ask("And on").usage.reuse == "continued"

    llm.store.remove("it")
    assert list(tmp_path.iterdir()) == []
    assert len(make_llm(sessions_dir=tmp_path).store) == 0


def test_leftovers_without_an_owner_go_at_the_next_start_and_those_that_are_written_stay(tmp_path: Path) -> None:
    Chat(make_llm(sessions_dir=tmp_path), "it").ask("Hello")
    (kept,) = tmp_path.iterdir()
    names = [".saving-dead.tmp", ".saving-alive.tmp", f"gone.{kept.name.split('.')[1]}.earlier", "mine.earlier"]
    for name in names:
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".saving-new.tmp").write_text("x")
    with locked(tmp_path / ".saving-alive.tmp"):
        make_llm(sessions_dir=tmp_path).store  # noqa: B018 - loaded now
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {kept.name, ".saving-alive.tmp", ".saving-new.tmp", "mine.earlier"}


def test_nothing_unfinished_stays_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0)
    chat = Chat(llm, "it")
    chat.ask("Hello")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.warns(UserWarning, match="'it' could not be saved"):
        chat.ask("Go on")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_machine_without_a_temporary_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ConfigError, match="set TMPDIR, or give sessions_dir"):
        make_llm().chat("Hello")


SMALL_DISK = """
import resource, signal, sys, warnings
from pathlib import Path
from tests.support.chat import SNAPSHOT_NBYTES, Chat, make_llm
folder = Path(sys.argv[1])
chat = Chat(make_llm(sessions_dir=folder, retrieval_tokens=0), "it")
chat.ask("Hello")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for turn in range(3):
        assert chat.ask(f"Question {turn}").usage.reuse == "continued"
    other = Chat(make_llm(session_memory=SNAPSHOT_NBYTES), "it")
    for turn in range(3):
        other.ask(f"Question {turn}")
        other.llm.store.flush()
print(sum("could not be saved" in str(each.message) for each in caught))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
chat.ask("Go on")
chat.llm = make_llm(sessions_dir=folder, retrieval_tokens=0)
print(chat.ask("And on").usage.reuse, sorted(path.suffix for path in folder.iterdir()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no limits of the size of files")
def test_turns_go_on_where_no_file_can_grow_and_are_saved_when_it_can_again(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", SMALL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3", "continued ['.earlier', '.zsmerge']"]


def test_saving_stays_as_fast_with_many_conversations(tmp_path: Path) -> None:
    """What a turn pays for other processes is a look at one file."""
    llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0)
    Chat(llm, "it").ask("Hello")
    start = time.perf_counter()
    for _ in range(1000):
        llm.store.refresh("it")
    assert time.perf_counter() - start < 1.0
    assert isinstance(llm.store._folder, Folder)
