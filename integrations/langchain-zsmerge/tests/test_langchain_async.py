"""Async calls: the event loop stays free, and a closed stream stops decoding and its thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain_zsmerge import ChatZSMerge, ZSMergeLLM

from zsmerge_llm.testing import event_loop_gaps

Threads = Callable[[], list[str]]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(200):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("condition not reached within 2 s")


async def test_answers_and_streams_are_those_of_the_sync_calls(llm: Any) -> None:
    chat, text = ChatZSMerge(llm=llm), ZSMergeLLM(llm=llm)
    assert (await chat.ainvoke("hi")).text == chat.invoke("hi").text
    chunks = [chunk.text async for chunk in chat.astream("hi")]
    assert [chunk for chunk in chunks if chunk] == ["The ", "sky ", "is ", "blue."]
    assert await text.ainvoke("hi") == text.invoke("hi")
    assert [piece async for piece in text.astream("hi") if piece] == ["The ", "sky ", "is ", "blue."]


async def test_the_event_loop_is_free_while_many_calls_decode(slow_llm: Any, call_threads: Threads) -> None:
    chat = ChatZSMerge(llm=slow_llm, max_tokens=10)
    async with event_loop_gaps() as gaps:
        await asyncio.gather(*(chat.ainvoke("hi") for _ in range(20)))
    assert len(gaps) > 5
    assert sorted(gaps)[-2] < 0.055  # one outlier is the machine's
    await until(lambda: not call_threads())


@pytest.mark.parametrize("make", [ChatZSMerge, ZSMergeLLM])
async def test_breaking_out_of_a_stream_stops_decoding(slow_llm: Any, call_threads: Threads, make: Any) -> None:
    async for _ in make(llm=slow_llm).astream("hi"):
        break
    await until(lambda: not call_threads())
    assert slow_llm.decoded_words <= 3
    assert slow_llm.closed_streams == 1


@pytest.mark.parametrize("make", [ChatZSMerge, ZSMergeLLM])
async def test_closing_a_stream_stops_decoding(slow_llm: Any, call_threads: Threads, make: Any) -> None:
    stream = make(llm=slow_llm).astream("hi")
    await anext(stream)
    await stream.aclose()
    await until(lambda: not call_threads())
    assert slow_llm.decoded_words <= 3


@pytest.mark.parametrize("make", [ChatZSMerge, ZSMergeLLM])
async def test_cancelling_a_task_stops_decoding(slow_llm: Any, call_threads: Threads, make: Any) -> None:
    task = asyncio.create_task(make(llm=slow_llm).ainvoke("hi"))
    await until(lambda: slow_llm.decoded_words > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not call_threads())
    assert slow_llm.decoded_words <= 4


async def test_a_timeout_of_asyncio_stops_decoding(slow_llm: Any, call_threads: Threads) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(ChatZSMerge(llm=slow_llm).ainvoke("hi"), 0.05)
    await until(lambda: not call_threads())
    assert slow_llm.decoded_words < 20


async def test_an_error_in_the_model_reaches_the_caller() -> None:
    class Broken:
        model = "broken"

        def chat(self, messages: Any, **request: Any) -> None:
            raise RuntimeError("no luck")

        def stream(self, messages: Any, **request: Any) -> Any:
            yield from ()
            raise RuntimeError("no luck")

    chat = ChatZSMerge(llm=Broken())
    with pytest.raises(RuntimeError, match="no luck"):
        await chat.ainvoke("hi")
    with pytest.raises(RuntimeError, match="no luck"):
        _ = [chunk async for chunk in chat.astream("hi")]


async def test_v2_and_v3_events_stream_the_answer(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm)
    events = [event async for event in chat.astream_events("hi", version="v2")]
    pieces = [event["data"]["chunk"].text for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(pieces) == "The sky is blue."
    stream = await chat.astream_events("hi", version="v3", config={"configurable": {"thread_id": "ann"}})
    assert (await stream.output).text == "The sky is blue."
    assert llm.requests[-1].session == "ann"
