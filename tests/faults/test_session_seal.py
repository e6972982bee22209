"""With a session key only sealed files are read; folders and files are closed to others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.crafted_sessions import with_checksum
from tests.support.chat import Chat, make_llm
from zsmerge_llm import LLM, Session
from zsmerge_llm.errors import ConfigError, SessionCorruptError, SessionError
from zsmerge_llm.inspection.html import write_html
from zsmerge_llm.inspection.memory_map import memory_map
from zsmerge_llm.sessions.seal import KEY_VARIABLE
from zsmerge_llm.sessions.session import load_session


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm("qwen2.5")


@pytest.fixture(scope="module")
def session(llm: LLM) -> Session:
    Chat(llm, "it").ask("Hello")
    return llm.session("it")


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A session key that is in use."""
    return use_key(tmp_path / "key", bytes(range(32)), monkeypatch)


def use_key(path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    monkeypatch.setenv(KEY_VARIABLE, str(path))
    return path


def test_a_sealed_session_is_read_again_in_a_folder_and_by_its_path(key: Path, tmp_path: Path) -> None:
    chat = Chat(make_llm("qwen2.5", sessions_dir=tmp_path / "chats"), "it")
    chat.ask("Hello")
    path = chat.llm.session("it").save(tmp_path / "copy")
    again = Chat(make_llm("qwen2.5", sessions_dir=tmp_path / "chats"), "it", chat.messages)

    assert again.llm.load_session(path).tokens == chat.llm.session("it").tokens
    assert again.ask("Go on").usage.reuse == "continued"


def test_a_sealed_file_needs_its_key(
    key: Path, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = session.save(tmp_path / "it")
    use_key(tmp_path / "other", bytes(32), monkeypatch)
    with pytest.raises(SessionCorruptError, match="not sealed with this session key"):
        load_session(path)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(SessionCorruptError, match=f"set {KEY_VARIABLE} to the file"):
        load_session(path)


def test_with_a_key_a_file_without_a_seal_is_refused(
    session: Session, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = session.save(tmp_path / "it")
    use_key(tmp_path / "key", bytes(32), monkeypatch)

    with pytest.raises(SessionCorruptError, match=f"load it without {KEY_VARIABLE}"):
        llm.load_session(path)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nobody_changes_a_sealed_file_without_its_key(
    data: st.DataObject, key: Path, session: Session, tmp_path: Path
) -> None:
    path = session.save(tmp_path / "it", durable=False)
    changed = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(changed[:8], "little")
    places = st.one_of(st.integers(8, header - 1), st.integers(header, len(changed) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=4, unique=True)):
        changed[place] ^= data.draw(st.integers(1, 255))
    for content in (changed, with_checksum(bytes(changed))):
        path.write_bytes(content)
        with pytest.raises(SessionError):
            load_session(path)


@pytest.mark.parametrize("problem", ["missing", "short", "readable"])
def test_a_bad_key_is_refused_at_once_with_the_remedy(problem: str, key: Path, tmp_path: Path) -> None:
    if problem == "missing":
        key.unlink()
    elif problem == "short":
        key.write_bytes(b"short")
    else:
        key.chmod(0o644)
    remedy = {"missing": "Make one: ", "short": "at least 32", "readable": "chmod 600"}[problem]

    with pytest.raises(ConfigError, match=remedy):
        make_llm("qwen2.5", sessions_dir=tmp_path / "chats").store  # noqa: B018


def test_folders_and_files_of_sessions_are_closed_to_others(llm: LLM, session: Session, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        kept = make_llm("qwen2.5", sessions_dir=tmp_path / "chats")
        Chat(kept, "it").ask("Hello")
        page = tmp_path / "page.html"
        page.touch(0o666)
        write_html(memory_map(session), llm.tokenizer, page)
        new = write_html(memory_map(session), llm.tokenizer, tmp_path / "new.html")
    finally:
        os.umask(before)
    (file,) = (tmp_path / "chats").glob("*.zsmerge")

    assert (tmp_path / "chats").stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in (file, page, new)] == [0o600] * 3


def test_a_sessions_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "chats"
    folder.mkdir()
    folder.chmod(0o777)

    with pytest.raises(ConfigError, match="chmod go-w"):
        make_llm("qwen2.5", sessions_dir=folder).store  # noqa: B018
