"""Many conversations in little memory: whatever goes to disk and comes back, each goes on as if it had stayed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
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

from tests.support.talk import TIGHT, Talk, counted, said, talker
from zsmerge_llm import SamplingParams, Session
from zsmerge_llm.errors import ConfigError, SessionNotFoundError, StoreFullError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.sessions.folder import Folder, list_folder
from zsmerge_llm.sessions.session import load_session

BRIEF = SamplingParams(max_tokens=2)
ONE = 42_000
"""Bytes that one point of a tiny conversation takes at most."""


def same(left: Cache, right: Cache) -> bool:
    """Whether two caches are equal bit for bit."""
    mine, facts = left.state()
    yours, other = right.state()
    return facts == other and all(torch.equal(mine[name], yours[name]) for name in {*mine, *yours})


class Conversation:
    """What a conversation must look like: its messages, its ids, and a cache that never leaves memory."""

    def __init__(self, messages: list[dict[str, Any]], session: Session) -> None:
        self.messages = messages
        self.tokens = session.tokens
        self.shadow = session.cache.clone()

    def check(self, session: Session) -> None:
        assert session.tokens == self.tokens
        assert same(session.cache, self.shadow)


class Life(RuleBasedStateMachine):
    """Any order of beginning, going on, forking, editing, answering again, deleting, saving, loading and restarting."""

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
        self.llm = talker(cache=TIGHT, session_memory=3 * ONE, **kept)

    def teardown(self) -> None:
        for name, conversation in getattr(self, "known", {}).items():
            conversation.check(self.llm.session(name))
        shutil.rmtree(getattr(self, "folder", "/nonexistent"), ignore_errors=True)

    def say(self, messages: list[dict[str, Any]], name: str | None) -> tuple[str, list[dict[str, Any]]]:
        answer = self.llm.chat(messages, session=name, sampling=BRIEF)
        return answer.usage.reuse, [*messages, {"role": "assistant", "content": answer.text}]

    def text(self) -> str:
        self.count += 1
        return f"text {self.count}."

    def pick(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.known)))

    @rule(name=st.sampled_from("abcdef"))
    def create(self, name: str) -> None:
        reuse, messages = self.say(said(self.text()), name)
        assert reuse == ("new" if name not in self.known else f"reread: the messages and tools are not those of "
                         f"session {name!r}")  # fmt: skip
        self.known[name] = Conversation(messages, self.llm.session(name))

    @rule()
    def ask_in_passing(self) -> None:
        reuse, _ = self.say(said(self.text()), None)
        assert reuse == "new"

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        name = self.pick(data)
        reuse, messages = self.say([*self.known[name].messages, *said(self.text())], name)
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
        old, new = self.known[name].messages, self.text()
        reuse, messages = self.say([*old[:-2], *said(new)], name)
        assert reuse != "new"
        self.known[name] = Conversation(messages, self.llm.session(name))
        text = self.llm.tokenizer.decode(self.known[name].tokens)
        assert new in text
        assert old[-2]["content"] not in text

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def answer_again(self, data: st.DataObject) -> None:
        name = self.pick(data)
        reuse, messages = self.say(self.known[name].messages[:-1], name)
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
    def look(self, data: st.DataObject) -> None:
        name = self.pick(data)
        self.known[name].check(self.llm.session(name))

    @invariant()
    def memory_is_never_above_the_ceiling(self) -> None:
        if hasattr(self, "llm"):
            assert self.llm.store.nbytes <= self.llm.store.limit

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "llm"):
            assert {*self.known} <= {info.name for info in self.llm.store}


class LastingLife(Life):
    """The same with a folder that lasts, and restarts in between."""

    persistent = True

    @rule()
    def restart(self) -> None:
        self.start()


@pytest.mark.parametrize("machine", [Life, LastingLife])
def test_in_any_order_of_events_every_conversation_goes_on_correctly_within_the_ceiling(machine: type[Life]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None, print_blob=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Life, LastingLife])
def test_in_many_orders_of_events_every_conversation_goes_on_correctly(machine: type[Life]) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=100, stateful_step_count=50, deadline=None, print_blob=True)
    )


def test_a_ceiling_too_small_for_one_session_is_refused_with_the_numbers() -> None:
    llm = talker(session_memory=1000)
    with pytest.raises(StoreFullError, match=r"needs [\d,]+ bytes and the ceiling for all sessions is 1,000"):
        llm.chat("Hello")


def test_a_ceiling_for_exactly_one_session_does() -> None:
    llm = talker(session_memory=ONE)
    talks = [Talk(llm, f"talk-{number}") for number in range(3)]
    for turn in range(3):
        for talk in talks:
            assert talk.tell(f"Question {turn}").usage.reuse == ("continued" if turn else "new")
            assert llm.store.nbytes <= ONE

    assert sum(info.in_memory for info in llm.store) <= 1
    assert len(list(llm.store)) == 3


def test_old_points_of_idle_conversations_go_before_any_conversation_does() -> None:
    llm = talker(session_memory=5 * ONE)
    first, second = Talk(llm, "first"), Talk(llm, "second")
    for turn in range(2):
        first.tell(f"A {turn}")
    for turn in range(2):
        second.tell(f"B {turn}")

    assert [info.in_memory for info in llm.store] == [True, True]
    assert len(llm.session("first").snapshots) == 1
    assert len(llm.session("second").snapshots) > 1


def test_a_listing_shows_sizes_and_where_each_session_is() -> None:
    llm = talker(session_memory=ONE)
    Talk(llm, "one").tell("Hello")
    Talk(llm, "two").tell("Hello there")
    llm.read_document("Odile keeps the lighthouse.", name="island")
    listed = list(llm.store)

    assert [info.name for info in listed] == ["island", "two", "one"]
    assert [info.in_memory for info in listed] == [True, False, False]
    assert [info.messages for info in listed] == [0, 2, 2]
    assert [(info.has_document, info.is_document) for info in listed] == [(True, True), (False, False), (False, False)]
    assert all(30_000 < info.nbytes < 60_000 and info.tokens > 10 for info in listed)
    assert len(llm.store) == 3
    assert "one" in llm.store


def test_a_session_that_is_not_there_is_named_with_those_that_are() -> None:
    llm = talker()
    Talk(llm, "alice").tell("Hello")
    with pytest.raises(SessionNotFoundError, match="no session 'bob'; there are: alice"):
        llm.session("bob")
    with pytest.raises(SessionNotFoundError, match="'bob'"):
        llm.store.remove("bob")


def test_a_conversation_goes_on_after_a_restart_with_and_without_its_name(tmp_path: Path) -> None:
    named = Talk(talker(sessions_dir=tmp_path), "alice")
    nameless = Talk(named.llm)
    alone = Talk(talker(retrieval_tokens=0))
    for turn in range(4):
        named.llm = nameless.llm = talker(sessions_dir=tmp_path, retrieval_tokens=0)
        with counted() as passes:
            first, second = named.tell(f"A {turn}"), nameless.tell(f"B {turn}")
        expected = "continued" if turn else "new"
        assert (first.usage.reuse, second.usage.reuse) == (expected, expected)
        assert first.text == alone.tell(f"A {turn}").text
        assert turn == 0 or sum(passes) < 70

    assert len(named.llm.store) == 2


def test_a_document_is_there_after_a_restart(tmp_path: Path) -> None:
    talker(sessions_dir=tmp_path).read_document("Odile keeps the lighthouse.", name="island")
    llm = talker(sessions_dir=tmp_path)
    with counted() as passes:
        document = llm.read_document("Odile keeps the lighthouse.", name="island")

    assert passes == []
    assert Talk(llm, document).tell("Who?").usage.cached_tokens == len(document.tokens)


def test_models_and_settings_may_share_a_folder(tmp_path: Path) -> None:
    talks = [Talk(talker(seed=seed, sessions_dir=tmp_path), "same") for seed in (0, 1)]
    for talk in talks:
        talk.tell("Hello")
    again = [Talk(talker(seed=seed, sessions_dir=tmp_path), "same", talks[seed].messages) for seed in (0, 1)]

    assert [talk.tell("Go on").usage.reuse for talk in again] == ["continued", "continued"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_session_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    llm = talker(sessions_dir=tmp_path)
    talk = Talk(llm, "it")
    talk.tell("Hello")
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
    talk.llm = talker(sessions_dir=tmp_path)

    assert talk.tell("Go on").usage.reuse == "continued"
    assert {info.name for info in talk.llm.store} == {"it", "copy"}  # a copy is a session of its own
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


def test_any_name_is_safe_and_keeps_to_itself(tmp_path: Path) -> None:
    llm = talker(sessions_dir=tmp_path / "kept")
    talks = [Talk(llm, name) for name in NAMES]
    for talk in talks:
        talk.tell(f"I am {talk.session!r}"[:60])
    again = talker(sessions_dir=tmp_path / "kept")

    assert sorted(info.name for info in again.store) == sorted(NAMES)
    assert os.listdir(tmp_path) == ["kept"]
    files = os.listdir(tmp_path / "kept")
    assert len({name.lower() for name in files}) == len(NAMES)
    assert max(len(name.encode()) for name in files) < 200
    for talk in talks:
        talk.llm = again
        assert talk.tell("Go on").usage.reuse == "continued"


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="Give another folder"):
        talker(sessions_dir=tmp_path / "file").chat("Hello")


def test_without_a_folder_nothing_stays_behind() -> None:
    llm = talker(session_memory=ONE)
    for number in range(3):
        Talk(llm, f"talk-{number}").tell("Hello")
    folder = llm.store.folder
    assert len(list(folder.iterdir())) >= 2
    del llm
    import gc

    gc.collect()
    assert not folder.exists()


def test_conversations_without_a_name_take_no_more_disk_than_memory() -> None:
    llm = talker(session_memory=4 * ONE)
    Talk(llm, "named").tell("Hello")
    for number in range(30):
        llm.chat(f"Question {number}", sampling=BRIEF)
    on_disk = sum(path.stat().st_size for path in llm.store.folder.iterdir())

    assert "named" in llm.store
    assert len(llm.store) <= 10
    assert on_disk <= 5 * ONE + 20_000


def test_deleting_removes_the_file_too(tmp_path: Path) -> None:
    llm = talker(sessions_dir=tmp_path)
    Talk(llm, "it").tell("Hello")
    llm.store.remove("it")

    assert list(tmp_path.iterdir()) == []
    assert len(talker(sessions_dir=tmp_path).store) == 0


def test_a_name_taken_over_leaves_the_old_conversation_its_file(tmp_path: Path) -> None:
    llm = talker(sessions_dir=tmp_path)
    first, second = Talk(llm, "same"), Talk(llm, "same")
    first.tell("One")
    second.tell("Two")
    again = talker(sessions_dir=tmp_path)
    first.llm = second.llm = again
    first.session = None

    assert len(again.store) == 2
    listed = [metadata["name"] for metadata, _ in list_folder(tmp_path)]
    assert sorted(listed) == sorted(info.name for info in again.store)
    assert second.tell("Go on").usage.reuse == "continued"
    assert first.tell("Go on").usage.reuse == "continued"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "save", save)


def test_a_session_that_is_loaded_lasts_instead_of_one_with_the_same_words(tmp_path: Path) -> None:
    llm = talker(sessions_dir=tmp_path / "kept")
    Talk(llm, "it").tell("Hello")
    other = load_session(llm.session("it").save(tmp_path / "one"))
    other.cache.layers[0].keys.zero_()  # as if it had been read in other chunks
    llm.load_session(other.save(tmp_path / "other"))

    assert same(llm.session("it").cache, other.cache)
    assert same(talker(sessions_dir=tmp_path / "kept").session("it").cache, other.cache)


@pytest.mark.usefixtures("full_disk")
@pytest.mark.filterwarnings("ignore:Session:UserWarning")
def test_a_full_disk_is_a_warning_and_the_answer_is_given(tmp_path: Path) -> None:
    lasting, passing = Talk(talker(sessions_dir=tmp_path), "it"), Talk(talker(session_memory=ONE), "it")
    with pytest.warns(UserWarning, match="'it' could not be saved"):
        assert lasting.tell("Hello").text
    with pytest.warns(UserWarning, match="could not be saved"):
        assert lasting.tell("Go on").usage.reuse == "continued"
    passing.tell("Hello")
    with pytest.warns(UserWarning, match="'it' is forgotten: memory is full"):
        Talk(passing.llm, "other").tell("Hello you")
    assert passing.llm.store.nbytes <= ONE
    assert passing.tell("Go on").usage.reuse == "new"


def test_a_session_whose_file_was_exchanged_is_not_mixed_up(tmp_path: Path) -> None:
    llm = talker(sessions_dir=tmp_path)
    one, two = Talk(llm, "one"), Talk(llm, "two")
    one.tell("Hello")
    two.tell("Good evening")
    llm = one.llm = talker(sessions_dir=tmp_path)
    assert len(llm.store) == 2
    files = sorted(tmp_path.iterdir())
    os.replace(files[1], files[0])

    assert one.tell("Go on").usage.reuse == "reread: the saved session is damaged or gone"
    two.llm = llm
    assert two.tell("Go on").usage.reuse == "reread: the saved session is damaged or gone"
    texts = [llm.tokenizer.decode(llm.session(name).tokens) for name in ("one", "two")]
    assert ["Good evening" in text for text in texts] == [False, True]


def test_a_saved_session_can_be_looked_at_without_a_model(tmp_path: Path) -> None:
    llm = talker()
    Talk(llm, "it").tell("Hello")
    path = llm.session("it").save(tmp_path / "it")

    assert load_session(path).tokens == llm.session("it").tokens
