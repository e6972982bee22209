"""Workers that share a folder know each other's conversations by their messages: each turn may land on any of them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.support.chat import Chat, make_llm
from zsmerge_llm import LLM

pytestmark = pytest.mark.filterwarnings("error:Another process:UserWarning")
QUESTIONS = ["Where do puffins nest?", "Name a lighthouse.", "Who keeps it?", "How deep is the bay?", "Who are you?"]


@pytest.fixture
def workers(tmp_path: Path) -> list[LLM]:
    """Three of them, each an LLM of its own."""
    workers = [make_llm(sessions_dir=tmp_path, retrieval_tokens=0) for _ in range(3)]
    for llm in workers:
        llm.engine  # noqa: B018 - the folder is listed now
    return workers


def test_each_turn_of_a_conversation_without_a_name_may_land_on_any_worker(workers: list[LLM]) -> None:
    chats, order = [Chat(workers[0]) for _ in range(4)], random.Random(0)
    for turn, text in enumerate(QUESTIONS):
        for number, chat in enumerate(chats):
            chat.llm = order.choice(workers)
            result = chat.ask(f"{text} I am visitor {number}.")
            assert result.usage.reuse == ("continued" if turn else "new")


def test_an_answer_of_two_workers_is_the_one_of_a_single_worker(workers: list[LLM]) -> None:
    alone, chat = Chat(make_llm(retrieval_tokens=0)), Chat(workers[0])
    for turn, text in enumerate(QUESTIONS):
        chat.llm = workers[turn % 2]
        assert chat.ask(text).text == alone.ask(text).text


def test_an_answer_given_again_by_another_worker_starts_from_the_same_point(workers: list[LLM]) -> None:
    chat = Chat(workers[0])
    chat.ask(QUESTIONS[0])
    chat.ask(QUESTIONS[1])
    branches = []
    for llm in workers:
        branch = Chat(llm, None, chat.messages[:2])
        assert branch.ask(f"{QUESTIONS[2]} {workers.index(llm)}").usage.reuse in ("continued", "restored")
        branches.append(branch)
    for branch in branches:
        branch.llm = workers[0]
        assert branch.ask(QUESTIONS[3]).usage.reuse in ("continued", "restored")


def test_workers_do_not_know_conversations_of_another_namespace(workers: list[LLM]) -> None:
    chat = Chat(workers[0])
    chat.ask(QUESTIONS[0], namespace="ann")
    chat.llm = workers[1]
    assert chat.ask(QUESTIONS[1], namespace="bob").usage.reuse == "new"


def test_the_sessions_of_all_workers_are_listed(workers: list[LLM]) -> None:
    for number, llm in enumerate(workers):
        Chat(llm, f"visit {number}").ask(QUESTIONS[number])
    for llm in workers:
        assert {info.name for info in llm.store} == {"visit 0", "visit 1", "visit 2"}
