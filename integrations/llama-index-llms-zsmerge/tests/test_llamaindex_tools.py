"""Tools, agents and structured output as far as they go without enforced grammar."""

from __future__ import annotations

import asyncio
import json

import pytest
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.llms import ChatMessage, ChatResponse
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.zsmerge import ZSMergeLLM
from pydantic import BaseModel

from zsmerge_llm.errors import ConfigError


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def name(of: str) -> str:
    """Names a thing."""
    return f"{of}!"


class City(BaseModel):
    """A city."""

    name: str
    country: str


TOOLS = [FunctionTool.from_defaults(add), FunctionTool.from_defaults(name)]
ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
NAME = {"name": "name", "arguments": '{"of": "x"}'}
PROMPT = PromptTemplate("Describe the city of {what}.")
REACT_CALL = 'Thought: I need a tool.\nAction: add\nAction Input: {"a": 1, "b": 2}'


def offered(engine) -> list[str]:
    return [tool["function"]["name"] for tool in engine.calls[-1].tools or []]


def test_tools_reach_the_engine_in_openais_form(fake, result):
    engine = fake(result("", ADD))
    history = [ChatMessage(role="system", content="Be brief.")]
    ZSMergeLLM(llm=engine).chat_with_tools(TOOLS, user_msg="1 + 2?", chat_history=history)
    assert [message["role"] for message in engine.calls[0].prompt] == ["system", "user"]
    assert len(history) == 1
    tool = engine.calls[0].tools[0]
    assert tool["type"] == "function"
    assert set(tool["function"]["parameters"]["properties"]) == {"a", "b"}


async def test_the_four_tool_methods_give_the_same_calls(fake, result):
    llm = ZSMergeLLM(llm=fake(result("Adding.", ADD, NAME)))
    options = {"user_msg": "Go!", "allow_parallel_tool_calls": True}
    *_, streamed = llm.stream_chat_with_tools(TOOLS, **options)
    *_, astreamed = [item async for item in await llm.astream_chat_with_tools(TOOLS, **options)]
    whole = llm.chat_with_tools(TOOLS, **options)
    awhole = await llm.achat_with_tools(TOOLS, **options)
    for response in (whole, awhole, streamed, astreamed):
        calls = llm.get_tool_calls_from_response(response)
        assert [(call.tool_name, call.tool_kwargs) for call in calls] == [
            ("add", {"a": 1, "b": 2}),
            ("name", {"of": "x"}),
        ]
        assert [block.block_type for block in response.message.blocks] == ["text", "tool_call", "tool_call"]
        assert response.raw["finish_reason"] == "tool_calls"


def test_calls_without_ids_get_unique_ones_that_stay(fake, result):
    llm = ZSMergeLLM(llm=fake(result("", ADD, ADD, ids=False)))
    response = llm.chat_with_tools(TOOLS, user_msg="Go!", allow_parallel_tool_calls=True)
    first, again = (llm.get_tool_calls_from_response(response) for _ in range(2))
    assert len({call.tool_id for call in first}) == 2
    assert first == again


def test_calls_of_a_foreign_answer_get_ids_too(fake):
    message = ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"function": ADD}, {"function": ADD}]})
    calls = ZSMergeLLM(llm=fake()).get_tool_calls_from_response(ChatResponse(message=message))
    assert len({call.tool_id for call in calls}) == 2


@pytest.mark.parametrize("method", ["chat_with_tools", "stream_chat_with_tools"])
def test_one_call_at_a_time_unless_parallel_calls_are_allowed(method, fake, result):
    llm = ZSMergeLLM(llm=fake(result("", ADD, NAME)))
    response = getattr(llm, method)(TOOLS, user_msg="Go!")
    response = response if method == "chat_with_tools" else list(response)[-1]
    assert [call.tool_name for call in llm.get_tool_calls_from_response(response)] == ["add"]


@pytest.mark.parametrize("written", ["{not json", "[1]", "", None])
def test_arguments_that_are_no_object_are_empty(written, fake, result):
    llm = ZSMergeLLM(llm=fake(result("", {"name": "add", "arguments": written})))
    (call,) = llm.get_tool_calls_from_response(llm.chat_with_tools(TOOLS, user_msg="Go!"))
    assert (call.tool_name, call.tool_kwargs) == ("add", {})


def test_an_answer_without_calls_is_an_error_only_on_demand(fake):
    llm = ZSMergeLLM(llm=fake("Three."))
    response = llm.chat_with_tools(TOOLS, user_msg="Go!", tool_required=True)
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match=r"answered 'Three\.'"):
        llm.get_tool_calls_from_response(response)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ["add", "name"]),
        ("auto", ["add", "name"]),
        ("required", ["add", "name"]),
        ("none", []),
        ("name", ["name"]),
        ({"type": "function", "function": {"name": "add"}}, ["add"]),
    ],
)
def test_the_tool_choice_decides_what_is_offered(choice, expected, fake):
    engine = fake()
    ZSMergeLLM(llm=engine).chat_with_tools(TOOLS, user_msg="Go!", tool_choice=choice)
    assert offered(engine) == expected


def test_a_choice_that_is_not_offered_is_refused(fake):
    with pytest.raises(ConfigError, match=r"'multiply', which is not among the tools: add, name"):
        ZSMergeLLM(llm=fake()).chat_with_tools(TOOLS, user_msg="Go!", tool_choice="multiply")


async def test_predict_and_call_runs_the_tool(fake, result):
    llm = ZSMergeLLM(llm=fake(result("", ADD)), is_function_calling_model=True)
    assert llm.predict_and_call(TOOLS, user_msg="1 + 2?").response == "3"
    assert (await llm.apredict_and_call(TOOLS, user_msg="1 + 2?")).response == "3"


async def test_predict_and_call_works_by_text_without_tool_support(fake):
    llm = ZSMergeLLM(llm=fake(REACT_CALL))
    assert (await llm.apredict_and_call(TOOLS, user_msg="1 + 2?")).response == "3"
    assert (await asyncio.to_thread(llm.predict_and_call, TOOLS, user_msg="1 + 2?")).response == "3"


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_function_agent_calls_a_tool_and_answers(streaming, fake, result):
    engine = fake(result("", ADD), "The sum is 3.")
    llm = ZSMergeLLM(llm=engine, is_function_calling_model=True)
    answer = await FunctionAgent(tools=TOOLS, llm=llm, streaming=streaming).run("1 + 2?")
    assert str(answer) == "The sum is 3."
    assert [call.tool_name for call in answer.tool_calls] == ["add"]
    asked, called, returned = engine.calls[1].prompt
    assert (asked["role"], called["role"], returned["role"]) == ("user", "assistant", "tool")
    assert called["tool_calls"][0]["id"] == returned["tool_call_id"] == "id_0"
    assert returned["content"] == "3"


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_react_agent_calls_a_tool_and_answers(streaming, fake):
    engine = fake(REACT_CALL, "Thought: I can answer without using any more tools.\nAnswer: The sum is 3.")
    answer = await ReActAgent(tools=TOOLS, llm=ZSMergeLLM(llm=engine), streaming=streaming).run("1 + 2?")
    assert str(answer) == "The sum is 3."
    assert "Observation: 3" in engine.calls[1].prompt[-1]["content"]


async def test_an_agent_workflow_picks_the_agent_the_model_can_be(fake, result):
    react = fake(REACT_CALL, "Thought: I can answer without using any more tools.\nAnswer: The sum is 3.")
    function = fake(result("", ADD), "The sum is 3.")
    for engine, capable in ((react, False), (function, True)):
        llm = ZSMergeLLM(llm=engine, is_function_calling_model=capable)
        workflow = AgentWorkflow.from_tools_or_functions(TOOLS, llm=llm)
        assert str(await workflow.run("1 + 2?")) == "The sum is 3."


async def test_structured_predict_reads_json_from_the_answer(fake):
    engine = fake('Here it is: {"name": "Paris", "country": "France"}')
    llm = ZSMergeLLM(llm=engine)
    paris = City(name="Paris", country="France")
    assert llm.structured_predict(City, PROMPT, what="Paris") == paris
    assert await llm.astructured_predict(City, PROMPT, llm_kwargs={"max_tokens": 9}, what="Paris") == paris
    engine.answers = ['{"name": "Paris", "country": "France"}']
    assert list(llm.stream_structured_predict(City, PROMPT, what="Paris"))[-1].name == "Paris"
    partial = [item async for item in await llm.astream_structured_predict(City, PROMPT, what="Paris")]
    assert partial[-1].country == "France"
    assert engine.calls[1].sampling.max_tokens == 9


def test_structured_predict_takes_a_tool_call_where_the_model_has_tools(fake, result):
    city = {"name": "City", "arguments": json.dumps({"name": "Paris", "country": "France"})}
    llm = ZSMergeLLM(llm=fake(result("", city)), is_function_calling_model=True)
    assert llm.structured_predict(City, PROMPT, what="Paris").country == "France"
    assert llm.as_structured_llm(City).complete("Paris").raw.name == "Paris"


def test_structured_predict_says_so_when_the_model_answers_in_words(fake):
    llm = ZSMergeLLM(llm=fake("Paris is nice."), is_function_calling_model=True)
    with pytest.raises(ValueError, match="called no tool"):
        llm.structured_predict(City, PROMPT, what="Paris")
