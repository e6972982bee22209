"""A folder of saved sessions: conversations are there after a restart, and no file is mistaken for another's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat import SNAPSHOT_NBYTES, Chat, equal_caches, make_llm, record_passes
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.sessions.folder import Folder, list_folder
from zsmerge_llm.sessions.session import load_session


def test_a_conversation_continues_after_a_restart_with_and_without_its_name(tmp_path: Path) -> None:
    named = Chat(make_llm(sessions_dir=tmp_path), "alice")
    nameless = Chat(named.llm)
    alone = Chat(make_llm(retrieval_tokens=0))
    for turn in range(4):
        named.llm = nameless.llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0)
        with record_passes() as passes:
            first, second = named.ask(f"A {turn}"), nameless.ask(f"B {turn}")
        expected = "continued" if turn else "new"
        assert (first.usage.reuse, second.usage.reuse) == (expected, expected)
        assert first.text == alone.ask(f"A {turn}").text
        assert turn == 0 or sum(passes) < 70

    assert len(named.llm.store) == 2


def test_a_document_is_there_after_a_restart(tmp_path: Path) -> None:
    make_llm(sessions_dir=tmp_path).read_document("Odile keeps the lighthouse.", name="island")
    llm = make_llm(sessions_dir=tmp_path)
    with record_passes() as passes:
        document = llm.read_document("Odile keeps the lighthouse.", name="island")

    assert passes == []
    assert Chat(llm, document).ask("Who?").usage.cached_tokens == len(document.tokens)


def test_models_and_settings_may_share_a_folder(tmp_path: Path) -> None:
    chats = [Chat(make_llm(seed=seed, sessions_dir=tmp_path), "same") for seed in (0, 1)]
    for chat in chats:
        chat.ask("Hello")
    again = [Chat(make_llm(seed=seed, sessions_dir=tmp_path), "same", chats[seed].messages) for seed in (0, 1)]

    assert [chat.ask("Go on").usage.reuse for chat in again] == ["continued", "continued"]
    assert len(list(tmp_path.glob("*.zsmerge"))) == 2


def test_what_is_no_session_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    chat = Chat(llm, "it")
    chat.ask("Hello")
    (mine,) = tmp_path.iterdir()
    ending = "".join(mine.suffixes)
    content = mine.read_bytes()
    foreign = {
        f"empty{ending}": b"",
        f"text{ending}": b"Dear diary",
        f"cut{ending}": content[:100],
        f"flipped{ending}": content[:200] + bytes([content[200] ^ 1]) + content[201:],
        f"copy{ending}": content,
        "notes.txt": b"buy milk",
        "other.zsmerge": b"\xff" * 40,
    }
    for name, data in foreign.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / f"folder{ending}").mkdir()
    chat.llm = make_llm(sessions_dir=tmp_path)

    assert chat.ask("Go on").usage.reuse == "continued"
    assert {info.name for info in chat.llm.store} == {"it", "copy"}  # a copy is a session of its own
    assert {name: (tmp_path / name).read_bytes() for name in foreign} == foreign


NAMES = [
    "../../out",
    "a/b",
    "C:\\x",
    "ÄÖ 灯台",
    "x" * 400,
    "y" * 400,
    "Alice",
    "alice",
    ".",
    "nul\0",
    "%61lice",
    "🙂",
    "\ud800",
]


def test_any_name_makes_a_safe_file_name_of_its_own(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path / "kept")
    chats = [Chat(llm, name) for name in NAMES]
    for chat in chats:
        chat.ask(f"I am {chat.session!r}"[:60])
    again = make_llm(sessions_dir=tmp_path / "kept")

    assert sorted(info.name for info in again.store) == sorted(NAMES)
    assert os.listdir(tmp_path) == ["kept"]
    files = os.listdir(tmp_path / "kept")
    assert len({name.lower() for name in files}) == len(NAMES)
    assert max(len(name.encode()) for name in files) < 200
    for chat in chats:
        chat.llm = again
        assert chat.ask("Go on").usage.reuse == "continued"


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="Give another folder"):
        make_llm(sessions_dir=tmp_path / "file").chat("Hello")


def test_deleting_removes_the_file_too(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    Chat(llm, "it").ask("Hello")
    llm.store.remove("it")

    assert list(tmp_path.iterdir()) == []
    assert len(make_llm(sessions_dir=tmp_path).store) == 0


def test_a_name_taken_over_leaves_the_old_conversation_its_file(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    first, second = Chat(llm, "same"), Chat(llm, "same")
    first.ask("One")
    second.ask("Two")
    again = make_llm(sessions_dir=tmp_path)
    first.llm = second.llm = again
    first.session = None

    assert len(again.store) == 2
    listed = [metadata["name"] for metadata, _ in list_folder(tmp_path)]
    assert sorted(listed) == sorted(info.name for info in again.store)
    assert second.ask("Go on").usage.reuse == "continued"
    assert first.ask("Go on").usage.reuse == "continued"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "save", save)


def test_a_session_that_is_loaded_replaces_the_saved_one_with_the_same_messages(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path / "kept")
    Chat(llm, "it").ask("Hello")
    other = load_session(llm.session("it").save(tmp_path / "one"))
    other.cache.layers[0].keys.zero_()  # as if it had been read in other chunks
    llm.load_session(other.save(tmp_path / "other"))

    assert equal_caches(llm.session("it").cache, other.cache)
    assert equal_caches(make_llm(sessions_dir=tmp_path / "kept").session("it").cache, other.cache)


def assert_answers_and_moves(chat: Chat) -> None:
    assert chat.ask("Hello you").text
    chat.llm.store.flush()


@pytest.mark.usefixtures("full_disk")
@pytest.mark.filterwarnings("ignore:Session:UserWarning")
def test_a_full_disk_is_a_warning_and_the_answer_is_given(tmp_path: Path) -> None:
    lasting, passing = Chat(make_llm(sessions_dir=tmp_path), "it"), Chat(make_llm(session_memory=SNAPSHOT_NBYTES), "it")
    with pytest.warns(UserWarning, match="'it' could not be saved"):
        assert lasting.ask("Hello").text
    with pytest.warns(UserWarning, match="could not be saved"):
        assert lasting.ask("Go on").usage.reuse == "continued"
    passing.ask("Hello")
    with pytest.warns(UserWarning, match="'it' is forgotten: memory is full"):
        assert_answers_and_moves(Chat(passing.llm, "other"))
    assert passing.llm.store.nbytes <= SNAPSHOT_NBYTES
    assert passing.ask("Go on").usage.reuse == "new"


def test_a_session_whose_file_was_exchanged_is_not_mixed_up(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    one, two = Chat(llm, "one"), Chat(llm, "two")
    one.ask("Hello")
    two.ask("Good evening")
    llm = one.llm = make_llm(sessions_dir=tmp_path)
    assert len(llm.store) == 2
    files = sorted(tmp_path.iterdir())
    os.replace(files[1], files[0])

    assert one.ask("Go on").usage.reuse == "reread: the messages and tools are not those of session 'one'"
    two.llm = llm
    assert two.ask("Go on").usage.reuse == "continued"
    texts = [llm.tokenizer.decode(llm.session(name).tokens) for name in ("one", "two")]
    assert ["Good evening" in text for text in texts] == [False, True]


def test_a_saved_session_can_be_read_without_a_model(tmp_path: Path) -> None:
    llm = make_llm()
    Chat(llm, "it").ask("Hello")
    path = llm.session("it").save(tmp_path / "it")

    assert load_session(path).tokens == llm.session("it").tokens
