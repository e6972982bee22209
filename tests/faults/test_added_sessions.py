"""Sessions that were loaded without a model, or belong to another one, are checked when they are added to a model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.crafted_sessions import crafted
from tests.faults.test_crafted_sessions import answer, make, saved
from tests.support.chat import SHORT, Chat, equal_caches, make_llm
from zsmerge_llm import LLM, CacheConfig, Session
from zsmerge_llm.errors import SessionCorruptError, SessionMismatchError
from zsmerge_llm.sessions.session import load_session

WAYS: dict[str, Callable[[LLM, Session], Any]] = {
    "add_session": lambda llm, session: llm.add_session(session),
    "chat": lambda llm, session: llm.chat("Hello", session=session, sampling=SHORT),
    "a fork": lambda llm, session: llm.add_session(session.fork("branch")),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("other", ["seed", "slots", "template"])
def test_a_session_of_another_model_is_a_mismatch_and_is_not_kept(way: str, other: str) -> None:
    settings: dict[str, Any] = {
        "seed": {"seed": 1},
        "slots": {"cache": CacheConfig(slots=128, recent=16, stage=16, observation_window=8)},
        "template": {"name": "qwen2.5"},
    }[other]
    stranger = make_llm(**settings)
    Chat(stranger, "it").ask("Hello")
    llm = make_llm()
    with pytest.raises(SessionMismatchError, match=r"^Session .* was saved with another"):
        WAYS[way](llm, stranger.session("it"))
    assert len(llm.store) == 0


def test_a_session_of_an_equal_model_is_added_and_continues(tmp_path: Path) -> None:
    other, llm = make_llm(), make_llm()
    chat = Chat(other, "it")
    chat.ask("Hello")
    for session in (other.session("it"), load_session(other.session("it").save(tmp_path / "it"))):
        added = llm.add_session(session)
        assert llm.session("it").tokens == added.tokens == session.tokens
        assert equal_caches(added.cache, session.cache)
        assert Chat(llm, "it", chat.messages).ask("Go on").usage.reuse == "continued"


def test_a_fork_of_the_model_s_own_session_shares_its_snapshots(tmp_path: Path) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    Chat(llm, "it").ask("Hello")
    again = make_llm(sessions_dir=tmp_path)
    for each in (llm, again):
        session = each.session("it")
        assert each.add_session(session.fork("branch")).cache is session.cache


def test_what_was_crafted_and_loaded_without_a_model_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    original = saved("window", tmp_path)
    llm, path = make("window"), tmp_path / "crafted"
    expected, refused, same = answer(llm, llm.load_session(original)), 0, 0
    for file in random.Random(3).sample(list(crafted(original)), 250):
        path.write_bytes(file.content)
        try:
            session = load_session(path)
        except (SessionCorruptError, SessionMismatchError):
            continue
        try:
            added = llm.add_session(session)
        except (SessionCorruptError, SessionMismatchError):
            refused += 1
            continue
        found = answer(llm, added)
        assert found == expected or file.is_plausible, file.name
        same += found == expected
    assert refused > 5
    assert same > 0
