"""Agents on a fake model, and on a tiny random model whose calls are forced. The examples have them on a real one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from llama_index.core.agent.workflow import AgentOutput, AgentStream, AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.tools import FunctionTool
from llama_index.llms.zsmerge import ZSMergeLLM
from pydantic import BaseModel

from zsmerge_llm import LLM
from zsmerge_llm.testing import FakeLLM, scripted_answer


def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def name(of: str) -> str:
    """Names a thing."""
    return f"{of}!"


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}, 21 degrees."


def population(city: str) -> str:
    """The number of people who live in a city."""
    return f"{city} has 2,100,000 inhabitants."


class Sum(BaseModel):
    """A sum."""

    value: int


TOOLS = [FunctionTool.from_defaults(add), FunctionTool.from_defaults(name)]
SIX_TURNS = [FunctionTool.from_defaults(function) for function in (weather, population, add)]
ADD = {"name": "add", "arguments": {"a": 1, "b": 2}}
REACT_CALL = 'Thought: I need a tool.\nAction: add\nAction Input: {"a": 1, "b": 2}'
REACT_ANSWER = "Thought: I can answer without using any more tools.\nAnswer: The sum is 3."


async def run(agent: Any, question: str, memory: Any) -> tuple[Any, list[AgentOutput]]:
    """The agent's result, and its steps."""
    handler = agent.run(question, memory=memory)
    steps = [event async for event in handler.stream_events() if isinstance(event, AgentOutput)]
    return await handler, steps


def check_nothing_is_read_twice(usages: list[dict[str, Any]]) -> None:
    """Each turn goes on from all that was read before it, and adds what is new."""
    assert usages[0]["cached_tokens"] == 0
    for before, after in pairwise(usages):
        assert after["reuse"] == "continued"
        assert after["cached_tokens"] >= before["prompt_tokens"]
    read = sum(usage["prompt_tokens"] - usage["cached_tokens"] for usage in usages)
    generated = sum(usage["completion_tokens"] for usage in usages)
    assert read + generated >= usages[-1]["prompt_tokens"] > read


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_function_agent_calls_a_tool_and_answers(streaming):
    engine = FakeLLM(scripted_answer("", ADD), "The sum is 3.")
    llm = ZSMergeLLM(llm=engine)
    answer = await FunctionAgent(tools=TOOLS, llm=llm, streaming=streaming).run("1 + 2?")
    assert str(answer) == "The sum is 3."
    assert [call.tool_name for call in answer.tool_calls] == ["add"]
    asked, called, returned = engine.requests[1].prompt
    assert (asked["role"], called["role"], returned["role"]) == ("user", "assistant", "tool")
    assert called["tool_calls"][0]["id"] == returned["tool_call_id"] == "id_0"
    assert returned["content"] == "3"


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_react_agent_calls_a_tool_and_answers(streaming):
    engine = FakeLLM(REACT_CALL, REACT_ANSWER)
    answer = await ReActAgent(tools=TOOLS, llm=ZSMergeLLM(llm=engine), streaming=streaming).run("1 + 2?")
    assert str(answer) == "The sum is 3."
    assert "Observation: 3" in engine.requests[1].prompt[-1]["content"]


async def test_an_agent_workflow_picks_the_agent_the_model_can_be():
    react = FakeLLM(REACT_CALL, REACT_ANSWER)
    function = FakeLLM(scripted_answer("", ADD), "The sum is 3.")
    for engine, capable in ((react, False), (function, True)):
        llm = ZSMergeLLM(llm=engine, is_function_calling_model=capable)
        workflow = AgentWorkflow.from_tools_or_functions(TOOLS, llm=llm)
        assert str(await workflow.run("1 + 2?")) == "The sum is 3."


async def test_an_agent_streams_its_answer():
    engine = FakeLLM(scripted_answer("", ADD), "The sum is 3.")
    handler = FunctionAgent(tools=TOOLS, llm=ZSMergeLLM(llm=engine)).run("1 + 2?")
    pieces = [event.delta async for event in handler.stream_events() if isinstance(event, AgentStream)]
    assert "".join(pieces) == "The sum is 3."
    assert str(await handler) == "The sum is 3."


async def test_two_calls_at_once_get_their_own_results():
    engine = FakeLLM(scripted_answer("", ADD, {"name": "name", "arguments": {"of": "x"}}), "Done.")
    await FunctionAgent(tools=TOOLS, llm=ZSMergeLLM(llm=engine)).run("Go!")
    returned = {message["tool_call_id"]: message["content"] for message in engine.requests[1].prompt[2:]}
    assert returned == {"id_0": "3", "id_1": "x!"}
    assert engine.requests[0].parallel_tool_calls


async def test_the_first_call_of_an_agent_may_be_required():
    engine = FakeLLM(scripted_answer("", ADD), "The sum is 3.")
    agent = FunctionAgent(tools=TOOLS, llm=ZSMergeLLM(llm=engine), initial_tool_choice="add")
    await agent.run("1 + 2?")
    assert engine.requests[0].tool_choice["function"]["name"] == "add"
    assert engine.requests[1].tool_choice is None


async def test_an_agent_answers_with_an_object():
    engine = FakeLLM(scripted_answer("", ADD), "The sum is 3.", '{"value": 3}')
    answer = await FunctionAgent(tools=TOOLS, llm=ZSMergeLLM(llm=engine), output_cls=Sum).run("1 + 2?")
    assert answer.get_pydantic_model(Sum) == Sum(value=3)
    assert engine.requests[2].response_format["json_schema"]["name"] == "Sum"


async def test_agents_hand_off_to_each_other():
    handoff = {"name": "handoff", "arguments": {"to_agent": "adder", "reason": "It adds."}}
    engine = FakeLLM(scripted_answer("", handoff), scripted_answer("", ADD), "The sum is 3.")
    llm = ZSMergeLLM(llm=engine)
    first = FunctionAgent(name="first", description="Talks.", tools=[], llm=llm, can_handoff_to=["adder"])
    second = FunctionAgent(name="adder", description="Adds.", tools=TOOLS, llm=llm)
    answer = await AgentWorkflow(agents=[first, second], root_agent="first").run(user_msg="1 + 2?")
    assert str(answer) == "The sum is 3."
    assert answer.current_agent_name == "adder"


async def test_an_agent_that_calls_three_tools_over_six_turns_reads_every_token_once(tiny: LLM):
    llm = ZSMergeLLM(llm=tiny, max_tokens=64)
    agent = FunctionAgent(tools=SIX_TURNS, llm=llm, system_prompt="Be brief.")
    memory, usages, called = ChatMemoryBuffer.from_defaults(llm=llm), [], []
    for tool in SIX_TURNS * 2:
        agent.initial_tool_choice = tool.metadata.name
        _, steps = await run(agent, f"Use {tool.metadata.name}.", memory)
        usages += [step.raw["usage"] for step in steps]
        called += [call.tool_name for step in steps for call in step.tool_calls if step.response.content == ""]
    assert [name for name in called if name] == ["weather", "population", "add"] * 2
    assert len(usages) == 12
    check_nothing_is_read_twice(usages)
