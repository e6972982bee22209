"""Whatever happens at the same time: a conversation with a name is resumed from its last answer, or the one before.

Each test makes one interleaving happen: events hold a thread up where another one is to come first.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tests.support.chat import SNAPSHOT_NBYTES, dialogue, make_llm
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.sessions.folder import EARLIER_SUFFIX, SUFFIX, Folder
from zsmerge_llm.sessions.session import MAX_ANSWER_SNAPSHOTS, Session
from zsmerge_llm.types import Usage

SHORT = SamplingParams(max_tokens=4)
LONG = "Tell me about the lighthouse on the island and about all those who kept its light."


class Talk:
    """A conversation; `points` are the tokens that had been read before each of its answers."""

    def __init__(self, llm: LLM, name: str = "it") -> None:
        self.llm, self.name = llm, name
        self.messages: list[dict[str, Any]] = []
        self.points = [0]

    def ask(self, count: int = 1, **settings: Any) -> Usage:
        """Take turns; return the usage of the last one."""
        for _ in range(count):
            question = [*self.messages, *dialogue(f"{LONG} {len(self.points)}")]
            result = self.llm.chat(question, session=self.name, sampling=SHORT, **settings)
            self.points.append(result.usage.prompt_tokens)
            self.messages = [*question, {"role": "assistant", "content": result.text}]
        return result.usage

    def cancel(self, text: str = LONG) -> Usage:
        """Begin another turn, and stop it as soon as its prompt has been read."""
        event = Event()
        question = [*self.messages, *dialogue(text)]
        progress = {"cancel": event, "progress": lambda *_: event.set()}
        *_, last = self.llm.stream(question, session=self.name, sampling=SHORT, **progress)
        assert last.usage is not None
        return last.usage

    def before(self, turns: int) -> Talk:
        """Return the same conversation as it was some turns before."""
        talk = Talk(self.llm, self.name)
        talk.messages, talk.points = self.messages[: -2 * turns], self.points[:-turns]
        return talk

    def goes_on(self) -> bool:
        """Return whether a next turn, which is cancelled, reads on from the last answer."""
        return self.cancel(f"{LONG} And then?").cached_tokens >= self.points[-1]

    def goes_on_after_restart(self, folder: Path) -> bool:
        """Return the same for another process on a copy of the folder, which stays as it is."""
        copy = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
        talk = Talk(start(shutil.copytree(folder, copy)), self.name)
        talk.messages, talk.points = self.messages, self.points
        return talk.goes_on()


def start(folder: Path, **settings: Any) -> LLM:
    llm = make_llm(sessions_dir=folder, retrieval_tokens=0, compile=False, **settings)
    llm.engine  # noqa: B018 - the folder is listed now
    return llm


def evict_all(llm: LLM) -> None:
    """Let everything that is on disk leave memory, as when it is full."""
    store, limit = llm.store, llm.store.limit
    store.limit = 0
    store.flush()
    store.limit = limit


def before_save(llm: LLM, monkeypatch: pytest.MonkeyPatch, act: Callable[[str], object]) -> None:
    """Let something happen between the end of each turn and its save."""
    store: Any = llm.store
    save = store._save

    def save_later(name: str) -> None:
        act(name)
        save(name)

    monkeypatch.setattr(store, "_save", save_later)


def drop_older(llm: LLM) -> Callable[[str], object]:
    store: Any = llm.store

    def drop(name: str) -> None:
        with store._lock:
            store._drop_older_snapshots(name)

    return drop


# -- turns that are not answered ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("freed", [True, False])
@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_turn_that_is_cancelled_leaves_the_last_two_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turns: int, freed: bool
) -> None:
    """Whether it was a next turn, the last one again, or an edit. Older points may leave memory before it is saved."""
    talk = Talk(start(tmp_path))
    talk.ask(4)
    if freed:
        before_save(talk.llm, monkeypatch, drop_older(talk.llm))
    talk.before(turns).cancel() if turns else talk.cancel()

    assert talk.goes_on_after_restart(tmp_path)
    assert talk.before(1).goes_on_after_restart(tmp_path)


@pytest.mark.parametrize("persistent", [True, False])
def test_an_answer_whose_repetition_was_cancelled_is_there_after_an_eviction(tmp_path: Path, persistent: bool) -> None:
    llm = start(tmp_path) if persistent else make_llm(retrieval_tokens=0, compile=False)
    talk = Talk(llm)
    talk.ask(3)
    talk.before(1).cancel()
    evict_all(llm)

    assert llm.store.nbytes == 0
    assert talk.goes_on()
    assert talk.before(1).goes_on()


# -- several conversations ---------------------------------------------------------------------------------------------


def test_a_conversation_keeps_its_name_and_points_where_a_branch_has_read_the_question_before(tmp_path: Path) -> None:
    talk = Talk(start(tmp_path))
    talk.ask(3)
    talk.llm.add_session(talk.llm.session("it").fork("branch"))
    branch = Talk(talk.llm, "branch")
    branch.messages, branch.points = talk.messages, talk.points
    branch.cancel(f"{LONG} 4")
    usage = talk.ask()

    assert usage.cached_tokens == usage.prompt_tokens
    assert sorted(info.name for info in talk.llm.store) == ["branch", "it"]
    assert talk.before(1).goes_on_after_restart(tmp_path)
    assert talk.goes_on_after_restart(tmp_path)


def test_a_branch_that_is_made_while_its_origin_leaves_memory_and_removed_takes_nothing_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(start(tmp_path))
    talk.ask(3)
    llm = talk.llm
    before_save(llm, monkeypatch, lambda _: evict_all(llm))
    llm.add_session(llm.session("it").fork("branch"))
    branch = Talk(llm, "branch")
    branch.messages, branch.points = talk.messages, list(talk.points)
    assert branch.ask().cached_tokens >= talk.points[-1]
    llm.store.remove("branch")

    assert talk.goes_on()
    assert talk.before(1).goes_on_after_restart(tmp_path)


# -- other processes ---------------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_between_its_two_renames_leaves_the_last_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(start(tmp_path))
    talk.ask(3)
    renamed: list[Path] = []

    def replace(source: Any, target: Any) -> None:
        if Path(target).suffix in (SUFFIX, EARLIER_SUFFIX):
            if renamed:
                raise KeyboardInterrupt
            renamed.append(Path(target))
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            talk.ask()

    assert talk.goes_on_after_restart(tmp_path)


def test_a_repeated_turn_keeps_the_point_before_it_that_another_process_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = start(tmp_path), start(tmp_path)
    talk = Talk(there)
    talk.ask(3)
    talk.llm = here
    before_save(here, monkeypatch, drop_older(here))
    again = talk.before(1)
    again.ask()

    assert again.before(1).goes_on_after_restart(tmp_path)


def test_a_late_save_of_a_closed_model_is_found_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(start(tmp_path))
    talk.ask(2)
    saving, listed = Event(), Event()
    before_save(talk.llm, monkeypatch, lambda _: (saving.set(), listed.wait(20)))
    thread = Thread(target=talk.ask)
    thread.start()
    assert saving.wait(20)
    closing = Thread(target=talk.llm.close)
    closing.start()
    llm = start(tmp_path)
    assert len(list(llm.store)) == 1
    listed.set()
    thread.join()
    closing.join()

    assert len(talk.points) == 4
    talk.llm = llm
    assert talk.goes_on()
    assert talk.before(1).goes_on_after_restart(tmp_path)


# -- moves in the background -------------------------------------------------------------------------------------------


def test_a_turn_whose_session_leaves_memory_before_it_is_saved_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(start(tmp_path))
    talk.ask(2)
    before_save(talk.llm, monkeypatch, lambda _: evict_all(talk.llm))
    talk.ask(2)

    assert talk.goes_on_after_restart(tmp_path)
    assert talk.before(1).goes_on_after_restart(tmp_path)


@pytest.mark.parametrize("turns", [0, 1])
def test_a_session_that_leaves_memory_while_its_turn_is_answered_is_continued(tmp_path: Path, turns: int) -> None:
    talk = Talk(start(tmp_path))
    talk.ask(3)
    talk = talk.before(1) if turns else talk
    talk.ask(progress=lambda *_: evict_all(talk.llm))

    assert talk.goes_on()
    assert talk.goes_on_after_restart(tmp_path)
    assert talk.before(1).goes_on_after_restart(tmp_path)


def test_a_session_that_leaves_memory_after_it_was_found_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(start(tmp_path))
    talk.ask(3)
    talk.cancel()
    store: Any = talk.llm.store
    find = store.find_resume_points

    def find_then_evict(*arguments: Any) -> Any:
        found = find(*arguments)
        evict_all(talk.llm)
        return found

    monkeypatch.setattr(store, "find_resume_points", find_then_evict)
    assert talk.goes_on()
    assert talk.before(1).goes_on()


def test_sessions_that_are_listed_while_one_is_saved_stay_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(start(tmp_path))
    talk.ask(2)
    version, info = talk.llm.store.version, Folder._info

    def list_before(folder: Folder, session: Session, path: Path) -> Any:
        listing = Thread(target=lambda: list(talk.llm.store))
        listing.start()
        listing.join()
        return info(folder, session, path)

    monkeypatch.setattr(Folder, "_info", list_before)
    talk.ask(2)
    last = version("it")
    list(talk.llm.store)

    assert version("it") == last
    assert [info.name for info in talk.llm.store] == ["it"]
    assert talk.goes_on()


def test_moves_of_many_sessions_lose_no_answer_while_saves_are_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Folder.save

    def save_slowly(*arguments: Any) -> Any:
        Event().wait(0.01)
        return save(*arguments)

    monkeypatch.setattr(Folder, "save", save_slowly)
    llm = start(tmp_path, session_memory=2 * SNAPSHOT_NBYTES)
    talks = [Talk(llm, f"talk {number}") for number in range(6)]
    threads = [Thread(target=_take_and_cancel, args=(talk,)) for talk in talks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [talk.goes_on() for talk in talks] == [True] * 6


def _take_and_cancel(talk: Talk) -> None:
    for _ in range(3):
        talk.ask()
        talk.before(1).cancel()
        talk.cancel()


# -- what is kept of a conversation ------------------------------------------------------------------------------------


def test_edits_to_any_earlier_point_are_committed_whatever_number_of_messages_turns_have(tmp_path: Path) -> None:
    """Turns with two results of tools have an odd number of messages."""
    talk = Talk(start(tmp_path))
    talk.ask(MAX_ANSWER_SNAPSHOTS)
    early = talk.messages[:2]
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    results = [{"role": "tool", "tool_call_id": "1", "content": "fog"}] * 2
    talk.messages = [*early, *dialogue("Look."), {"role": "assistant", "content": "", "tool_calls": [call]}, *results]
    result = talk.llm.chat(talk.messages, session="it", sampling=SHORT)

    assert result.usage.cached_tokens > 0
    assert talk.llm.session("it").head.messages == len(talk.messages) + 1
