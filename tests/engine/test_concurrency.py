"""Many threads share one model: they take turns, and no conversation hears anything of another."""

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
SAY = SamplingParams(max_tokens=4)


def together(work: list[Callable[[], Any]], limit: float = LIMIT) -> list[Any]:
    """Run all at once, each in a thread of its own; their results. Fails if one raises or none gets on."""
    with ThreadPoolExecutor(len(work)) as pool:
        barrier = threading.Barrier(len(work))

        def started(job: Callable[[], Any]) -> Any:
            barrier.wait(limit)
            return job()

        futures = [pool.submit(started, job) for job in work]
        deadline = time.monotonic() + limit
        return [future.result(max(1, deadline - time.monotonic())) for future in futures]


def solo(names: list[str], turns: int) -> dict[str, list[str]]:
    """Each conversation's answers when it has the model for itself."""
    llm = make_llm()
    return {name: talked(llm, name, turns) for name in names}


def talked(llm: LLM, name: str, turns: int, session: str | None = None) -> list[str]:
    chat = Chat(llm, session)
    return [chat.ask(f"{name}, {turn}", sampling=SAY).text for turn in range(turns)]


def interrupted(llm: LLM, name: str, turns: int, chance: random.Random, named: bool) -> list[str]:
    """The same with requests that are cancelled in between, by event or by closing, and then asked again."""
    chat, answers = Chat(llm, name if named else None), []
    for turn in range(turns):
        question = {"role": "user", "content": f"{name}, {turn}"}
        if chance.random() < 0.5:
            cancel, wanted = Event(), chance.randrange(4)
            stream = llm.stream([*chat.messages, question], session=chat.session, sampling=SAY, cancel=cancel)
            for count, chunk in enumerate(stream):
                if count == wanted and chunk.finish_reason is None:
                    if chance.random() < 0.5:
                        stream.close()
                        break
                    cancel.set()
        answers.append(chat.ask(question["content"], sampling=SAY).text)
    return answers


@pytest.mark.parametrize(
    ("threads", "each", "turns"), [(16, 2, 3), pytest.param(32, 5, 4, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_threads_with_cancels_do_not_hear_each_other(threads: int, each: int, turns: int) -> None:
    names = [f"t{thread}-{number}" for thread in range(threads) for number in range(each)]
    expected = solo(names, turns)
    memory = 50_000 * len(names)  # a quarter of what all would like: points are dropped and sessions spilled
    llm = make_llm(session_memory=memory)
    llm.engine  # noqa: B018 - loaded before the threads are counted
    before = set(threading.enumerate())

    def user(thread: int) -> dict[str, list[str]]:
        chance = random.Random(thread)
        mine = names[thread * each : (thread + 1) * each]
        return {name: interrupted(llm, name, turns, chance, named=bool(n % 2)) for n, name in enumerate(mine)}

    answers: dict[str, list[str]] = {}
    for part in together([lambda thread=thread: user(thread) for thread in range(threads)]):
        answers.update(part)

    assert answers == expected
    assert len(llm.store) == len(names)
    assert llm.store.nbytes <= llm.store.limit
    assert set(threading.enumerate()) <= before  # an earlier test's thread may end meanwhile


def test_many_requests_on_one_conversation_become_branches() -> None:
    llm = make_llm()
    chat = Chat(llm, "it")
    chat.ask("Hello")
    expected = {}
    for text in "abcdefgh":
        alone = Chat(make_llm())
        alone.ask("Hello")
        expected[text] = alone.ask(text).text
    results = together([lambda text=text: Chat(llm, "it", chat.messages).ask(text) for text in expected])

    assert [result.text for result in results] == list(expected.values())
    assert {result.usage.reuse for result in results} <= {"continued", "restored"}
    assert len(llm.store) == 8
    for text, answer in expected.items():
        again = llm.chat([*chat.messages, *dialogue(text, answer, "More")], sampling=SHORT)
        assert again.usage.reuse == "continued"


def test_threads_share_a_folder_that_lasts_and_a_small_memory(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(8)]
    expected = solo(names, 3)
    llm = make_llm(sessions_dir=tmp_path, session_memory=90_000)
    work = [lambda name=name: talked(llm, name, 3, session=name) for name in names]
    assert dict(zip(names, together(work), strict=True)) == expected

    again = make_llm(sessions_dir=tmp_path)
    assert sorted(info.name for info in again.store) == names
    assert {info.messages for info in again.store} == {6}
    assert len(list(tmp_path.iterdir())) == len(names)
    for name in names:
        assert again.session(name).tokens == llm.session(name).tokens


def test_threads_may_load_the_model_list_and_delete_at_once() -> None:
    llm = make_llm()

    def busy(number: int) -> None:
        for turn in range(3):
            talked(llm, f"n{number}", 2, session=f"s{number % 3}")
            [info.nbytes for info in llm.store]
            if number % 4 == turn:
                with suppress(SessionNotFoundError):
                    llm.store.remove(f"s{number % 3}")

    together([lambda number=number: busy(number) for number in range(8)])
    assert llm.store.nbytes <= llm.store.limit


async def test_tasks_share_one_model_through_threads() -> None:
    llm = make_llm()
    names = [f"n{number}" for number in range(8)]
    expected = solo(names, 2)
    answers = await asyncio.wait_for(
        asyncio.gather(*(asyncio.to_thread(talked, llm, name, 2) for name in names)), LIMIT
    )

    assert dict(zip(names, answers, strict=True)) == expected


def test_a_short_request_does_not_wait_for_a_long_document() -> None:
    llm = make_llm(chunk=32)
    llm.chat("Hello", sampling=SAY)
    order: list[str] = []
    reading = Event()

    def read() -> None:
        llm.read_document("Odile keeps the lighthouse. " * 400, name="long", progress=lambda *_: reading.set())
        order.append("document")

    reader = Thread(target=read)
    reader.start()
    assert reading.wait(LIMIT)
    llm.chat("Quick?", sampling=SAY)
    order.append("question")
    reader.join(LIMIT)

    assert order == ["question", "document"]


def wait_for(lock: FairLock, waiting: int) -> None:
    deadline = time.monotonic() + LIMIT
    while len(lock._waiting) < waiting:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_lock_is_granted_in_the_order_of_asking() -> None:
    lock, order = FairLock(), []

    def enter(number: int) -> None:
        with lock:
            order.append(number)

    threads = [Thread(target=enter, args=(number,)) for number in range(20)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            wait_for(lock, number + 1)
    for thread in threads:
        thread.join(LIMIT)

    assert order == list(range(20))


def test_nobody_is_inside_the_lock_twice_and_nobody_comes_again_before_those_who_wait() -> None:
    lock, inside, turns = FairLock(), [], [(-1, False)]  # who was inside, and whether others waited then

    def work(number: int) -> None:
        for _ in range(100):
            with lock:
                inside.append(number)
                time.sleep(0.0002)
                assert inside == [number]
                assert turns[-1] != (number, True)
                inside.pop()
                turns.append((number, bool(lock._waiting)))

    together([lambda number=number: work(number) for number in range(4)])
    assert len(turns) == 401
    assert sum(waited for _, waited in turns) > 100


def test_an_error_inside_the_lock_leaves_it_free() -> None:
    lock = FairLock()
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError

    assert together([lock.__enter__]) == [None]


def test_being_interrupted_while_waiting_gives_the_turn_to_the_next() -> None:
    lock, done = FairLock(), Event()

    def hold() -> None:
        with lock:
            wait_for(lock, 1)
            _thread.interrupt_main()
            time.sleep(0.2)

    def follow() -> None:
        with lock:
            done.set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
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
