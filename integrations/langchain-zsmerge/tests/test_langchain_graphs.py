"""LangGraph's prebuilt agents on a SQLite checkpointer, and Deep Agents with their default middleware."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import HumanInTheLoopMiddleware, wrap_model_call
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langchain_core.tools import tool
from langchain_zsmerge import ChatZSMerge
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.prebuilt import create_react_agent
from langgraph.types import Command, interrupt

from zsmerge_llm import CacheConfig
from zsmerge_llm.testing import FakeLLM, scripted_answer, tiny_llm

THREAD: Any = {"configurable": {"thread_id": "ann"}}


@tool
def clock() -> str:
    """Tell the time."""
    return "12:00"


@tool
def ask_person(question: str) -> str:
    """Ask a person, and wait for the answer."""
    return str(interrupt(question))


@pytest.fixture(scope="module")
def tiny() -> ChatZSMerge:
    return ChatZSMerge(llm=tiny_llm(cache=CacheConfig(slots=8192)), max_tokens=64)


def called(name: str, **arguments: str) -> Any:
    """Return a scripted answer that calls a tool."""
    return scripted_answer("", {"name": name, "arguments": json.dumps(arguments)})


def turn(text: str) -> Any:
    return {"messages": [("user", text)]}


def choice(messages: list[BaseMessage]) -> str:
    """Call the tool after a user's message, and answer after its result."""
    return "clock" if isinstance(messages[-1], HumanMessage) else "none"


def created(chat: ChatZSMerge, saver: Any) -> Any:
    @wrap_model_call
    def forced(request: Any, handler: Any) -> Any:
        return handler(request.override(tool_choice=choice(request.messages)))

    return create_agent(chat, [clock], middleware=[forced], checkpointer=saver)


def prebuilt(chat: ChatZSMerge, saver: Any) -> Any:
    def model(state: Any, runtime: Any) -> Any:
        return chat.bind_tools([clock], tool_choice=choice(state["messages"]))

    return create_react_agent(model, [clock], checkpointer=saver)


def usages(messages: list[BaseMessage]) -> list[tuple[int, int]]:
    """Return the tokens of each answer's prompt, and how many of them were new."""
    found = [message.usage_metadata for message in messages if isinstance(message, AIMessage)]
    return [
        (usage["input_tokens"], usage["input_tokens"] - usage["input_token_details"]["cache_read"])
        for usage in found
        if usage is not None
    ]


AGENTS = pytest.mark.parametrize(
    "make",
    [created, pytest.param(prebuilt, marks=pytest.mark.filterwarnings("ignore:create_react_agent has been moved"))],
)


@AGENTS
def test_time_travel_continues_from_the_earlier_turn_and_reads_only_what_is_new(
    make: Callable[..., Any], tiny: ChatZSMerge, tmp_path: Path
) -> None:
    with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
        agent = make(tiny, saver)
        first = agent.invoke(turn("One."), THREAD)["messages"]
        earlier = agent.get_state(THREAD).config
        second = agent.invoke(turn("Two."), THREAD)["messages"]
        forked = agent.invoke(turn("Three."), earlier)["messages"]
        again = agent.invoke(turn("Four."), THREAD)["messages"]
    assert [message.id for message in second[: len(first)]] == [message.id for message in first]
    assert [message.text for message in forked if message.type == "human"] == ["One.", "Three."]
    assert [message.text for message in again if message.type == "human"] == ["One.", "Three.", "Four."]
    assert [message.type for message in first] == ["human", "ai", "tool", "ai"]
    (whole, _), *later = usages(again)
    assert len(later) == 5
    assert all(new < whole / 2 for _, new in later)
    assert usages(forked)[2][1] <= usages(second)[2][1] + len("Three") + 2  # the tiny tokenizer's tokens are bytes


@AGENTS
def test_a_run_replayed_from_a_checkpoint_says_the_same(
    make: Callable[..., Any], tiny: ChatZSMerge, tmp_path: Path
) -> None:
    with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
        agent = make(tiny, saver)
        once = agent.invoke(turn("Which time?"), THREAD)["messages"]
        (start,) = [
            state for state in agent.get_state_history(THREAD) if state.next and len(state.values["messages"]) == 1
        ]
        again = agent.invoke(None, start.config)["messages"]
    assert [message.text for message in again] == [message.text for message in once]
    assert usages(again)[1][1] < usages(again)[1][0] / 2


@pytest.mark.filterwarnings("ignore:create_react_agent has been moved")
@pytest.mark.parametrize("make", [create_agent, create_react_agent])
def test_an_interrupt_resumes_in_another_agent_on_the_same_file(make: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoints.sqlite")
    asking = called("ask_person", question="Which colour?")
    with SqliteSaver.from_conn_string(path) as saver:
        agent = make(ChatZSMerge(llm=FakeLLM(asking)), [ask_person], checkpointer=saver)
        (waiting,) = agent.invoke(turn("Paint."), THREAD)["__interrupt__"]
    assert waiting.value == "Which colour?"
    engine = FakeLLM("It is red now.")
    with SqliteSaver.from_conn_string(path) as saver:
        agent = make(ChatZSMerge(llm=engine), [ask_person], checkpointer=saver)
        messages = agent.invoke(Command(resume="red"), THREAD)["messages"]
    assert [message.text for message in messages] == ["Paint.", "", "red", "It is red now."]
    (request,) = engine.requests
    assert request.session == "ann"
    assert request.prompt[1]["tool_calls"][0]["id"] == request.prompt[2]["tool_call_id"]


@pytest.mark.parametrize(
    ("decision", "result"),
    [
        ({"type": "approve"}, "Which colour?"),
        ({"type": "edit", "edited_action": {"name": "echo", "args": {"text": "Red?"}}}, "Red?"),
        ({"type": "reject", "message": "Not now."}, "Not now."),
    ],
)
def test_a_call_is_approved_edited_or_rejected(decision: Any, result: str, tmp_path: Path) -> None:
    @tool
    def echo(text: str) -> str:
        """Say it again."""
        return text

    engine = FakeLLM(called("echo", text="Which colour?"), "Done.")
    with SqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
        middleware = [HumanInTheLoopMiddleware(interrupt_on={"echo": True})]
        agent = create_agent(ChatZSMerge(llm=engine), [echo], middleware=middleware, checkpointer=saver)
        agent.invoke(turn("Paint."), THREAD)
        messages = agent.invoke(Command(resume={"decisions": [decision]}), THREAD)["messages"]
    assert result in messages[-2].text
    assert messages[-1].text == "Done."
    assert result in engine.requests[1].prompt[-1]["content"]


@pytest.mark.filterwarnings("ignore:create_react_agent has been moved")
async def test_an_async_agent_on_sqlite_streams_and_reads_only_what_is_new(tiny: ChatZSMerge, tmp_path: Path) -> None:
    async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
        agent = prebuilt(tiny, saver)
        for text in ("One.", "Two."):
            pieces = [piece async for piece, _ in agent.astream(turn(text), THREAD, stream_mode="messages")]
            assert len(pieces) > 4
        state = await agent.aget_state(THREAD)
    counts = usages(state.values["messages"])
    assert len(counts) == 4
    assert all(new < whole / 2 for whole, new in counts[1:])


# -- Deep Agents --

WRITE = called("write_file", file_path="/note.txt", content="Agnes Hill")
READ = called("read_file", file_path="/note.txt")
DELEGATE = called("task", description="Find it.", subagent_type="general-purpose")


def deep(engine: FakeLLM) -> Any:
    return make_deep_agent(ChatZSMerge(llm=engine))


def make_deep_agent(chat: ChatZSMerge, **options: Any) -> Any:
    return pytest.importorskip("deepagents", reason="needs Python 3.11").create_deep_agent(chat, **options)


@pytest.mark.parametrize("method", ["invoke", "ainvoke"])
async def test_a_deep_agent_writes_and_reads_files(method: str) -> None:
    engine = FakeLLM(WRITE, READ, "It is Agnes Hill.")
    agent = deep(engine)
    state = getattr(agent, method)(turn("Who?"), THREAD)
    state = await state if method == "ainvoke" else state
    assert state["messages"][-1].text == "It is Agnes Hill."
    assert state["files"]["/note.txt"]["content"] == "Agnes Hill"
    assert "Agnes Hill" in engine.requests[2].prompt[-1]["content"]
    offered = {definition["function"]["name"] for definition in engine.requests[0].tools or ()}
    assert {"write_file", "read_file", "edit_file", "ls", "glob", "grep", "task"} <= offered


def test_a_deep_agent_delegates_to_a_subagent() -> None:
    engine = FakeLLM(DELEGATE, "Agnes Hill, says the subagent.", "It is Agnes Hill.")
    state = deep(engine).invoke(turn("Who?"), THREAD)
    assert [message.text for message in state["messages"]][1:] == [
        "",
        "Agnes Hill, says the subagent.",
        "It is Agnes Hill.",
    ]
    assert engine.requests[1].prompt[-1] == {"role": "user", "content": "Find it."}


def test_a_deep_agent_reads_its_instructions_once() -> None:
    chat = ChatZSMerge(llm=tiny_llm(cache=CacheConfig(slots=2048)), max_tokens=64)

    @wrap_model_call
    def forced(request: Any, handler: Any) -> Any:
        return handler(request.override(tool_choice="ls" if choice(request.messages) == "clock" else "none"))

    with SqliteSaver.from_conn_string(":memory:") as saver:
        agent = make_deep_agent(chat, middleware=[forced], checkpointer=saver)
        agent.invoke(turn("One."), THREAD)
        (whole, new), *later = usages(agent.invoke(turn("Two."), THREAD)["messages"])
    assert new == whole > 5000
    assert len(later) == 3
    assert all(new < 500 for _, new in later)
