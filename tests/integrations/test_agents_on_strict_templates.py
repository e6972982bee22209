"""Agents with a system prompt and tools run on templates without system messages, tools or two messages in a row."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import wrap_model_call
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.tools import tool
from langchain_zsmerge import ChatZSMerge
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.llms.zsmerge import ZSMergeLLM

from tests.support.chat import LARGE_CACHE, make_llm
from zsmerge_llm import LLM

NAMES = ["gemma2", "gemma3", "mistral-v0.1", "mistral-v0.3", "llama2", "phi3"]


@wrap_model_call
def calls_once(request: Any, handler: Any) -> Any:
    """Make a random model call a tool right after each question, and answer then."""
    asked = isinstance(request.messages[-1], HumanMessage)
    settings = {"parallel_tool_calls": False}
    return handler(request.override(tool_choice="any" if asked else "none", model_settings=settings))


@tool
def weather(place: str) -> str:
    """The weather of a place."""
    return f"18 degrees in {place}"


@pytest.mark.parametrize("name", NAMES)
def test_a_langchain_agent_calls_tools_and_reads_each_message_once(name: str) -> None:
    with make_llm(name, cache=LARGE_CACHE) as llm:
        chat = ChatZSMerge(llm=llm, max_tokens=80)
        agent: Any = create_agent(chat, [weather], system_prompt="You are terse.", middleware=[calls_once])
        state = {"messages": [HumanMessage("Oslo?"), HumanMessage("Today?")]}
        for _ in range(2):
            state = agent.invoke(state)
            state["messages"].append(HumanMessage("And Bern?"))
        assert [message.type for message in state["messages"]][2:-1] == [
            "ai",
            "tool",
            "ai",
            "human",
            "ai",
            "tool",
            "ai",
        ]
        answers = [message.response_metadata for message in state["messages"] if isinstance(message, AIMessage)]
        assert [each["token_usage"]["reuse"] for each in answers] == ["new", *["continued"] * 3]
        check(llm)


def check(llm: LLM) -> None:
    """Check that there was one conversation, which holds all that was said."""
    (info,) = list(llm.store)
    text = llm.tokenizer.decode(llm.session(info.name).tokens)
    assert text.count("18 degrees in") == 2
    assert "You are terse." in text


@pytest.mark.parametrize("name", ["gemma2", "mistral-v0.1", "mistral-v0.3"])
def test_a_llamaindex_agent_calls_tools_and_reads_each_message_once(name: str) -> None:
    def look(place: str) -> str:
        """The weather of a place."""
        return f"18 degrees in {place}"

    async def talk(agent: FunctionAgent) -> None:
        memory = ChatMemoryBuffer.from_defaults(token_limit=100_000)
        for text in ("Oslo?", "And Bern?"):
            await agent.run(text, memory=memory)

    with make_llm(name, cache=LARGE_CACHE) as llm:
        model = ZSMergeLLM(llm=llm, max_tokens=80)
        asyncio.run(
            talk(FunctionAgent(tools=[look], llm=model, system_prompt="You are terse.", initial_tool_choice="look"))
        )
        check(llm)
