"""Native async: the loop stays free, and whoever stops listening stops the decoding."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.llms.zsmerge import ZSMergeLLM

from zsmerge_llm.testing import FakeLLM, event_loop_gaps

QUESTION = [ChatMessage(role="user", content="Count!")]
LONG = " ".join(str(number) for number in range(1000))


@pytest.fixture(autouse=True)
def no_thread_is_left(wait) -> Iterator[None]:
    yield
    wait(lambda: not [thread for thread in threading.enumerate() if thread.name == "zsmerge-call"])


def slow():
    return FakeLLM(LONG, delay=0.005)


async def test_twenty_calls_leave_the_event_loop_free(tiny):
    llm = ZSMergeLLM(llm=tiny, max_tokens=8).warm_up()
    longest = [await longest_gap(llm) for _ in range(3)]
    assert min(longest) < 0.05  # others use the machine too: one quiet attempt shows that it is not us


async def longest_gap(llm: ZSMergeLLM) -> float:
    """Seconds for which the loop was held while twenty calls were answered."""
    async with event_loop_gaps() as gaps:
        answers = await asyncio.gather(*(llm.achat(QUESTION) for _ in range(20)))
    assert len(answers) == 20
    assert len(gaps) > 20
    return max(gaps)


@pytest.mark.parametrize("method", ["astream_chat", "astream_complete"])
async def test_closing_an_async_stream_stops_decoding(method, wait):
    engine = slow()
    llm = ZSMergeLLM(llm=engine)
    stream = await getattr(llm, method)(QUESTION if method == "astream_chat" else "Count!")
    async for _ in stream:
        break
    await stream.aclose()
    assert engine.requests[0].cancel.is_set()  # at once: the model notices before its next token
    await asyncio.to_thread(wait, lambda: engine.closed_streams == 1)
    assert engine.decoded_words < 1000


@pytest.mark.parametrize("method", ["stream_chat", "stream_complete"])
def test_closing_a_sync_stream_stops_decoding(method):
    engine = FakeLLM(LONG)
    stream = getattr(ZSMergeLLM(llm=engine), method)(QUESTION if method == "stream_chat" else "Count!")
    next(stream)
    stream.close()
    assert (engine.decoded_words, engine.closed_streams) == (1, 1)


def test_breaking_out_of_a_sync_stream_stops_the_decoding():
    engine = FakeLLM(LONG)
    for _ in ZSMergeLLM(llm=engine).stream_chat(QUESTION):
        break
    assert (engine.decoded_words, engine.closed_streams) == (1, 1)


async def cancelled_while_decoding(engine, call, wait) -> None:
    """Cancel a call after three words, and check that decoding stops."""
    task = asyncio.create_task(call)
    await asyncio.to_thread(wait, lambda: engine.decoded_words > 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    made = engine.decoded_words
    await asyncio.to_thread(wait, lambda: engine.closed_streams == 1)
    assert engine.decoded_words <= made + 2


@pytest.mark.parametrize("method", ["achat", "acomplete"])
async def test_cancelling_a_task_stops_the_decoding(method, wait):
    engine = slow()
    llm = ZSMergeLLM(llm=engine)
    await cancelled_while_decoding(engine, getattr(llm, method)(QUESTION if method == "achat" else "Count!"), wait)


async def test_cancelling_a_task_that_reads_a_stream_stops_the_decoding(wait):
    engine = slow()

    async def read() -> None:
        async for _ in await ZSMergeLLM(llm=engine).astream_chat(QUESTION):
            pass

    await cancelled_while_decoding(engine, read(), wait)


async def test_a_timeout_stops_the_decoding(wait):
    engine = slow()
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(ZSMergeLLM(llm=engine).achat(QUESTION), timeout=0.05)
    await asyncio.to_thread(wait, lambda: engine.closed_streams == 1)
    assert engine.decoded_words < 100


async def test_a_cancelled_call_does_not_affect_the_next_one():
    engine = FakeLLM(LONG, "Short answer.", delay=0.001)
    llm = ZSMergeLLM(llm=engine)
    async for _ in await llm.astream_chat(QUESTION):
        break
    assert (await llm.achat(QUESTION)).message.content == "Short answer."


def test_an_event_loop_that_ends_stops_decoding(wait):
    engine = slow()

    async def abandon() -> None:
        stream = await ZSMergeLLM(llm=engine).astream_chat(QUESTION)
        await anext(stream)

    asyncio.run(abandon())
    wait(lambda: engine.closed_streams == 1)
    assert engine.decoded_words < 100


async def test_a_stream_that_is_not_iterated_does_not_start():
    engine = FakeLLM()
    stream = await ZSMergeLLM(llm=engine).astream_chat(QUESTION)
    await asyncio.sleep(0.01)
    assert engine.requests == []
    await stream.aclose()


async def test_streams_may_run_concurrently():
    llm = ZSMergeLLM(llm=FakeLLM())

    async def read() -> str:
        seen = [response async for response in await llm.astream_chat(QUESTION)]
        return seen[-1].message.content

    assert await asyncio.gather(*(read() for _ in range(5))) == ["The sky is blue."] * 5
