"""Many conversations in little memory: each continues as if it had never been spilled to disk."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.support.chat import SMALL_CACHE, SNAPSHOT_NBYTES, Chat, dialogue, equal_caches, make_llm
from tests.support.tiers import pretended_device
from zsmerge_llm import SamplingParams, Session
from zsmerge_llm.errors import SessionNotFoundError, StoreFullError

BRIEF = SamplingParams(max_tokens=2)


class Conversation:
    """What a conversation must look like: its messages, its ids, and a cache that never leaves memory."""

    def __init__(self, messages: list[dict[str, Any]], session: Session) -> None:
        self.messages = messages
        self.tokens = session.tokens
        self.expected_cache = session.cache.clone()

    def check(self, session: Session) -> None:
        assert session.tokens == self.tokens
        assert equal_caches(session.cache, self.expected_cache)


class SessionMachine(RuleBasedStateMachine):
    """Any order of beginning, continuing, forking, editing, regenerating, deleting, saving, loading and restarting."""

    persistent = False

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.known: dict[str, Conversation] = {}
        self.saved: list[tuple[Path, str, Conversation]] = []
        self.count = 0
        self.start()

    def start(self) -> None:
        kept = {"sessions_dir": self.folder / "kept"} if self.persistent else {}
        self.llm = make_llm(cache=SMALL_CACHE, session_memory=3 * SNAPSHOT_NBYTES, **kept)

    def teardown(self) -> None:
        for name, conversation in getattr(self, "known", {}).items():
            conversation.check(self.llm.session(name))
        if hasattr(self, "llm"):
            self.llm.close()
        shutil.rmtree(getattr(self, "folder", "/nonexistent"), ignore_errors=True)

    def chat(self, messages: list[dict[str, Any]], name: str | None) -> tuple[str, list[dict[str, Any]]]:
        answer = self.llm.chat(messages, session=name, sampling=BRIEF)
        return answer.usage.reuse, [*messages, {"role": "assistant", "content": answer.text}]

    def new_text(self) -> str:
        self.count += 1
        return f"text {self.count}."

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.known)))

    @rule(name=st.sampled_from("abcdef"))
    def create(self, name: str) -> None:
        reuse, messages = self.chat(dialogue(self.new_text()), name)
        assert reuse == ("new" if name not in self.known else f"reread: the messages and tools are not those of "
                         f"session {name!r}")  # fmt: skip
        self.known[name] = Conversation(messages, self.llm.session(name))

    @rule()
    def ask_without_a_name(self) -> None:
        reuse, _ = self.chat(dialogue(self.new_text()), None)
        assert reuse == "new"

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def continue_conversation(self, data: st.DataObject) -> None:
        name = self.pick(data)
        reuse, messages = self.chat([*self.known[name].messages, *dialogue(self.new_text())], name)
        assert reuse == "continued"
        self.known[name] = Conversation(messages, self.llm.session(name))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), new=st.sampled_from("abcdef"))
    def fork(self, data: st.DataObject, new: str) -> None:
        name = self.pick(data)
        self.llm.add_session(self.llm.session(name).fork(new))
        self.known[new] = Conversation(self.known[name].messages, self.llm.session(new))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def edit(self, data: st.DataObject) -> None:
        name = self.pick(data)
        old, new = self.known[name].messages, self.new_text()
        reuse, messages = self.chat([*old[:-2], *dialogue(new)], name)
        assert reuse != "new"
        self.known[name] = Conversation(messages, self.llm.session(name))
        text = self.llm.tokenizer.decode(self.known[name].tokens)
        assert new in text
        assert old[-2]["content"] not in text

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def regenerate(self, data: st.DataObject) -> None:
        name = self.pick(data)
        reuse, messages = self.chat(self.known[name].messages[:-1], name)
        assert reuse != "new"
        self.known[name] = Conversation(messages, self.llm.session(name))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.llm.store.remove(name)
        del self.known[name]
        assert name not in self.llm.store

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = self.pick(data)
        path = self.llm.session(name).save(self.folder / f"saved-{len(self.saved)}")
        self.saved.append((path, name, self.known[name]))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        path, name, conversation = data.draw(st.sampled_from(self.saved))
        assert self.llm.load_session(path).name == name
        self.known[name] = conversation

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def check(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.known[name].check(self.llm.session(name))

    @invariant()
    def memory_is_within_the_limit_once_all_moves_are_done(self) -> None:
        if hasattr(self, "llm"):
            self.llm.store.flush()
            assert self.llm.store.nbytes <= self.llm.store.limit

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "llm"):
            assert {*self.known} <= {info.name for info in self.llm.store}


class PersistentSessionMachine(SessionMachine):
    """The same with a persistent folder, and restarts in between."""

    persistent = True

    @rule()
    def restart(self) -> None:
        self.llm.close()
        self.start()


class DeviceSessionMachine(SessionMachine):
    """The same with a device that has room for two snapshots, above host memory."""

    def start(self) -> None:
        with pretended_device(2 * SNAPSHOT_NBYTES):
            super().start()
            self.llm.engine  # noqa: B018 - loaded now

    @invariant()
    def the_device_is_within_its_limit_once_all_moves_are_done(self) -> None:
        if hasattr(self, "llm"):
            self.llm.store.flush()
            assert self.llm.store.device_nbytes <= self.llm.store.device_limit


class UnflushedSessionMachine(DeviceSessionMachine):
    """The same in a persistent folder, while moves go on behind the events."""

    persistent = True

    @invariant()
    def memory_is_within_the_limit_once_all_moves_are_done(self) -> None:
        pass

    @invariant()
    def the_device_is_within_its_limit_once_all_moves_are_done(self) -> None:
        pass


MACHINES = [SessionMachine, PersistentSessionMachine, DeviceSessionMachine, UnflushedSessionMachine]


@pytest.mark.parametrize("machine", MACHINES)
def test_in_any_order_of_events_every_conversation_continues_correctly_within_the_limit(
    machine: type[SessionMachine],
) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None, print_blob=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_in_many_orders_of_events_every_conversation_continues_correctly(machine: type[SessionMachine]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=20, stateful_step_count=50, deadline=None, print_blob=True)
    )


def test_a_limit_too_small_for_one_session_is_refused_with_the_numbers() -> None:
    llm = make_llm(session_memory=1000)
    with pytest.raises(StoreFullError, match=r"needs [\d,]+ bytes and the ceiling for all sessions is 1,000"):
        llm.chat("Hello")


def test_a_limit_of_exactly_one_session_is_enough() -> None:
    llm = make_llm(session_memory=SNAPSHOT_NBYTES)
    chats = [Chat(llm, f"talk-{number}") for number in range(3)]
    for turn in range(3):
        for chat in chats:
            assert chat.ask(f"Question {turn}").usage.reuse == ("continued" if turn else "new")
            llm.store.flush()
            assert llm.store.nbytes <= SNAPSHOT_NBYTES

    assert sum(info.in_memory for info in llm.store) <= 1
    assert len(list(llm.store)) == 3


def test_old_snapshots_of_idle_conversations_are_dropped_before_any_conversation_is() -> None:
    llm = make_llm(session_memory=5 * SNAPSHOT_NBYTES)
    first, second = Chat(llm, "first"), Chat(llm, "second")
    for turn in range(3):
        first.ask(f"A {turn}")
    for turn in range(3):
        second.ask(f"B {turn}")

    assert [info.in_memory for info in llm.store] == [True, True]
    assert {snapshot.kind for snapshot in llm.session("first").snapshots.values()} == {"answer"}
    first.messages.pop()
    assert first.reply().usage.reuse == "restored"  # the answer before the last one is on disk, or still in memory


def test_a_listing_shows_sizes_and_where_each_session_is() -> None:
    llm = make_llm(session_memory=SNAPSHOT_NBYTES)
    Chat(llm, "one").ask("Hello")
    Chat(llm, "two").ask("Hello there")
    llm.read_document("Odile keeps the lighthouse.", name="island")
    llm.store.flush()
    listed = list(llm.store)

    assert [info.name for info in listed] == ["island", "two", "one"]
    assert [info.in_memory for info in listed] == [True, False, False]
    assert [info.tier for info in listed] == ["host", "disk", "disk"]
    assert [info.messages for info in listed] == [0, 2, 2]
    assert [(info.has_document, info.is_document) for info in listed] == [(True, True), (False, False), (False, False)]
    assert all(30_000 < info.nbytes < 60_000 and info.tokens > 10 for info in listed)
    assert len(llm.store) == 3
    assert "one" in llm.store


def test_a_session_that_is_not_there_is_named_without_those_that_are() -> None:
    llm = make_llm()
    Chat(llm, "alice").ask("Hello")
    with pytest.raises(SessionNotFoundError, match="no session 'bob'") as caught:
        llm.session("bob")
    assert "alice" not in str(caught.value)
    with pytest.raises(SessionNotFoundError, match="'bob'"):
        llm.store.remove("bob")


def test_without_a_folder_nothing_stays_behind() -> None:
    llm = make_llm(session_memory=SNAPSHOT_NBYTES)
    for number in range(3):
        Chat(llm, f"talk-{number}").ask("Hello")
    llm.store.flush()
    folder = llm.store.folder
    assert len(list(folder.iterdir())) >= 2
    del llm
    import gc

    gc.collect()
    assert not folder.exists()


def test_conversations_without_a_name_take_no_more_disk_than_memory() -> None:
    llm = make_llm(session_memory=4 * SNAPSHOT_NBYTES)
    Chat(llm, "named").ask("Hello")
    for number in range(30):
        llm.chat(f"Question {number} fills all slots. " * 5, sampling=BRIEF)
    llm.store.flush()
    on_disk = sum(path.stat().st_size for path in llm.store.folder.iterdir())

    assert "named" in llm.store
    assert len(llm.store) <= 10
    assert on_disk <= 5 * SNAPSHOT_NBYTES + 20_000
