"""Sessions in storage that fsspec reaches: two models share it as they share a folder."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.support.chat import Chat, equal_caches, make_llm
from zsmerge_llm import LLM
from zsmerge_llm.errors import ConfigError, SessionNotFoundError
from zsmerge_llm.sessions.remote_folder import RemoteFolder


@pytest.fixture
def url() -> Iterator[str]:
    """A folder of its own in the memory of this process."""
    name = f"memory://{uuid.uuid4().hex}"
    yield name
    fsspec.url_to_fs(name)[0].rm(name, recursive=True)


def start(url: str, **settings: Any) -> LLM:
    return make_llm(sessions_dir=url, retrieval_tokens=0, compile=False, **settings)


def test_a_conversation_goes_on_in_another_process_bit_for_bit(url: str) -> None:
    one, alone = start(url), make_llm(retrieval_tokens=0, compile=False)
    chat, undisturbed = Chat(one, "ann"), Chat(alone, "ann")
    for turn in range(5):
        chat.llm = start(url)
        result = chat.ask(f"What happened in year {turn}?")
        assert result.text == undisturbed.ask(f"What happened in year {turn}?").text
        assert result.usage.reuse == ("continued" if turn else "new")
    assert equal_caches(start(url).session("ann").cache, alone.session("ann").cache)


def test_models_take_turns_with_a_name_and_without(url: str) -> None:
    both = [start(url), start(url)]
    for name in ("ann", None):
        chat = Chat(both[0], name)
        for turn in range(6):
            chat.llm = both[turn % 2]
            assert chat.ask(f"Question {turn} of {name}").usage.reuse == ("continued" if turn else "new")
    assert len(list(both[0].store)) == len(list(both[1].store)) == 2


def test_an_answer_can_be_regenerated_elsewhere(url: str) -> None:
    chat = Chat(start(url), "ann")
    for turn in range(3):
        chat.ask(f"Question {turn}")
    chat.messages.pop()
    chat.llm = start(url)
    assert chat.reply().usage.reuse == "restored"


def test_listing_reads_headers_and_loading_reads_one_file(url: str) -> None:
    one = start(url)
    for number in range(5):
        Chat(one, f"chat {number}").ask("Hello")
    whole = RemoteFolder._download_rest
    with mock.patch.object(RemoteFolder, "_download_rest", autospec=True, side_effect=whole) as read:
        two = start(url)
        assert {info.name for info in two.store} == {f"chat {number}" for number in range(5)}
        assert read.call_count == 0
        two.session("chat 3")
        assert read.call_count == 1
        list(two.store)
        two.session("chat 3")
        assert read.call_count == 1


def test_another_conversation_under_the_same_name_is_set_aside(url: str) -> None:
    one, two = start(url), start(url)
    list(two.store)
    ann, other = Chat(one, "ann"), Chat(two, "ann")
    ann.ask("I am Ann")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.ask("I am somebody else")
        other.ask("Who am I?")
    ann.llm = other.llm = start(url)
    ann.session = None
    assert other.ask("Still?").usage.reuse == "continued"
    assert ann.ask("Still?").usage.reuse == "continued"


def test_what_is_deleted_is_gone_for_all(url: str) -> None:
    one, two = start(url), start(url)
    Chat(one, "ann").ask("Hello")
    assert "ann" in {info.name for info in two.store}
    one.store.remove("ann")
    with pytest.raises(SessionNotFoundError):
        two.session("ann")
    assert list(start(url).store) == []
    assert not fsspec.url_to_fs(url)[0].find(url)


def test_a_turn_is_answered_though_the_storage_fails(url: str) -> None:
    one = start(url)
    chat = Chat(one, "ann")
    chat.ask("Hello")
    with (
        mock.patch.object(MemoryFileSystem, "open", side_effect=RuntimeError("no network")),
        pytest.warns(UserWarning, match="could not be saved"),
    ):
        chat.ask("And now?")
    assert chat.ask("And again?").usage.reuse == "continued"
    chat.llm = start(url)
    assert chat.ask("Elsewhere?").usage.reuse == "continued"


def test_a_damaged_file_is_read_anew(url: str) -> None:
    chat = Chat(start(url), "ann")
    chat.ask("Hello")
    fs, root = fsspec.url_to_fs(url)
    (path,) = (each for each in fs.ls(root, detail=False) if each.endswith(".zsmerge"))
    content = fs.cat_file(path)
    fs.pipe_file(path, content[:-100])
    chat.llm = start(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chat.ask("Still there?").usage.reuse != "continued"


def test_a_file_url_is_a_folder_and_unknown_storage_is_refused(tmp_path: Path) -> None:
    Chat(start(f"file://{tmp_path}/kept"), "ann").ask("Hello")
    assert [info.name for info in start(str(tmp_path / "kept")).store] == ["ann"]
    with pytest.raises(ConfigError, match="Give another folder"):
        start("nosuch://bucket/x").engine  # noqa: B018 - loads it
