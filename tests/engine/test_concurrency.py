"""Many threads share one model: they take turns, and no conversation changes the answers of another."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any
from unittest import mock

import pytest

from tests.support.chat import SHORT, Chat, dialogue, make_llm
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.errors import SessionNotFoundError
from zsmerge_llm.sessions.conversations import Conversations, Turn

LIMIT = 120
"""Seconds after which waiting threads count as stuck."""
PARAMS = SamplingParams(max_tokens=4)


def run_concurrently(work: list[Callable[[], Any]], limit: float = LIMIT) -> list[Any]:
    """Run each function in a thread of its own and return their results; raise if one raises or all are stuck."""
    with ThreadPoolExecutor(len(work)) as pool:
        barrier = threading.Barrier(len(work))

        def run(job: Callable[[], Any]) -> Any:
            barrier.wait(limit)
            return job()

        futures = [pool.submit(run, job) for job in work]
        deadline = time.monotonic() + limit
        return [future.result(max(1, deadline - time.monotonic())) for future in futures]


def sequential_answers(names: list[str], turns: int) -> dict[str, list[str]]:
    """Return each conversation's answers when they run one after another."""
    llm = make_llm()
    return {name: answers_of(llm, name, turns) for name in names}


def answers_of(llm: LLM, name: str, turns: int, session: str | None = None) -> list[str]:
    chat = Chat(llm, session)
    return [chat.ask(f"{name}, {turn}", sampling=PARAMS).text for turn in range(turns)]


@contextmanager
def recorded_rereads() -> Iterator[Counter[int]]:
    """Count the requests that read their conversation again from its text, by thread: a closed stream tells nobody."""
    counts: Counter[int] = Counter()
    begin = Conversations.begin

    def recorded(self: Conversations, *args: Any, **options: Any) -> Turn:
        turn = begin(self, *args, **options)
        counts[threading.get_ident()] += turn.reuse.startswith("reread")
        return turn

    with mock.patch.object(Conversations, "begin", recorded):
        yield counts


def answers_with_cancels(
    llm: LLM, name: str, turns: int, chance: random.Random, named: bool, rereads: Counter[int]
) -> list[str]:
    """The same, with requests that are cancelled by event or by closing the stream, and then sent again.

    Ends early where the store had no room for the snapshot to go on from, so that all was read again from its text:
    such an answer may be another than the sequential one, but is that of an LLM that knows no other conversation.
    """
    chat, answers = Chat(llm, name if named else None), []
    before = rereads[threading.get_ident()]
    for turn in range(turns):
        question = {"role": "user", "content": f"{name}, {turn}"}
        if chance.random() < 0.5:
            cancel, stop_at = Event(), chance.randrange(4)
            stream = llm.stream([*chat.messages, question], session=chat.session, sampling=PARAMS, cancel=cancel)
            for count, chunk in enumerate(stream):
                if count == stop_at and chunk.finish_reason is None:
                    if chance.random() < 0.5:
                        stream.close()
                        break
                    cancel.set()
        result = chat.ask(question["content"], sampling=PARAMS)
        if rereads[threading.get_ident()] > before:
            assert result.text == make_llm().chat(chat.messages[:-1], sampling=PARAMS).text
            break
        answers.append(result.text)
    return answers


@pytest.mark.parametrize(
    ("threads", "each", "turns"), [(16, 2, 3), pytest.param(32, 4, 3, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_threads_with_cancels_do_not_change_each_others_answers(threads: int, each: int, turns: int) -> None:
    names = [f"t{thread}-{number}" for thread in range(threads) for number in range(each)]
    expected = sequential_answers(names, turns)
    memory = 50_000 * len(names)  # a quarter of what all need: snapshots are dropped and sessions spilled
    llm = make_llm(session_memory=memory)
    llm.engine.read(llm.engine.new_cache(), [1])  # its own thread has started before the threads are counted
    before = set(threading.enumerate())

    def user(thread: int) -> dict[str, list[str]]:
        chance = random.Random(thread)
        own_names = names[thread * each : (thread + 1) * each]
        return {
            name: answers_with_cancels(llm, name, turns, chance, bool(n % 2), rereads)
            for n, name in enumerate(own_names)
        }

    answers: dict[str, list[str]] = {}
    with recorded_rereads() as rereads:
        for part in run_concurrently([lambda thread=thread: user(thread) for thread in range(threads)]):
            answers.update(part)

    llm.store.flush()
    assert answers == {name: expected[name][: len(answers[name])] for name in names}
    assert sum(map(len, answers.values())) > 0.8 * turns * len(names), "most go on from what their sessions hold"
    assert len(names) <= len(llm.store) <= len(names) + rereads.total()  # as branches beside what was there
    assert llm.store.nbytes <= llm.store.limit
    left = {each for each in threading.enumerate() if each.name != "zsmerge-watchdog"}  # it ends by itself
    assert left <= before  # an earlier test's thread may end meanwhile


def test_many_requests_on_one_conversation_become_branches() -> None:
    llm = make_llm()
    chat = Chat(llm, "it")
    chat.ask("Hello")
    expected = {}
    for text in "abcdefgh":
        single = Chat(make_llm())
        single.ask("Hello")
        expected[text] = single.ask(text).text
    results = run_concurrently([lambda text=text: Chat(llm, "it", chat.messages).ask(text) for text in expected])

    assert [result.text for result in results] == list(expected.values())
    assert {result.usage.reuse for result in results} <= {"continued", "restored"}
    assert len(llm.store) == 8
    for text, answer in expected.items():
        result = llm.chat([*chat.messages, *dialogue(text, answer, "More")], sampling=SHORT)
        assert result.usage.reuse == "continued"


def test_threads_share_a_sessions_folder_and_a_small_memory(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(8)]
    expected = sequential_answers(names, 3)
    llm = make_llm(sessions_dir=tmp_path, session_memory=90_000)
    work = [lambda name=name: answers_of(llm, name, 3, session=name) for name in names]
    assert dict(zip(names, run_concurrently(work), strict=True)) == expected

    reopened = make_llm(sessions_dir=tmp_path)
    assert sorted(info.name for info in reopened.store) == names
    assert {info.messages for info in reopened.store} == {6}
    assert len(list(tmp_path.glob("*.zsmerge"))) == len(names)
    for name in names:
        assert reopened.session(name).tokens == llm.session(name).tokens


def test_threads_may_load_the_model_list_and_delete_at_once() -> None:
    llm = make_llm()

    def work(number: int) -> None:
        for turn in range(3):
            answers_of(llm, f"n{number}", 2, session=f"s{number % 3}")
            [info.nbytes for info in llm.store]
            if number % 4 == turn:
                with suppress(SessionNotFoundError):
                    llm.store.remove(f"s{number % 3}")

    run_concurrently([lambda number=number: work(number) for number in range(8)])
    llm.store.flush()
    assert llm.store.nbytes <= llm.store.limit


async def test_tasks_share_one_model_through_threads() -> None:
    llm = make_llm()
    names = [f"n{number}" for number in range(8)]
    expected = sequential_answers(names, 2)
    answers = await asyncio.wait_for(
        asyncio.gather(*(asyncio.to_thread(answers_of, llm, name, 2) for name in names)), LIMIT
    )

    assert dict(zip(names, answers, strict=True)) == expected


def test_a_short_request_does_not_wait_for_a_long_document() -> None:
    llm = make_llm(chunk=32)
    llm.chat("Hello", sampling=PARAMS)
    order: list[str] = []
    reading = Event()

    def read() -> None:
        llm.read_document("Odile keeps the lighthouse. " * 400, name="long", progress=lambda *_: reading.set())
        order.append("document")

    reader = Thread(target=read)
    reader.start()
    assert reading.wait(LIMIT)
    llm.chat("Quick?", sampling=PARAMS)
    order.append("question")
    reader.join(LIMIT)

    assert order == ["question", "document"]
