"""`KeepWholeHistory` in LangChain's agents and in Deep Agents: the model gets the whole history and reads it once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import (
    ClearToolUsesEdit,
    ContextEditingMiddleware,
    SummarizationMiddleware,
    wrap_model_call,
)
from langchain_core.exceptions import LangChainException
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, ToolMessage
from langchain_zsmerge import ChatZSMerge
from langchain_zsmerge.middleware import KeepWholeHistory
from langgraph.checkpoint.memory import InMemorySaver

from zsmerge_llm import CacheConfig
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.testing import FakeLLM, scripted_answer, tiny_llm

THREAD: Any = {"configurable": {"thread_id": "ann"}}
LONG = "The log of the Marigold. " * 100
"""Text that Deep Agents cuts off where an old message has it as an argument."""


def turn(number: int) -> Any:
    return {"messages": [("user", f"Turn {number}.")]}


def new_tokens(messages: list[AnyMessage]) -> list[tuple[int, int]]:
    """Return the tokens of each answer's prompt, and how many of them were new."""
    usages = [message.usage_metadata for message in messages if isinstance(message, AIMessage)]
    return [
        (usage["input_tokens"], usage["input_tokens"] - usage["input_token_details"]["cache_read"])
        for usage in usages
        if usage is not None
    ]


def called(name: str, **arguments: str) -> Any:
    """Return a scripted answer that calls a tool."""
    return scripted_answer("", {"name": name, "arguments": json.dumps(arguments)})


def history_with_a_long_file(turns: int = 0) -> list[AnyMessage]:
    """Return messages of an agent that wrote a long file, and of turns after that."""
    call = {"name": "write_file", "args": {"file_path": "/log.txt", "content": LONG}, "id": "id_0"}
    wrote = [HumanMessage("Write."), AIMessage("", tool_calls=[call]), ToolMessage("Done.", tool_call_id="id_0")]
    chat = [message for number in range(turns) for message in (AIMessage("Yes."), HumanMessage(f"Turn {number}."))]
    return [*wrote, *chat]


@pytest.fixture
def tiny() -> ChatZSMerge:
    return ChatZSMerge(llm=tiny_llm(cache=CacheConfig(slots=256), retrieval_tokens=0), max_tokens=16)


@pytest.mark.parametrize("method", ["invoke", "ainvoke"])
async def test_every_turn_of_a_long_conversation_reads_only_what_is_new(tiny: ChatZSMerge, method: str) -> None:
    agent = create_agent(tiny, [], middleware=[KeepWholeHistory()], checkpointer=InMemorySaver())
    for number in range(12):
        state = getattr(agent, method)(turn(number), THREAD)
        state = await state if method == "ainvoke" else state
    texts = [message.text for message in state["messages"] if message.type == "human"]
    assert texts == [f"Turn {number}." for number in range(12)]
    counts = new_tokens(state["messages"])
    assert counts[-1][0] > 256  # more than the cache has slots
    assert all(new < 80 for _, new in counts)


def test_a_summary_costs_an_answer_and_the_changed_history_is_read_again(tiny: ChatZSMerge) -> None:
    summaries = SummarizationMiddleware(tiny, trigger=("messages", 12), keep=("messages", 6))
    agent = create_agent(tiny, [], middleware=[summaries], checkpointer=InMemorySaver())
    for number in range(12):
        messages = agent.invoke(turn(number), THREAD)["messages"]
    assert len(messages) < 24
    _, *later = new_tokens(messages)
    assert any(new == whole for whole, new in later)


def test_an_agent_with_both_is_refused(tiny: ChatZSMerge) -> None:
    with pytest.raises(AssertionError, match="duplicate middleware"):
        create_agent(tiny, [], middleware=[SummarizationMiddleware(tiny), KeepWholeHistory()])


async def call(agent: Any, method: str, messages: list[AnyMessage]) -> Any:
    result = getattr(agent, method)({"messages": messages})
    return await result if method == "ainvoke" else result


@wrap_model_call
def newest_only(request: Any, handler: Any) -> Any:
    return handler(request.override(messages=request.messages[-1:]))


CLEARING = ContextEditingMiddleware(edits=[ClearToolUsesEdit(trigger=1, keep=0)])


@pytest.mark.parametrize(
    ("method", "before", "number"),
    [("invoke", newest_only, 3), ("invoke", CLEARING, 1), ("ainvoke", CLEARING, 1)],
)
async def test_a_middleware_that_removes_or_clears_messages_is_an_error(method: str, before: Any, number: int) -> None:
    engine = FakeLLM("Hello.")
    agent = create_agent(ChatZSMerge(llm=engine), [], middleware=[before, KeepWholeHistory()])
    messages = [*history_with_a_long_file(), HumanMessage("What did you write?")]
    with pytest.raises(ConfigError, match=f"cleared {number} of 4 messages") as caught:
        await call(agent, method, messages)
    assert isinstance(caught.value, LangChainException)
    assert not engine.requests


def test_a_model_that_reads_a_limited_length_is_refused(tiny: ChatZSMerge) -> None:
    limited = ChatZSMerge(llm=FakeLLM("Hello."), profile={"max_input_tokens": 8192})
    with pytest.raises(ConfigError, match="8,192 tokens at most"):
        create_agent(limited, [], middleware=[KeepWholeHistory()]).invoke(turn(0))


# -- Deep Agents --


def deep(chat: ChatZSMerge, **options: Any) -> Any:
    return pytest.importorskip("deepagents", reason="needs Python 3.11").create_deep_agent(chat, **options)


def written(engine: FakeLLM, request: int) -> str:
    """Return the content of the file that a request shows the model."""
    calls = [call for message in engine.requests[request].prompt for call in message.get("tool_calls") or ()]
    (content,) = [call["function"]["arguments"] for call in calls if call["function"]["name"] == "write_file"]
    return str(content)


@pytest.mark.parametrize("keep", [True, False])
def test_a_deep_agent_does_not_cut_the_arguments_of_old_calls(keep: bool) -> None:
    engine = FakeLLM("Yes.")
    agent = deep(ChatZSMerge(llm=engine), middleware=[KeepWholeHistory()] if keep else [])
    agent.invoke({"messages": history_with_a_long_file(turns=12)})
    assert (LONG in written(engine, 0)) is keep


def test_nor_does_its_general_purpose_subagent() -> None:
    listed = [called("ls", path="/")] * 12
    write = called("write_file", file_path="/log.txt", content=LONG)
    delegate = called("task", description="Write.", subagent_type="general-purpose")
    engine = FakeLLM(delegate, write, *listed, "Done.", "It is done.")
    agent = deep(ChatZSMerge(llm=engine), middleware=[KeepWholeHistory()])
    assert agent.invoke(turn(0))["messages"][-1].text == "It is done."
    assert LONG in written(engine, -2)


@pytest.mark.parametrize("keep", [True, False])
def test_a_deep_agent_reads_its_history_once(tiny: ChatZSMerge, keep: bool) -> None:
    @wrap_model_call
    def only_text(request: Any, handler: Any) -> Any:
        return handler(request.override(tool_choice="none"))

    middleware = [*([KeepWholeHistory()] if keep else []), only_text]
    agent = deep(tiny, middleware=middleware, checkpointer=InMemorySaver())
    agent.invoke({"messages": history_with_a_long_file(turns=7)}, THREAD)
    for number in range(4):
        messages = agent.invoke(turn(number), THREAD)["messages"]
    _, *later = new_tokens(messages)
    assert all(new < 200 for _, new in later) is keep  # without it, the shortened call and all after it are read again
