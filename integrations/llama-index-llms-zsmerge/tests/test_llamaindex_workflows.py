"""Handoffs, people in the loop, MCP tools, stored contexts; router, sub-question and citation engines.

Annotations are no strings here: LlamaIndex finds a tool's `Context` by its class.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.agent.workflow import AgentOutput, AgentWorkflow, CodeActAgent, FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.query_engine import CitationQueryEngine, RouterQueryEngine, SubQuestionQueryEngine
from llama_index.core.question_gen import LLMQuestionGenerator
from llama_index.core.tools import FunctionTool, QueryEngineTool
from llama_index.core.workflow import Context, HumanResponseEvent, InputRequiredEvent
from llama_index.llms.zsmerge import ZSMergeDocumentQueryEngine, ZSMergeLLM
from llama_index.tools.mcp import BasicMCPClient, McpToolSpec

from zsmerge_llm import LLM
from zsmerge_llm.testing import FakeLLM, scripted_answer

TEXTS = {"ships": "The captain is Anna Stone.", "lighthouses": "The keeper is Agnes Hill."}


def clock() -> str:
    """Tells the time."""
    return "12:00"


def called(name: str, **arguments: Any) -> Any:
    """Return a scripted answer that calls a tool."""
    return scripted_answer("", {"name": name, "arguments": arguments})


async def ask_person(ctx: Context) -> str:
    """Asks a person for a colour."""
    answer = await ctx.wait_for_event(HumanResponseEvent, waiter_event=InputRequiredEvent(prefix="Which colour?"))
    return answer.response


async def test_agents_on_one_real_model_hand_off_there_and_back(tiny: LLM) -> None:
    """Each agent is a conversation of its own: its system prompt comes first."""
    llm = ZSMergeLLM(llm=tiny, max_tokens=96)
    first = FunctionAgent(name="first", description="Receives.", llm=llm, can_handoff_to=["second"])
    second = FunctionAgent(
        name="second", description="Knows the time.", llm=llm, tools=[clock], initial_tool_choice="clock"
    )
    first.initial_tool_choice = "handoff"

    workflow = AgentWorkflow(agents=[first, second], root_agent="first", handoff_prompt="{agent_info}")
    for agent in (first, second):
        agent.system_prompt = "Be brief."
    handler = workflow.run(user_msg="What time is it?")
    steps = [event async for event in handler.stream_events() if isinstance(event, AgentOutput)]
    answer = await handler
    # a random model names agents that do not exist: the workflow tells it so, and stays where it is
    assert answer.current_agent_name in ("first", "second")
    assert steps[0].tool_calls[0].tool_name == "handoff"
    for before, after in pairwise(steps):
        if before.current_agent_name == after.current_agent_name:
            assert after.raw["usage"]["cached_tokens"] >= before.raw["usage"]["prompt_tokens"]


async def test_handoffs_return_to_the_first_agent_which_sees_the_whole_conversation() -> None:
    engine = FakeLLM(
        called("handoff", to_agent="second", reason="It knows."),
        called("clock"),
        called("handoff", to_agent="first", reason="Done."),
        "It is noon.",
    )
    llm = ZSMergeLLM(llm=engine)
    first = FunctionAgent(name="first", description="Receives.", llm=llm, can_handoff_to=["second"])
    second = FunctionAgent(name="second", description="Tells the time.", llm=llm, tools=[clock])
    answer = await AgentWorkflow(agents=[first, second], root_agent="first").run(user_msg="What time is it?")
    assert (answer.current_agent_name, str(answer)) == ("first", "It is noon.")
    assert [message["role"] for message in engine.requests[-1].prompt].count("tool") == 3
    assert "12:00" in [message["content"] for message in engine.requests[-1].prompt]


async def test_a_tool_asks_a_person_and_a_stored_conversation_goes_on() -> None:
    engine = FakeLLM(called("ask_person"), "It is red now.", "It was red.")
    agent = FunctionAgent(tools=[ask_person], llm=ZSMergeLLM(llm=engine))
    memory = ChatMemoryBuffer.from_defaults(llm=agent.llm)
    handler = agent.run("Paint.", memory=memory)
    async for event in handler.stream_events():
        if isinstance(event, InputRequiredEvent):
            handler.ctx.send_event(HumanResponseEvent(response="red"))
    assert str(await handler) == "It is red now."
    assert engine.requests[1].prompt[-1]["content"] == "red"
    again = FunctionAgent(tools=[ask_person], llm=ZSMergeLLM(llm=engine))
    messages = [ChatMessage.model_validate_json(message.model_dump_json()) for message in memory.get_all()]
    stored = ChatMemoryBuffer.from_defaults(llm=agent.llm, chat_history=messages)
    assert str(await again.run("Which was it?", memory=stored)) == "It was red."
    *known, said, asked = engine.requests[2].prompt
    assert known == engine.requests[1].prompt
    assert (said["content"], asked["content"]) == ("It is red now.", "Which was it?")


async def test_a_code_act_agent_runs_the_code_of_an_answer() -> None:
    ran = []

    def execute(code: str) -> str:
        ran.append(code)
        return "3"

    engine = FakeLLM("<execute>\nprint(1 + 2)\n</execute>", "The sum is 3.")
    agent = CodeActAgent(code_execute_fn=execute, llm=ZSMergeLLM(llm=engine), tools=[])
    assert str(await agent.run("1 + 2?")) == "The sum is 3."
    assert ran == ["print(1 + 2)"]


@pytest.mark.slow
async def test_an_agent_calls_a_tool_of_an_mcp_server(tmp_path: Path) -> None:
    server = tmp_path / "server.py"
    server.write_text(
        "from mcp.server.mcpserver import MCPServer\n"
        "server = MCPServer('harbour')\n"
        "@server.tool()\n"
        "def tide(harbour: str, hours: list[int] | None = None) -> str:\n"
        "    'The tide.'\n"
        "    return f'{harbour}: 3 metres'\n"
        "server.run()\n",
        encoding="utf-8",
    )
    tools = await McpToolSpec(BasicMCPClient(sys.executable, args=[str(server)])).to_tool_list_async()
    engine = FakeLLM(called("tide", harbour="Dover"), "It is high.")
    assert str(await FunctionAgent(tools=tools, llm=ZSMergeLLM(llm=engine)).run("How high?")) == "It is high."
    assert "Dover: 3 metres" in engine.requests[1].prompt[-1]["content"]
    parameters = engine.requests[0].tools[0]["function"]["parameters"]
    assert set(parameters["properties"]) == {"harbour", "hours"}


# -- query engines --


def engine_tools(llm: ZSMergeLLM) -> list[QueryEngineTool]:
    """Return a tool for each text; the names are the texts' subjects."""
    return [
        QueryEngineTool.from_defaults(ZSMergeDocumentQueryEngine([text], llm), name=name, description=f"About {name}.")
        for name, text in TEXTS.items()
    ]


@pytest.mark.parametrize("method", ["query", "aquery"])
async def test_a_router_asks_the_engine_that_the_model_chooses(method: str) -> None:
    engine = FakeLLM(called("SingleSelection", index=2, reason="It knows."), "Agnes Hill.")
    llm = ZSMergeLLM(llm=engine)
    answer = getattr(RouterQueryEngine.from_defaults(engine_tools(llm), llm=llm), method)("Who is the keeper?")
    answer = await answer if method == "aquery" else answer
    assert str(answer) == "Agnes Hill."
    assert answer.metadata["selector_result"].ind == 1
    assert list(engine.documents.values()) == [TEXTS["lighthouses"]]


def test_a_router_that_takes_several_engines_joins_their_answers() -> None:
    engine = FakeLLM(
        called("MultiSelection", selections=[{"index": 1, "reason": "a"}, {"index": 2, "reason": "b"}]),
        "Anna Stone.",
        "Agnes Hill.",
        "Anna Stone and Agnes Hill.",
    )
    llm = ZSMergeLLM(llm=engine)
    router = RouterQueryEngine.from_defaults(engine_tools(llm), llm=llm, select_multi=True)
    assert str(router.query("Who are they?")) == "Anna Stone and Agnes Hill."
    assert len(engine.documents) == 2


@pytest.mark.parametrize("use_async", [False, True])
def test_sub_questions_go_to_their_engines_and_the_answers_are_joined(use_async: bool) -> None:
    questions = {"items": [{"sub_question": f"Who in {name}?", "tool_name": name} for name in TEXTS]}
    engine = FakeLLM(json.dumps(questions), "One.", "The other.", "Both.")
    llm = ZSMergeLLM(llm=engine)
    sub_questions = SubQuestionQueryEngine.from_defaults(
        engine_tools(llm),
        llm=llm,
        question_gen=LLMQuestionGenerator.from_defaults(llm=llm),
        use_async=use_async,
        verbose=False,
    )
    assert str(sub_questions.query("Who are they?")) == "Both."
    assert len(engine.documents) == 2
    assert "The other." in engine.requests[-1].prompt[-1]["content"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_citation_engine_numbers_its_sources(streaming: bool) -> None:
    engine = FakeLLM("It is Agnes Hill [2].")
    index = SummaryIndex.from_documents([Document(text=text) for text in TEXTS.values()])
    cited = CitationQueryEngine.from_args(index, llm=ZSMergeLLM(llm=engine), streaming=streaming)
    answer = cited.query("Who is the keeper?")
    assert str(answer) == "It is Agnes Hill [2]."
    assert [node.node.get_content().splitlines()[0] for node in answer.source_nodes] == ["Source 1:", "Source 2:"]
    assert "Source 2:" in engine.requests[0].prompt[-1]["content"]


async def test_an_agent_uses_a_query_engine_as_its_tool() -> None:
    engine = FakeLLM(called("ships", input="Who is the captain?"), "Anna Stone.", "It is Anna Stone.")
    llm = ZSMergeLLM(llm=engine)
    agent = FunctionAgent(tools=[*engine_tools(llm), FunctionTool.from_defaults(clock)], llm=llm)
    assert str(await agent.run("Who is the captain?")) == "It is Anna Stone."
    assert engine.requests[1].prompt[-1]["content"] == "Who is the captain?"
