"""Tools and structured output: what reaches the engine, and what comes back."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
from typing import Any

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.llms import ChatMessage, ChatResponse
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.zsmerge import ZSMergeLLM
from pydantic import BaseModel

from zsmerge_llm.errors import InputError
from zsmerge_llm.testing import FakeLLM, scripted_answer
from zsmerge_llm.types import Result, Usage


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


PREDICT = (
    "structured_predict",
    "stream_structured_predict",
    "astructured_predict",
    "astream_structured_predict",
)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def offered(engine) -> list[str]:
    return [tool["function"]["name"] for tool in engine.requests[-1].tools or []]


def test_tools_reach_the_model_in_the_openai_format():
    engine = FakeLLM(scripted_answer("", ADD))
    history = [ChatMessage(role="system", content="Be brief.")]
    ZSMergeLLM(llm=engine).chat_with_tools(TOOLS, user_msg="1 + 2?", chat_history=history)
    assert [message["role"] for message in engine.requests[0].prompt] == ["system", "user"]
    assert len(history) == 1
    tool = engine.requests[0].tools[0]
    assert tool["type"] == "function"
    assert set(tool["function"]["parameters"]["properties"]) == {"a", "b"}


async def test_the_four_tool_methods_give_the_same_calls():
    llm = ZSMergeLLM(llm=FakeLLM(scripted_answer("Adding.", ADD, NAME)))
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


async def test_arguments_of_calls_are_streamed_as_they_are_written():
    long = {"name": "add", "arguments": json.dumps({"a": 1234567890, "b": 2})}
    llm = ZSMergeLLM(llm=FakeLLM(scripted_answer("Let me see.", long, NAME)))
    options = {"user_msg": "Go!", "allow_parallel_tool_calls": True}
    streamed = list(llm.stream_chat_with_tools(TOOLS, **options))
    astreamed = [response async for response in await llm.astream_chat_with_tools(TOOLS, **options)]
    for responses in (streamed, astreamed):
        texts = [
            response.message.additional_kwargs["tool_calls"][0]["function"]["arguments"]
            for response in responses
            if response.message.additional_kwargs
        ]
        assert len(set(texts)) > 3
        assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
        partial = [llm.get_tool_calls_from_response(each, error_on_no_tool_call=False) for each in responses]
        assert next([call.tool_name for call in calls] for calls in partial if calls) == ["add"]
        assert partial[-1] == llm.get_tool_calls_from_response(llm.chat_with_tools(TOOLS, **options))
        assert responses[-1].message == llm.chat_with_tools(TOOLS, **options).message
        assert "".join(response.delta for response in responses) == "Let me see."


def test_calls_without_ids_get_unique_stable_ids():
    llm = ZSMergeLLM(llm=FakeLLM(scripted_answer("", ADD, ADD, ids=False)))
    response = llm.chat_with_tools(TOOLS, user_msg="Go!", allow_parallel_tool_calls=True)
    first, again = (llm.get_tool_calls_from_response(response) for _ in range(2))
    assert len({call.tool_id for call in first}) == 2
    assert first == again


def test_calls_of_a_foreign_answer_get_ids_too():
    message = ChatMessage(role="assistant", additional_kwargs={"tool_calls": [{"function": ADD}, {"function": ADD}]})
    calls = ZSMergeLLM(llm=FakeLLM()).get_tool_calls_from_response(ChatResponse(message=message))
    assert len({call.tool_id for call in calls}) == 2


@pytest.mark.parametrize("allowed", [False, True])
def test_parallel_calls_are_an_option_of_the_caller(allowed):
    engine = FakeLLM()
    llm = ZSMergeLLM(llm=engine)
    llm.chat_with_tools(TOOLS, user_msg="Go!", allow_parallel_tool_calls=allowed)
    llm.chat_with_tools(TOOLS, user_msg="Go!")
    assert [call.parallel_tool_calls for call in engine.requests] == [allowed, False]


def test_a_call_that_cannot_be_read_is_reported():
    broken = {"id": "x", "type": "function", "function": {"name": None, "arguments": '{"a'}, "error": "Cut."}
    usage = Usage(1, 0, 1, 0, 0.0, 0.0, 0)
    llm = ZSMergeLLM(llm=FakeLLM(Result("", "length", usage, invalid_tool_calls=[broken])))
    for response in (llm.chat_with_tools(TOOLS, user_msg="Go!"), [*llm.stream_chat_with_tools(TOOLS, "Go!")][-1]):
        assert response.raw["invalid_tool_calls"] == [broken]
        with pytest.raises(ValueError, match="cannot be read"):
            llm.get_tool_calls_from_response(response)


@pytest.mark.parametrize("written", ["{not json", "[1]", "", None])
def test_arguments_that_are_no_object_are_empty(written):
    llm = ZSMergeLLM(llm=FakeLLM(scripted_answer("", {"name": "add", "arguments": written})))
    (call,) = llm.get_tool_calls_from_response(llm.chat_with_tools(TOOLS, user_msg="Go!"))
    assert (call.tool_name, call.tool_kwargs) == ("add", {})


def test_an_answer_without_calls_is_an_error_only_on_demand():
    llm = ZSMergeLLM(llm=FakeLLM("Three."))
    response = llm.chat_with_tools(TOOLS, user_msg="Go!", tool_required=True)
    assert llm.get_tool_calls_from_response(response, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match=r"answered 'Three\.'"):
        llm.get_tool_calls_from_response(response)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("auto", "auto"),
        ("required", "required"),
        ("any", "required"),
        ("none", "none"),
        ("name", named("name")),
        ({"type": "function", "function": {"name": "add"}}, named("add")),
        ({"type": "tool", "name": "add"}, named("add")),
    ],
)
def test_the_tool_choice_reaches_the_model(choice, expected):
    engine = FakeLLM()
    ZSMergeLLM(llm=engine).chat_with_tools(TOOLS, user_msg="Go!", tool_choice=choice)
    assert (offered(engine), engine.requests[0].tool_choice) == (["add", "name"], expected)


def test_tool_required_requires_a_call():
    engine = FakeLLM()
    llm = ZSMergeLLM(llm=engine)
    llm.chat_with_tools(TOOLS, user_msg="Go!", tool_required=True)
    llm.chat_with_tools(TOOLS, user_msg="Go!", tool_required=True, tool_choice="add")
    assert [call.tool_choice for call in engine.requests] == ["required", named("add")]


def test_a_choice_without_a_name_is_refused():
    with pytest.raises(InputError, match="tool_choice must be"):
        ZSMergeLLM(llm=FakeLLM()).chat_with_tools(TOOLS, user_msg="Go!", tool_choice={"type": "function"})


def test_a_tool_keeps_its_own_name():
    engine = FakeLLM(scripted_answer("", {"name": "the sum: of two", "arguments": {"a": 1, "b": 2}}))
    odd = FunctionTool.from_defaults(add, name="the sum: of two")
    assert ZSMergeLLM(llm=engine).predict_and_call([odd], user_msg="Go!").response == "3"
    assert offered(engine) == ["the sum: of two"]


async def test_predict_and_call_runs_the_tool():
    engine = FakeLLM(scripted_answer("", ADD))
    llm = ZSMergeLLM(llm=engine)
    assert llm.predict_and_call(TOOLS, user_msg="1 + 2?").response == "3"
    assert (await llm.apredict_and_call(TOOLS, user_msg="1 + 2?")).response == "3"
    assert {call.tool_choice for call in engine.requests} == {"required"}


async def test_predict_and_call_lets_the_model_answer_where_that_is_no_error():
    engine = FakeLLM("Three.")
    llm = ZSMergeLLM(llm=engine)
    options = {"user_msg": "1 + 2?", "error_on_no_tool_call": False}
    assert llm.predict_and_call(TOOLS, **options).response == "Three."
    assert (await llm.apredict_and_call(TOOLS, **options)).response == "Three."
    assert {call.tool_choice for call in engine.requests} == {None}


async def test_predict_and_call_uses_a_react_prompt_without_function_calling():
    llm = ZSMergeLLM(llm=FakeLLM(REACT_CALL), is_function_calling_model=False)
    assert (await llm.apredict_and_call(TOOLS, user_msg="1 + 2?")).response == "3"
    assert (await asyncio.to_thread(llm.predict_and_call, TOOLS, user_msg="1 + 2?")).response == "3"


PARIS = '{"name": "Paris", "country": "France"}'


async def every(answer: Any) -> list[Any]:
    answer = await answer if inspect.isawaitable(answer) else answer
    if inspect.isasyncgen(answer):
        return [item async for item in answer]
    return list(answer) if inspect.isgenerator(answer) else [answer]


@pytest.mark.parametrize("method", PREDICT)
async def test_structured_predict_asks_for_the_schema(method):
    engine = FakeLLM(PARIS)
    llm = ZSMergeLLM(llm=engine, system_prompt="Be brief.")
    options = {"llm_kwargs": {"max_tokens": 9, "tool_choice": "required"}, "what": "Paris"}
    seen = await every(getattr(llm, method)(City, PROMPT, **options))
    assert seen[-1] == City(name="Paris", country="France")
    (call,) = engine.requests
    assert call.response_format["json_schema"]["name"] == "City"
    assert call.response_format["json_schema"]["schema"]["required"] == ["name", "country"]
    assert "title" not in call.response_format["json_schema"]["schema"]["properties"]["name"]
    assert (call.tools, call.tool_choice, call.sampling.max_tokens) == (None, None, 9)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Describe the city of Paris."}]
    assert call.prompt == asked


@pytest.mark.parametrize("method", ["stream_structured_predict", "astream_structured_predict"])
async def test_a_streamed_object_grows(method):
    seen = await every(getattr(ZSMergeLLM(llm=FakeLLM(PARIS)), method)(City, PROMPT, what="Paris"))
    assert [(found.name, getattr(found, "country", None)) for found in seen] == [
        (None, None),
        ("Paris", None),
        ("Paris", "France"),
    ]
    assert [type(found) is City for found in seen] == [False, False, True]


@pytest.mark.parametrize("method", PREDICT)
async def test_an_answer_that_is_no_object_is_an_error(method):
    with pytest.raises(ValueError, match=r"(?s)no valid City.*max_tokens"):
        await every(getattr(ZSMergeLLM(llm=FakeLLM("Paris is nice.")), method)(City, PROMPT, what="Paris"))


@pytest.mark.parametrize("method", PREDICT)
async def test_structured_prediction_dispatches_events(method, events):
    await every(getattr(ZSMergeLLM(llm=FakeLLM(PARIS)), method)(City, PROMPT, what="Paris"))
    dispatched = [name for name in events.names if name.startswith("LLMStructured")]
    growing = ["LLMStructuredPredictInProgressEvent"] * (3 if "stream" in method else 0)
    assert dispatched == ["LLMStructuredPredictStartEvent", *growing, "LLMStructuredPredictEndEvent"]


@pytest.mark.parametrize("method", PREDICT)
async def test_the_prompt_of_a_base_model_describes_the_schema(method):
    engine = FakeLLM(PARIS)
    llm = ZSMergeLLM(llm=engine, is_chat_model=False)
    seen = await every(getattr(llm, method)(City, PROMPT, what="Paris"))
    assert seen[-1].country == "France"
    assert engine.requests[0].method == "complete"
    assert '"country"' in engine.requests[0].prompt
    assert engine.requests[0].response_format["type"] == "json_schema"


async def test_another_program_mode_is_respected():
    engine = FakeLLM(scripted_answer("", {"name": "City", "arguments": PARIS}))
    llm = ZSMergeLLM(llm=engine, pydantic_program_mode=PydanticProgramMode.FUNCTION)
    assert llm.structured_predict(City, PROMPT, what="Paris").country == "France"
    assert (await llm.astructured_predict(City, PROMPT, what="Paris")).country == "France"
    assert [call.tool_choice for call in engine.requests] == ["required", "required"]
    assert type(llm.as_structured_llm(City)) is StructuredLLM
    for method in ("stream_structured_predict", "astream_structured_predict"):
        assert (await every(getattr(llm, method)(City, PROMPT, what="Paris")))[-1].country == "France"


@pytest.mark.parametrize("method", ["chat", "stream_chat", "achat", "astream_chat"])
async def test_a_structured_llm_takes_messages_as_they_are(method):
    engine = FakeLLM(PARIS)
    llm = ZSMergeLLM(llm=engine, system_prompt="Be brief.").as_structured_llm(City)
    seen = await every(getattr(llm, method)([ChatMessage(content="Use {braces}.")], max_tokens=9))
    assert (seen[-1].raw.country, seen[-1].message.content) == ("France", PARIS)
    assert seen[-1].additional_kwargs["completion_tokens"] == 4
    assert engine.requests[0].prompt[1]["content"] == "Use {braces}."
    assert engine.requests[0].sampling.max_tokens == 9


def test_a_structured_llm_answers_for_a_query_engine():
    llm = ZSMergeLLM(llm=FakeLLM(PARIS)).as_structured_llm(City)
    index = SummaryIndex.from_documents([Document(text="Paris is in France.")])
    assert index.as_query_engine(llm=llm).query("Which city?").response == City(name="Paris", country="France")
    answer = index.as_query_engine(llm=ZSMergeLLM(llm=FakeLLM(PARIS)), output_cls=City).query("Which city?")
    assert answer.response == City(name="Paris", country="France")
