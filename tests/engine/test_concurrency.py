"""Many threads share one model: they take turns, and no conversation changes the answers of another."""

from __future__ import annotations

import _thread
import asyncio
import random
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from tests.support.chat import SHORT, Chat, dialogue, make_llm
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.engine.fair_lock import FairLock
from zsmerge_llm.errors import SessionNotFoundError

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


def answers_with_cancels(llm: LLM, name: str, turns: int, chance: random.Random, named: bool) -> list[str]:
    """The same, with requests that are cancelled by event or by closing the stream, and then sent again.

    Ends early where the store had no room for the snapshot to go on from, so that all was read again from its text:
    such an answer may be another than the sequential one, but is that of an LLM that knows no other conversation.
    """
    chat, answers = Chat(llm, name if named else None), []
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
        if result.usage.reuse.startswith("reread"):
            assert result.text == make_llm().chat(chat.messages[:-1], sampling=PARAMS).text
            break
        answers.append(result.text)
    return answers


@pytest.mark.parametrize(
    ("threads", "each", "turns"), [(16, 2, 3), pytest.param(32, 5, 4, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_threads_with_cancels_do_not_change_each_others_answers(threads: int, each: int, turns: int) -> None:
    names = [f"t{thread}-{number}" for thread in range(threads) for number in range(each)]
    expected = sequential_answers(names, turns)
    memory = 50_000 * len(names)  # a quarter of what all need: snapshots are dropped and sessions spilled
    llm = make_llm(session_memory=memory)
    llm.engine  # noqa: B018 - loaded before the threads are counted
    before = set(threading.enumerate())

    def user(thread: int) -> dict[str, list[str]]:
        chance = random.Random(thread)
        own_names = names[thread * each : (thread + 1) * each]
        return {
            name: answers_with_cancels(llm, name, turns, chance, named=bool(n % 2)) for n, name in enumerate(own_names)
        }

    answers: dict[str, list[str]] = {}
    for part in run_concurrently([lambda thread=thread: user(thread) for thread in range(threads)]):
        answers.update(part)

    llm.store.flush()
    assert answers == {name: expected[name][: len(answers[name])] for name in names}
    assert sum(map(len, answers.values())) > 0.8 * turns * len(names), "most go on from what their sessions hold"
    read_again = sum(len(given) < turns for given in answers.values())  # as branches beside what was there
    assert len(names) <= len(llm.store) <= len(names) + read_again
    assert llm.store.nbytes <= llm.store.limit
    assert set(threading.enumerate()) <= before  # an earlier test's thread may end meanwhile


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
    assert len(list(tmp_path.iterdir())) == len(names)
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


def wait_until_queued(lock: FairLock, waiting: int) -> None:
    deadline = time.monotonic() + LIMIT
    while len(lock._waiting) < waiting:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_lock_is_granted_in_the_order_of_requests() -> None:
    lock, order = FairLock(), []

    def enter(number: int) -> None:
        with lock:
            order.append(number)

    threads = [Thread(target=enter, args=(number,)) for number in range(20)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            wait_until_queued(lock, number + 1)
    for thread in threads:
        thread.join(LIMIT)

    assert order == list(range(20))


def test_one_thread_holds_the_lock_at_a_time_and_waiting_threads_come_first() -> None:
    lock, holders, turns = FairLock(), [], [(-1, False)]  # turns: the thread, and whether others waited

    def work(number: int) -> None:
        for _ in range(100):
            with lock:
                holders.append(number)
                time.sleep(0.0002)
                assert holders == [number]
                assert turns[-1] != (number, True)
                holders.pop()
                turns.append((number, bool(lock._waiting)))

    run_concurrently([lambda number=number: work(number) for number in range(4)])
    assert len(turns) == 401
    assert sum(waited for _, waited in turns) > 100


def test_an_error_while_the_lock_is_held_releases_it() -> None:
    lock = FairLock()
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError

    assert run_concurrently([lock.__enter__]) == [None]


def test_an_interrupt_while_waiting_passes_the_lock_to_the_next_thread() -> None:
    lock, done = FairLock(), Event()

    def hold() -> None:
        with lock:
            wait_until_queued(lock, 1)
            _thread.interrupt_main()
            time.sleep(0.2)

    def follow() -> None:
        with lock:
            done.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores SIGINT
    try:
        holder = Thread(target=hold)
        holder.start()
        while lock._holder is None:
            time.sleep(0.001)
        with pytest.raises(KeyboardInterrupt), lock:
            pass
    finally:
        signal.signal(signal.SIGINT, before)
    follower = Thread(target=follow)
    follower.start()

    assert done.wait(LIMIT)
    holder.join(LIMIT)
    follower.join(LIMIT)
    assert lock._holder is None
