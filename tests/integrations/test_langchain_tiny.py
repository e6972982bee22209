"""LangChain on the whole product, with tiny random models: agents, structured output, usage, the event loop."""

from __future__ import annotations

import asyncio
import time
from typing import Any, Literal
from unittest import mock

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ProviderStrategy, ToolStrategy
from langchain_core.callbacks import UsageMetadataCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, trim_messages
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableWithMessageHistory
from langchain_core.tools import tool
from langchain_core.tracers import LangChainTracer
from langchain_zsmerge import ChatZSMerge, ZSMergeDocuments, ZSMergeLLM
from langgraph.checkpoint.memory import InMemorySaver
from pydantic import BaseModel, Field, TypeAdapter
from typing_extensions import TypedDict

from tests.support.chat import LARGE_CACHE, make_llm, record_passes
from tests.support.scripted_model import scripted_answers
from zsmerge_llm import Grammar
from zsmerge_llm.engine.model_runner import STEP_TOKENS
from zsmerge_llm.testing import event_loop_gaps


@tool
def weather(place: str) -> str:
    """The weather of a place."""
    return "18 degrees"


@tool
def people(place: str) -> str:
    """How many live in a place."""
    return "400 000"


@tool
def add(a: int, b: int) -> str:
    """Adds."""
    return str(a + b)


class Place(BaseModel):
    """A place."""

    name: str = Field(max_length=8)
    kind: Literal["town", "village"]
    inhabitants: int | None = None


class PlaceDict(TypedDict):
    """A place."""

    name: str
    kind: Literal["town", "village"]


TURNS = [
    ("warm?", '{"name": "weather", "arguments": {"place": "Zürich"}}', "It is 18 degrees."),
    ("big?", '{"name": "people", "arguments": {"place": "Zürich"}}', "It has 400 000 people."),
    ("1 + 2?", '{"name": "add", "arguments": {"a": 1, "b": 2}}', "It is 3."),
    ("warm there?", '<tool_call>\n{"name": "weather", "arguments": {"place": "Bern"}}\n</tool_call>', "18 too."),
    ("thanks", "You are welcome.", ""),
    ("3 + 4?", '{"name": "add", "arguments": {"a": 3, "b": 4}}', "It is 7."),
]


def chat(name: str = "qwen2.5", **settings: Any) -> ChatZSMerge:
    return ChatZSMerge(llm=make_llm(name, cache=LARGE_CACHE), max_tokens=80, **settings)


@pytest.mark.parametrize("name", ["qwen2.5", "smollm2"])
def test_an_agent_with_three_tools_reads_every_token_of_six_turns_once(name: str) -> None:
    model = chat(name)
    agent = create_agent(model, [weather, people, add], system_prompt="Be brief.", checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "ann"}}
    usage = UsageMetadataCallbackHandler()
    with record_passes() as passes:
        for question, *answers in TURNS:
            with scripted_answers(model.core, *[answer for answer in answers if answer]):
                state = agent.invoke({"messages": [("user", question)]}, {**thread, "callbacks": [usage]})
    said = [message for message in state["messages"] if isinstance(message, AIMessage)]
    assert len(said) == 11
    assert [call["name"] for message in said for call in message.tool_calls] == [
        "weather", "people", "add", "weather", "add",
    ]  # fmt: skip
    assert said[-1].text == "It is 7."
    assert {message.response_metadata["token_usage"]["reuse"] for message in said[1:]} == {"continued"}
    tokens = model.core.session("ann").tokens
    padding = (STEP_TOKENS - 1) * passes.count(STEP_TOKENS)  # steps of several tokens are padded
    assert sum(passes) <= len(tokens) + padding  # nothing went through the model twice
    total, held = usage.usage_metadata[model.model], 0
    for message in said:
        cost: Any = message.usage_metadata
        assert held - 2 <= cost["input_token_details"]["cache_read"] <= held  # all, but for an end token or two
        held = cost["total_tokens"]
    new = total["input_tokens"] - total["input_token_details"]["cache_read"]  # read anew, in all requests together
    assert new + total["output_tokens"] - 2 * len(said) <= held <= new + total["output_tokens"]
    assert total["total_tokens"] == total["input_tokens"] + total["output_tokens"]


@pytest.mark.parametrize("strategy", [ProviderStrategy, ToolStrategy, lambda schema: schema])
def test_an_agent_ends_with_a_structured_response(strategy: Any) -> None:
    model = chat(temperature=1.0, seed=2)
    agent = create_agent(model, [weather], response_format=strategy(Place))
    place = '{"name": "Zürich", "kind": "town"}'
    last = (
        place
        if strategy is not ToolStrategy
        else f'<tool_call>\n{{"name": "Place", "arguments": {place}}}\n</tool_call>'
    )
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Zürich"}}\n</tool_call>'
    with scripted_answers(model.core, call, last):
        state = agent.invoke({"messages": [("user", "Where is it warm?")]})
    assert state["structured_response"] == Place(name="Zürich", kind="town")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("schema", [Place, PlaceDict, Place.model_json_schema()])
def test_structured_output_fits_its_schema_whatever_the_model(method: Any, schema: Any) -> None:
    made = chat(temperature=1.0, seed=1).with_structured_output(schema, method=method)
    results = [made.invoke("Where?"), *made.stream("Where?")]
    check: Any = TypeAdapter(PlaceDict if schema is PlaceDict else Place)
    for result in (results[0], results[-1]):
        check.validate_python(result)
        assert isinstance(result, dict) is (schema is not Place)


def test_json_mode_gives_json_and_include_raw_the_message_too() -> None:
    model = chat(temperature=1.0, seed=1)
    raw = model.with_structured_output({"title": "any", "type": "object"}, method="json_mode", include_raw=True)
    result = raw.invoke("Give me JSON.")
    assert isinstance(result, dict)
    assert isinstance(result["parsed"], dict)
    assert isinstance(result["raw"], AIMessage)
    assert result["parsing_error"] is None
    strict = model.with_structured_output(Place, include_raw=True, max_tokens=3).invoke("Where?")
    assert isinstance(strict, dict)
    assert strict["parsed"] is None
    assert strict["parsing_error"] is not None


def test_a_grammar_constrains_one_completion_and_a_batch() -> None:
    llm = ZSMergeLLM(llm=make_llm(cache=LARGE_CACHE), max_tokens=20, temperature=1.0, seed=1)
    yes = llm.bind(grammar=Grammar.choice("yes", "no"))
    assert {yes.invoke("Well? "), *yes.batch(["a", "bcd"])} <= {"yes", "no"}
    assert yes.batch(["a"], stop=["es"])[0] in ("y", "no")


def test_usage_of_a_conversation_adds_up() -> None:
    model, history = chat(temperature=1.0, seed=4), [SystemMessage("Be brief."), HumanMessage("Hello")]
    held = 0
    for question in ("And?", "Well?", "So?"):
        counted_before = model.get_num_tokens_from_messages(history)
        answer = model.invoke(history, max_tokens=6)
        usage: Any = answer.usage_metadata
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert held - 2 <= usage["input_token_details"]["cache_read"] <= held
        if not held:
            assert usage["input_tokens"] == counted_before
        held = usage["total_tokens"]
        history += [answer, HumanMessage(question)]


def test_usage_adds_up_in_the_metadata_that_langsmith_gets() -> None:
    model, history = chat(temperature=1.0, seed=4), [SystemMessage("Be brief."), HumanMessage("Hello")]
    client = mock.MagicMock()
    tracer = LangChainTracer(client=client, project_name="test")
    answers, held, asked = [], [], model.get_num_tokens_from_messages(history)
    for question in ("And?", "Well?", "So?"):
        answers.append(model.invoke(history, {"callbacks": [tracer]}, max_tokens=6, session_id="ann"))
        history += [answers[-1], HumanMessage(question)]
        held.append(len(model.core.session("ann").tokens))
    tracer.wait_for_futures()
    ended = [sent.kwargs["extra"]["metadata"]["usage_metadata"] for sent in client.update_run.call_args_list]
    assert ended == [answer.usage_metadata for answer in answers]
    assert ended[0]["input_tokens"] == asked
    before = 0
    for cost, answer, tokens in zip(ended, answers, held, strict=True):
        assert answer.response_metadata["finish_reason"] == "length"
        assert cost["output_tokens"] == 6
        assert tokens <= cost["input_tokens"] + cost["output_tokens"] <= tokens + 1  # the logical prompt and the answer
        assert before - 1 <= cost["input_token_details"]["cache_read"] <= before  # of it, what was held before
        before = tokens


def test_a_message_history_reads_each_turn_once() -> None:
    model, kept = chat(temperature=1.0, seed=4), InMemoryChatMessageHistory()
    runnable = RunnableWithMessageHistory(model, lambda name: kept)
    with record_passes() as passes:
        for question in ("One?", "Two?", "Three?"):
            answer = runnable.invoke([HumanMessage(question)], {"configurable": {"session_id": "ann"}})
    assert answer.response_metadata["token_usage"]["reuse"] == "continued"
    assert len(kept.messages) == 6
    assert sum(passes) <= len(model.core.session("ann").tokens)


def test_messages_are_trimmed_by_the_models_own_count() -> None:
    model = chat("gemma3")  # its template adds no words of its own
    history: list[BaseMessage] = [SystemMessage("Be brief.")]
    for number in range(5):
        history += [HumanMessage(f"question {number}"), AIMessage(f"answer {number}")]
    history.append(HumanMessage("and?"))
    limit = model.get_num_tokens_from_messages(history) // 2
    kept = trim_messages(history, max_tokens=limit, token_counter=model, include_system=True, start_on="human")
    assert kept[0] == history[0]
    assert kept[-1] == history[-1]
    assert model.get_num_tokens_from_messages(kept) <= limit
    assert model.get_num_tokens_from_messages(history, [weather]) > model.get_num_tokens_from_messages(history)


def test_breaking_out_of_a_stream_stops_decoding_within_a_token() -> None:
    model = chat(temperature=1.0, seed=4)
    with record_passes() as passes:
        stream = model.stream("Hello")
        next(stream)
        before = len(passes)
        stream.close()  # type: ignore[attr-defined]
        time.sleep(0.1)
    assert len(passes) == before


async def test_twenty_calls_at_once_leave_the_loop_free() -> None:
    model = chat(temperature=1.0, seed=4)
    tools, formed = model.bind_tools([weather], tool_choice="any"), model.with_structured_output(Place)
    model.warm_up()
    async with event_loop_gaps() as gaps:
        calls = [(model, tools, formed)[at % 3].ainvoke(f"Hello {at}") for at in range(20)]
        assert all(await asyncio.gather(*calls))
    print(f"{len(gaps)} ticks, worst gaps {[round(gap * 1000) for gap in sorted(gaps)[-3:]]} ms")
    assert len(gaps) > 20
    assert sorted(gaps)[len(gaps) * 98 // 100] < 0.05  # what is beyond is the machine's


def test_documents_are_read_once_and_answered_on_copies() -> None:
    model = chat(temperature=1.0, seed=4)
    report = ZSMergeDocuments(model=model, documents=["The sky is blue. " * 40, "Grass is green. " * 40])
    with record_passes() as passes:
        report.read()
    size, once = passes[-1], sum(passes)
    with record_passes() as passes:
        answers = report.batch(["Which colour?", "What is green?", "Which colour?"])
        (report | StrOutputParser()).invoke("And?", max_tokens=2)
        list(report.stream("And?", max_tokens=2))
        asyncio.run(report.ainvoke("And?", max_tokens=2))
    assert size
    assert sum(passes) < once  # six questions cost less than the documents did
    for answer in answers:
        usage: Any = answer.usage_metadata
        assert usage["input_token_details"]["cache_read"] >= once
    assert answers[0].text == answers[2].text
    place = report.with_structured_output(Place).invoke("Where?")
    assert isinstance(place, Place)


def test_a_conversation_about_documents_has_several_turns() -> None:
    model = chat(temperature=1.0, seed=4)
    report = ZSMergeDocuments(model=model, documents=["The sky is blue. " * 40])
    history: list[BaseMessage] = [HumanMessage("Which colour?")]
    history += [report.invoke(history, max_tokens=4), HumanMessage("Really?")]
    second = report.invoke(history, max_tokens=4)
    assert second.response_metadata["token_usage"]["reuse"] == "continued"
