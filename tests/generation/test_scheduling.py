"""Requests that run at the same time: limits, timeouts and priorities, as a caller of `LLM` meets them."""

from __future__ import annotations

from threading import Event, Thread
from typing import Any

import pytest

from tests.support.chat import Chat, make_llm
from zsmerge_llm import LLM, SamplingParams, SchedulingConfig
from zsmerge_llm.errors import ConfigError, DeadlineExceededError, InputError, QueueFullError

LIMIT = 60
LONG = SamplingParams(max_tokens=2000, ignore_eos=True)
SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


def test_a_request_beyond_the_limit_is_refused_and_nothing_of_it_is_kept() -> None:
    llm = make_llm(scheduling=SchedulingConfig(max_requests=1))
    stream = llm.stream("Tell me more", sampling=LONG)
    next(stream)
    with pytest.raises(QueueFullError, match="max_requests"):
        llm.chat("Hello", sampling=SHORT)
    with pytest.raises(QueueFullError):
        llm.batch_complete(["a"], sampling=SHORT)
    with pytest.raises(QueueFullError):
        llm.read_document(text="Odile keeps the lighthouse.")
    stream.close()
    assert len(llm.store) == 1
    assert llm.chat("Hello", sampling=SHORT).text == make_llm().chat("Hello", sampling=SHORT).text


def test_a_timeout_while_decoding_leaves_the_conversation_as_it_was() -> None:
    llm, calm = make_llm(), make_llm()
    chat, same = Chat(llm), Chat(calm)
    for each in (chat, same):
        each.ask("Hello", sampling=SHORT)
    with pytest.raises(DeadlineExceededError, match=r"timeout=0\.2 s"):
        chat.llm.chat([*chat.messages, {"role": "user", "content": "And now?"}], sampling=LONG, timeout=0.2)
    result = chat.ask("And now?", sampling=SHORT)
    assert result.text == same.ask("And now?", sampling=SHORT).text
    assert result.usage.cached_tokens > 0


def test_a_timeout_stops_reading_and_batches_too() -> None:
    llm = make_llm(chunk=32)
    with pytest.raises(DeadlineExceededError):
        llm.chat("Odile keeps the lighthouse. " * 2000, sampling=SHORT, timeout=0.1)
    with pytest.raises(DeadlineExceededError):
        llm.batch_complete(["Once upon", "The sea"], sampling=LONG, timeout=0.2)
    assert llm.chat("Hello", sampling=SHORT, timeout=LIMIT).finish_reason == "length"


def test_a_callers_own_cancel_is_no_timeout() -> None:
    cancel = Event()
    cancel.set()
    assert make_llm().chat("Hello", sampling=LONG, timeout=LIMIT, cancel=cancel).finish_reason == "cancelled"


@pytest.mark.parametrize("timeout", [0, -1, True, "5"])
def test_a_timeout_that_is_none_is_refused(timeout: Any) -> None:
    with pytest.raises(InputError, match="timeout"):
        make_llm().stream("Hello", timeout=timeout)


def test_a_priority_that_is_none_is_refused() -> None:
    with pytest.raises(InputError, match="priority"):
        make_llm().stream("Hello", priority="high")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"max_requests": 0}, {"reading_share": 0}, {"reading_share": 1.5}])
def test_settings_out_of_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SchedulingConfig(**settings)
    with pytest.raises(ConfigError, match="scheduling"):
        LLM(scheduling=settings)  # type: ignore[arg-type]


def test_an_urgent_prompt_is_read_before_a_shorter_one_that_came_first() -> None:
    llm = make_llm(chunk=32)
    llm.chat("Hello", sampling=SHORT)
    ended: list[str] = []
    begun = {"first": Event(), "urgent": Event()}

    def read(name: str, sentences: int, priority: int) -> None:
        def progress(*_: int) -> None:
            begun[name].set()
            assert begun["urgent"].wait(LIMIT)  # the first one goes on when both are read

        text = "Odile keeps the lighthouse. " * sentences
        llm.complete(text, sampling=SHORT, priority=priority, progress=progress)
        ended.append(name)

    first = Thread(target=read, args=("first", 100, 0))
    first.start()
    assert begun["first"].wait(LIMIT)
    urgent = Thread(target=read, args=("urgent", 150, -1))
    urgent.start()
    for thread in (first, urgent):
        thread.join(LIMIT)
    assert ended == ["urgent", "first"]


def test_a_stream_waits_for_one_chunk_of_another_prompt_at_most() -> None:
    engine = make_llm(chunk=32).engine
    stream_cache, long_cache = engine.new_cache(), engine.new_cache()
    engine.read(stream_cache, [5, 6, 7])
    events: list[str] = []
    reader = Thread(target=lambda: engine.read(long_cache, [8] * 3200, progress=lambda *_: events.append("chunk")))
    reader.start()
    for _ in engine.decode(stream_cache, [SamplingParams(max_tokens=5000, ignore_eos=True, lookup=False)], [[]]):
        events.append("token")
        if not reader.is_alive():
            break
    reader.join(LIMIT)
    last = len(events) - 1 - events[::-1].index("chunk")
    runs = [run for run in " ".join(events[:last]).split("token") if run.strip()]
    # A chunk's end is noted by its own thread, which may be late once or twice.
    assert sum(run.count("chunk") == 1 for run in runs) > 0.9 * len(runs)
    assert len(runs) > 50
