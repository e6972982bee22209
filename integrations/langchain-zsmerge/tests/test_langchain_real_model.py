"""Both classes on SmolLM2-135M-Instruct itself, and an agent on Qwen2.5-Coder-0.5B-Instruct."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_zsmerge import ChatZSMerge, ZSMergeLLM
from langgraph.checkpoint.memory import InMemorySaver

from zsmerge_llm.errors import UnsupportedContentError
from zsmerge_llm.testing import event_loop_gaps

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chat() -> ChatZSMerge:
    return ChatZSMerge(model="smollm2", temperature=0, max_tokens=24)


def test_a_chain_answers_and_the_stream_gives_the_same_text(chat: ChatZSMerge) -> None:
    chain = ChatPromptTemplate.from_messages([("human", "What is the capital of {country}?")]) | chat
    answer = chain.invoke({"country": "France"})
    assert "Paris" in answer.text
    assert "".join((chain | StrOutputParser()).stream({"country": "France"})) == answer.text


def test_usage_counts_what_the_tokenizer_counts(chat: ChatZSMerge) -> None:
    messages = [SystemMessage("Be brief."), HumanMessage("Name a colour."), AIMessage("Red."), HumanMessage("Another.")]
    usage = chat.invoke(messages).usage_metadata
    assert usage is not None
    assert usage["input_tokens"] == chat.get_num_tokens_from_messages(messages)
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert chat.profile is not None
    assert "max_input_tokens" not in chat.profile


def test_a_thread_reads_each_token_once(chat: ChatZSMerge) -> None:
    history: list[BaseMessage] = [SystemMessage("Be brief."), HumanMessage("My name is Ann.")]
    read = 0
    for question in ("What is the capital of Italy?", "And of Spain?"):
        answer = chat.invoke(history, config={"configurable": {"thread_id": "ann"}})
        assert answer.usage_metadata is not None
        cached = answer.usage_metadata["input_token_details"]["cache_read"]
        assert cached >= read
        read = answer.usage_metadata["input_tokens"]
        history += [answer, HumanMessage(question)]
    assert cached > 0
    assert answer.response_metadata["token_usage"]["reuse"] == "continued"


def test_stop_strings_and_token_limits_end_the_answer(chat: ChatZSMerge) -> None:
    whole = chat.invoke("Count from one to ten.").text
    word = whole.split()[3]
    stopped = chat.invoke("Count from one to ten.", stop=[word])
    assert stopped.text == whole[: whole.index(word)]
    assert stopped.response_metadata["finish_reason"] == "stop"
    assert chat.invoke("Count from one to ten.", max_tokens=2).response_metadata["finish_reason"] == "length"


def test_an_image_is_refused(chat: ChatZSMerge) -> None:
    image: dict[str, Any] = {"type": "image", "base64": "AAAA", "mime_type": "image/png"}
    with pytest.raises(UnsupportedContentError):
        chat.invoke([HumanMessage([{"type": "text", "text": "What is this?"}, image])])


async def test_the_event_loop_is_free_while_the_model_decodes(chat: ChatZSMerge) -> None:
    await chat.ainvoke("Hello")  # loaded
    whole: AIMessageChunk | None = None
    async with event_loop_gaps() as gaps:
        async for chunk in chat.astream("Why is the sky blue?"):
            whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert whole.usage_metadata is not None
    assert len(gaps) > 10
    assert sorted(gaps)[len(gaps) * 9 // 10] < 0.05


async def test_leaving_an_async_stream_stops_decoding(chat: ChatZSMerge) -> None:
    import threading

    def busy() -> bool:
        return any(thread.name == "zsmerge-call" for thread in threading.enumerate())

    async for _ in chat.astream("Tell me a long story.", max_tokens=2000):
        break
    for _ in range(500):
        if not busy():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("still decoding after 5 s")


def test_a_batch_of_prompts_gives_what_each_gives_alone() -> None:
    llm = ZSMergeLLM(model="smollm2", temperature=0, max_tokens=8, dtype="float32")
    prompts = ["The capital of France is", "One, two, three, four,"]
    assert llm.batch(prompts) == [llm.invoke(prompt) for prompt in prompts]
    assert "".join(llm.stream(prompts[1])) == llm.invoke(prompts[1])


def test_an_agent_on_qwen_calls_three_tools_over_six_turns_and_reads_every_token_once(gguf: Mapping[str, Path]) -> None:
    @tool
    def get_weather(city: str) -> str:
        """Get the current weather of a city."""
        return {"Paris": "18 degrees, sunny", "London": "12 degrees, rain"}[city]

    @tool
    def get_population(city: str) -> str:
        """Get the number of people who live in a city."""
        return {"Paris": "2,100,000", "London": "8,900,000"}[city]

    @tool
    def multiply(a: int, b: int) -> str:
        """Multiply two whole numbers."""
        return str(a * b)

    turns = {
        "What is the weather in Paris?": ("get_weather", "18"),
        "How many people live in London?": ("get_population", "8,900,000"),
        "What is 17 * 23?": ("multiply", "391"),
        "What is the weather in London?": ("get_weather", "12"),
        "How many people live in Paris?": ("get_population", "2,100,000"),
        "What is 12 * 12?": ("multiply", "144"),
    }
    model = ChatZSMerge(model=str(gguf["qwen2.5-coder-0.5b-instruct"]), max_tokens=100)
    agent = create_agent(model, [get_weather, get_population, multiply], checkpointer=InMemorySaver())
    said: list[AIMessage] = []
    for question, (name, result) in turns.items():
        state = agent.invoke({"messages": [("user", question)]}, {"configurable": {"thread_id": "ann"}})
        new = [message for message in state["messages"] if isinstance(message, AIMessage)][len(said) :]
        said += new
        assert [call["name"] for call in new[0].tool_calls] == [name]
        assert result in new[-1].text
    held = 0
    for message in said:
        usage: Any = message.usage_metadata
        assert held - 2 <= usage["input_token_details"]["cache_read"] <= held
        held = usage["total_tokens"]
