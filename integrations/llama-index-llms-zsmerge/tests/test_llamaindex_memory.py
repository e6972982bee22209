"""`WholeHistoryMemory` in agents and chat engines: no message leaves it, and each turn reads only what is new."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from llama_index.core import Document
from llama_index.core.agent.workflow import AgentOutput, FunctionAgent
from llama_index.core.chat_engine import ContextChatEngine, SimpleChatEngine
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle
from llama_index.core.storage.chat_store import SimpleChatStore
from llama_index.llms.zsmerge import WholeHistoryMemory, ZSMergeLLM

from zsmerge_llm import LLM
from zsmerge_llm.testing import FakeLLM, scripted_answer


class OnePassage(BaseRetriever):
    """Finds the same passage for everything."""

    def _retrieve(self, query: QueryBundle) -> list[NodeWithScore]:
        return [NodeWithScore(node=Document(text="The keeper saw a light."), score=1.0)]


def clock() -> str:
    """Tells the time."""
    return "12:00"


async def usages(memory: Any, tiny: LLM, turns: int) -> list[dict[str, Any]]:
    """Return what each step of an agent's turns has cost."""
    agent = FunctionAgent(tools=[clock], llm=ZSMergeLLM(llm=tiny, max_tokens=16), initial_tool_choice="clock")
    found = []
    for number in range(turns):
        handler = agent.run(f"Turn {number}: " + "what time is it? " * 4, memory=memory)
        found += [event.raw["usage"] async for event in handler.stream_events() if isinstance(event, AgentOutput)]
        await handler
    return found


async def test_an_agent_reads_each_message_once_however_long_the_conversation_is(tiny: LLM) -> None:
    memory = WholeHistoryMemory.from_defaults()
    costs = await usages(memory, tiny, turns=8)
    assert costs[-1]["prompt_tokens"] > 900
    assert all(cost["reuse"] == "continued" for cost in costs[1:])
    assert all(after["cached_tokens"] >= before["prompt_tokens"] for before, after in pairwise(costs))


async def test_a_memory_with_a_token_limit_makes_it_read_again(tiny: LLM) -> None:
    costs = await usages(ChatMemoryBuffer.from_defaults(token_limit=100), tiny, turns=8)
    assert any(after["cached_tokens"] < before["prompt_tokens"] for before, after in pairwise(costs))


@pytest.mark.parametrize("method", ["chat", "achat", "stream_chat"])
async def test_a_context_chat_engine_gives_the_model_the_whole_conversation(method: str) -> None:
    engine = FakeLLM("Yes.")
    history = [
        ChatMessage(role=role, content=f"{number} " * 9000) for number in range(2) for role in ("user", "assistant")
    ]
    chat = ContextChatEngine.from_defaults(
        OnePassage(),
        llm=ZSMergeLLM(llm=engine),
        memory=WholeHistoryMemory.from_defaults(chat_history=history),
    )
    answer = getattr(chat, method)("And now?")
    answer = await answer if method == "achat" else answer
    if method == "stream_chat":
        assert "".join(answer.response_gen) == "Yes."
    (request,) = engine.requests
    assert [message["content"] for message in request.prompt[1:-1]] == [message.content for message in history]
    assert len(chat.chat_history) == 6


def test_a_simple_chat_engine_counts_no_tokens() -> None:
    chat = SimpleChatEngine.from_defaults(llm=ZSMergeLLM(llm=FakeLLM("Yes.")), memory=WholeHistoryMemory())
    assert [str(chat.chat(text)) for text in ("One.", "Two.")] == ["Yes.", "Yes."]
    assert len(chat.chat_history) == 4


def test_changing_what_it_returned_changes_nothing() -> None:
    given = [ChatMessage("One.")]
    memory = WholeHistoryMemory.from_defaults(chat_history=given)
    given.clear()
    memory.get(initial_token_count=10**9).clear()
    assert [message.content for message in memory.get("Two.")] == ["One."]


def test_several_conversations_share_a_store() -> None:
    store = SimpleChatStore()
    ann, bob = (WholeHistoryMemory.from_defaults(chat_store=store, chat_store_key=name) for name in ("ann", "bob"))
    ann.put(ChatMessage("I am Ann."))
    assert bob.get() == []
    ann.reset()
    assert store.get_messages("ann") == []


def test_it_comes_back_from_json() -> None:
    memory = WholeHistoryMemory.from_defaults(chat_history=[ChatMessage("One."), ChatMessage(role="assistant")])
    again = WholeHistoryMemory.from_dict(json.loads(json.dumps(memory.to_dict())))
    assert again.get() == memory.get()
    assert again.chat_store_key == memory.chat_store_key


async def test_a_handed_over_memory_has_the_calls_and_results_of_tools() -> None:
    engine = FakeLLM(scripted_answer("", {"name": "clock", "arguments": {}}), "It is noon.", "It was noon.")
    agent, memory = FunctionAgent(tools=[clock], llm=ZSMergeLLM(llm=engine)), WholeHistoryMemory.from_defaults()
    await agent.run("What time is it?", memory=memory)
    stored = WholeHistoryMemory.from_dict(json.loads(json.dumps(memory.to_dict())))
    await agent.run("What time was it?", memory=stored)
    assert [message["role"] for message in engine.requests[-1].prompt] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
    ]
