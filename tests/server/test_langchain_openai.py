"""LangChain's ChatOpenAI against the server: what programs written for OpenAI's models do."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.chat_models import init_chat_model
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langchain_zsmerge.middleware import KeepWholeHistory
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel

APIS = pytest.mark.parametrize("responses", [False, True], ids=["chat completions", "responses"])


@tool
def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


class Place(BaseModel):
    """A place."""

    kind: Literal["town", "village"]
    coastal: bool


def connect(address: str, responses: bool = False, **settings: Any) -> ChatOpenAI:
    """Return a model of the server."""
    settings = {"max_tokens": 12, "max_retries": 0, "stream_usage": True, **settings}
    return ChatOpenAI(model="tiny", base_url=f"{address}/v1", api_key="none", use_responses_api=responses, **settings)


def new_tokens(message: Any) -> int:
    """Return the tokens of an answer's prompt that were read for it."""
    usage = message.usage_metadata
    new: int = usage["input_tokens"] - usage["input_token_details"]["cache_read"]
    return new


@APIS
@pytest.mark.asyncio(loop_scope="module")  # langchain-openai keeps its async client for all event loops
async def test_a_conversation_is_answered_in_every_way_and_read_once(address: str, responses: bool) -> None:
    chat = connect(address, responses)
    history: list[BaseMessage] = [HumanMessage("Name a tree, please.")]
    answers = [chat.invoke(history), await chat.ainvoke(history)]
    whole: Any = None
    for piece in chat.stream(history):
        whole = piece if whole is None else whole + piece
    answers.append(whole)
    whole = None
    async for piece in chat.astream(history):
        whole = piece if whole is None else whole + piece
    answers.append(whole)
    assert len({answer.text for answer in answers}) == 1
    assert answers[0].text
    assert [answer.usage_metadata["output_tokens"] for answer in answers] == [12] * 4

    history += [answers[0], HumanMessage("And a river?")]
    later = chat.invoke(history)
    assert new_tokens(later) < new_tokens(answers[0]) + len("And a river?")
    assert later.usage_metadata is not None
    assert later.usage_metadata["input_tokens"] > answers[0].usage_metadata["input_tokens"]


@APIS
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called_and_its_result_is_read(address: str, responses: bool, stream: bool) -> None:
    chat = connect(address, responses, max_tokens=400)
    asking = chat.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False)
    messages: list[BaseMessage] = [HumanMessage("What is the weather?")]
    called: Any = None
    if stream:
        for piece in asking.stream(messages):
            called = piece if called is None else called + piece
    else:
        called = asking.invoke(messages)
    (call,) = called.tool_calls
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Oslo", "Rome")
    messages += [called, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    answer = connect(address, responses).bind_tools([weather], tool_choice="none").invoke(messages)
    assert answer.text
    assert not answer.tool_calls


@APIS
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_of_the_class(address: str, responses: bool, method: Any) -> None:
    chat = connect(address, responses, max_tokens=400).with_structured_output(Place, method=method, include_raw=True)
    answer = chat.invoke("Describe a place.")
    assert answer["parsing_error"] is None
    assert isinstance(answer["parsed"], Place)


@APIS
def test_json_mode_gives_an_object(address: str, responses: bool) -> None:
    chat = connect(address, responses, max_tokens=400).with_structured_output(None, method="json_mode")
    assert isinstance(chat.invoke("Describe a place as JSON."), dict)


def test_several_conversations_at_once(address: str) -> None:
    answers = connect(address).batch([f"Name {number} trees." for number in range(4)])
    assert all(answer.text for answer in answers)


def test_init_chat_model_makes_a_model_of_the_server(address: str) -> None:
    chat = init_chat_model("openai:tiny", base_url=f"{address}/v1", api_key="none", max_tokens=12)
    assert chat.invoke("Name a tree.").text


def test_an_agent_keeps_its_whole_history_and_reads_it_once(address: str) -> None:
    agent = create_agent(connect(address), middleware=[KeepWholeHistory()], checkpointer=InMemorySaver())
    for number in range(6):
        state = agent.invoke({"messages": [("user", f"Turn {number}.")]}, {"configurable": {"thread_id": "ann"}})
    answers = [message for message in state["messages"] if isinstance(message, AIMessage)]
    assert len(answers) == 6
    assert all(new_tokens(answer) < 60 for answer in answers[1:])
