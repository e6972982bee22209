"""Paths and names that are none: an error of ours that names the remedy, and no file of the user's is given up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.support.chat import Chat, make_llm
from zsmerge_llm import LLM, Session, memory_map, write_html
from zsmerge_llm.errors import ConfigError, InputError, SessionCorruptError, SessionStorageError, ZSMergeError
from zsmerge_llm.sessions.session import load_session

NO_PATHS = [7, None, True, 1.5, b"x", [], {}, ("it",), {"it"}, object(), "", "a\0b", "\ud800", Path("a\0b")]
ODD_PATHS = ["x" * 5000, "folder", Path("folder"), "text.txt", "text.txt/more", "loop", "missing/it", "/dev/zero"]
CALLS: dict[str, Callable[[LLM, Session, Any], object]] = {
    "load_session": lambda llm, session, value: llm.load_session(value),
    "load_session without a model": lambda llm, session, value: load_session(value),
    "save": lambda llm, session, value: session.save(value),
    "write_html": lambda llm, session, value: write_html(memory_map(session), llm.tokenizer, value),
    "sessions_dir": lambda llm, session, value: make_llm(sessions_dir=value).store,
    "read_document": lambda llm, session, value: llm.read_document(Path(value)),
}
NAMES: dict[str, Callable[[LLM, Session, Any], object]] = {
    "session": lambda llm, session, value: llm.session(value),
    "remove": lambda llm, session, value: llm.store.remove(value),
    "fork": lambda llm, session, value: session.fork(value),
    "add_session": lambda llm, session, value: llm.add_session(value),
    "memory_map": lambda llm, session, value: memory_map(value),
    "name of a document": lambda llm, session, value: llm.read_document(text="Hello", name=value),
    "cancel": lambda llm, session, value: llm.read_document(text="Hello", cancel=value),
    "progress": lambda llm, session, value: llm.read_document(text="Hello", progress=value),
}


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.chdir(tmp_path)
    made = make_llm()
    Chat(made, "it").ask("Hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_text("Dear diary")
    (tmp_path / "loop").symlink_to("loop")
    return made


@pytest.mark.parametrize("call", [name for name in CALLS if name != "read_document"])
def test_what_is_no_path_is_an_input_error_that_says_so(llm: LLM, call: str) -> None:
    session = llm.session("it")
    for value in NO_PATHS:
        if call == "sessions_dir" and value is None:
            continue
        with pytest.raises((InputError, ConfigError), match="must be"):
            CALLS[call](llm, session, value)


@pytest.mark.parametrize("call", CALLS)
def test_odd_paths_are_used_or_refused_by_an_error_of_ours(llm: LLM, call: str) -> None:
    session, before = llm.session("it"), Path("text.txt").read_text()
    for value in ODD_PATHS:
        if value in ("text.txt", "/dev/zero") and call in ("save", "write_html"):
            continue
        try:
            CALLS[call](llm, session, value)
        except ZSMergeError as error:
            assert str(error)  # noqa: PT017 - any error of ours is right
    assert Path("text.txt").read_text() == before


@pytest.mark.parametrize("call", NAMES)
def test_names_and_arguments_of_other_types_are_input_errors(llm: LLM, call: str) -> None:
    session = llm.session("it")
    for value in (7, True, 1.5, b"x", [], {}, ("it",), {"it"}, object(), "text" if call == "cancel" else 8):
        with pytest.raises(InputError):
            NAMES[call](llm, session, value)
    assert [value in llm.store for value in (7, [], {}, None, "it")] == [False, False, False, False, True]
    assert llm.store.info([]) is None  # type: ignore[arg-type]
    assert llm.read_document(text="Hello", cancel=Event()).is_document


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"Dear diary,\n" * 20,
        b"%PDF-1.7\n" + bytes(range(256)),
        b"\x7fELF" + bytes(1000),
        (2**63).to_bytes(8, "little") + b"{}",
        (21).to_bytes(8, "little") + b'{"__metadata__":null}',
        (37).to_bytes(8, "little") + b'{"__metadata__":{"about":"something"}}',
    ],
)
def test_a_file_that_may_be_the_user_s_own_is_not_to_be_deleted(llm: LLM, content: bytes) -> None:
    path = Path("mine")
    path.write_bytes(content)
    for load in (llm.load_session, load_session):
        with pytest.raises(SessionCorruptError, match=r"(?i)^(?!.*(delete|remove)).*no saved session.*give a file"):
            load(path)
    assert path.read_bytes() == content


def test_a_session_that_cannot_be_saved_is_a_storage_error_and_an_os_error(llm: LLM, tmp_path: Path) -> None:
    session, kept = llm.session("it"), llm.session("it").save("kept")
    content = kept.read_bytes()
    with pytest.raises(SessionStorageError, match="give another path") as found:
        session.save(tmp_path / "text.txt" / "it")
    assert isinstance(found.value, OSError)
    assert kept.read_bytes() == content


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_saving_never_replaces_what_is_no_file(llm: LLM, tmp_path: Path) -> None:
    """As root it could: a device such as /dev/null would be a file from then on, for all programs."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SessionStorageError):
        llm.session("it").save(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/zero").is_char_device()


@pytest.mark.parametrize("key", ["/dev/zero", "~nobody-of-that-name/key", "folder", "pipe"])
def test_a_session_key_that_is_no_file_is_a_config_error(
    llm: LLM, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    monkeypatch.setenv("ZSMERGE_SESSION_KEY", key)
    with pytest.raises(ConfigError, match="cannot be read"):
        make_llm(sessions_dir=tmp_path / "kept").store  # noqa: B018 - loads
