"""Turns that are cancelled or taken again while memory is too small: the next turn reads only what is new."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.support.chat import SNAPSHOT_NBYTES, dialogue, make_llm
from tests.support.tiers import pretended_device
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.sessions.folder import Folder

LONG = "Tell me about the lighthouse on the island and about all those who kept its light. "
SHORT = SamplingParams(max_tokens=4)


class Talk:
    """A conversation. It checks of each turn that no more was read than what follows the last answer kept."""

    def __init__(self, llm: LLM, name: str | None, choices: random.Random) -> None:
        self.llm, self.name, self.choices = llm, name, choices
        self.messages: list[dict[str, Any]] = []
        self.points = [0]  # after each answer: tokens read up to then
        self.turns = self.reread = 0

    def take_turn(self) -> None:
        messages = self._question()
        chunks = list(self._stream(messages))
        usage = chunks[-1].usage
        assert usage is not None
        self.turns += 1
        self.reread += usage.cached_tokens < self.points[-1]
        self.points.append(usage.prompt_tokens)  # and the answer, but for its last token
        self.messages = [*messages, {"role": "assistant", "content": "".join(chunk.text for chunk in chunks)}]

    def drop_turn(self) -> None:
        """Begin a turn, and stop it as soon as its prompt has been read."""
        chunks = list(self._stream(self._question(), cancel=True))
        assert chunks[-1].finish_reason == "cancelled"

    def take_last_turn_again(self) -> None:
        if self.messages:
            self.messages = self.messages[:-2]
            self.points.pop()
        self.take_turn()

    def _question(self) -> list[dict[str, Any]]:
        return [*self.messages, *dialogue(f"{LONG}{self.choices.random()}")]

    def _stream(self, messages: list[dict[str, Any]], cancel: bool = False) -> Iterator[Any]:
        event = Event()
        progress = (lambda *_: event.set()) if cancel else None
        return self.llm.stream(messages, session=self.name, sampling=SHORT, cancel=event, progress=progress)


def take_turns(llm: LLM, talks: list[Talk], count: int, choices: random.Random) -> None:
    """Take, drop and repeat turns in any order; between some, everything goes to disk that memory has no room for."""
    for _ in range(count):
        talk = choices.choice(talks)
        choices.choice([talk.take_turn, talk.drop_turn, talk.take_last_turn_again])()
        if choices.random() < 0.5:
            llm.store.flush()


@pytest.mark.parametrize("memory", [1, 2, 3, 5])
@pytest.mark.parametrize("persistent", [False, True])
def test_no_turn_reads_more_than_is_new_after_dropped_and_repeated_turns(
    tmp_path: Path, memory: int, persistent: bool
) -> None:
    choices = random.Random(memory)
    kept = {"sessions_dir": tmp_path} if persistent else {}
    llm = make_llm(session_memory=memory * SNAPSHOT_NBYTES, retrieval_tokens=0, **kept)
    talks = [Talk(llm, f"talk {number}", choices) for number in range(4)]
    take_turns(llm, talks, 40, choices)

    assert sum(talk.turns for talk in talks) > 15
    assert [talk.reread for talk in talks] == [0, 0, 0, 0]
    llm.store.flush()
    assert llm.store.nbytes <= llm.store.limit


def test_the_same_holds_on_a_device_and_after_restarts(tmp_path: Path) -> None:
    choices = random.Random(7)
    talks: list[Talk] = []
    for _ in range(4):
        with pretended_device(2 * SNAPSHOT_NBYTES):
            llm = make_llm(session_memory=2 * SNAPSHOT_NBYTES, retrieval_tokens=0, sessions_dir=tmp_path)
            talks = talks or [Talk(llm, f"talk {number}", choices) for number in range(3)]
            for talk in talks:
                talk.llm = llm
            take_turns(llm, talks, 12, choices)
            llm.close()

    assert [talk.reread for talk in talks] == [0, 0, 0]


def test_after_a_restart_a_dropped_turn_and_the_one_before_it_can_be_taken_again(tmp_path: Path) -> None:
    talk = Talk(make_llm(sessions_dir=tmp_path, retrieval_tokens=0), "it", random.Random(0))
    talk.take_turn()
    talk.take_turn()
    talk.drop_turn()
    for take in (talk.take_last_turn_again, talk.take_turn):
        talk.llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0)
        take()
    assert talk.reread == 0


def test_a_first_turn_that_was_dropped_is_kept(tmp_path: Path) -> None:
    talk = Talk(make_llm(sessions_dir=tmp_path, retrieval_tokens=0), "it", random.Random(0))
    question = talk._question()
    list(talk._stream(question, cancel=True))

    talk.llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0)
    usage = list(talk._stream(question))[-1].usage
    assert usage is not None
    assert usage.cached_tokens == usage.prompt_tokens


def test_a_damaged_point_before_the_last_turn_costs_that_turn_and_not_the_conversation(tmp_path: Path) -> None:
    talk = Talk(make_llm(sessions_dir=tmp_path, retrieval_tokens=0), "it", random.Random(0))
    talk.take_turn()
    talk.take_turn()
    (earlier,) = tmp_path.glob("*.earlier")
    content = bytearray(earlier.read_bytes())
    content[-9] ^= 1
    earlier.write_bytes(content)

    talk.llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0)
    talk.take_turn()
    assert talk.reread == 0
    talk.llm = make_llm(sessions_dir=tmp_path, retrieval_tokens=0)
    talk.take_last_turn_again()
    assert talk.reread == 0


def test_where_the_point_before_the_last_turn_cannot_be_saved_turns_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def save_earlier(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "save_earlier", save_earlier)
    llm = make_llm(session_memory=SNAPSHOT_NBYTES, retrieval_tokens=0)
    talks = [Talk(llm, f"talk {number}", random.Random(number)) for number in range(2)]
    for _ in range(3):
        for talk in talks:
            talk.take_turn()
            llm.store.flush()
    assert [talk.reread for talk in talks] == [0, 0]
    assert llm.store.nbytes <= llm.store.limit


def test_moves_end_where_the_disk_has_no_room_for_points_of_conversations_without_a_name() -> None:
    llm = make_llm(session_memory=SNAPSHOT_NBYTES, retrieval_tokens=0)
    talks = [Talk(llm, None, random.Random(number)) for number in range(3)]
    for _ in range(3):
        for talk in talks:
            talk.take_turn()
            llm.store.flush()
    assert llm.store.nbytes <= llm.store.limit
