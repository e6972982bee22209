"""What only a model that understands can show: Qwen2.5-Coder-0.5B behind tools, objects, agents and engines."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.agent.workflow import AgentWorkflow, ReActAgent
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.zsmerge import (
    AppendingContextChatEngine,
    ZSMergeDocumentChatEngine,
    ZSMergeDocumentQueryEngine,
    ZSMergeLLM,
)
from pydantic import BaseModel

from zsmerge_llm import LLM

pytestmark = pytest.mark.slow

LOG = "\n".join(
    [
        *(f"Day {day}: calm sea, {20 + day} miles." for day in range(12)),
        "The captain is Agnes Hill. The ship's cat is called Bishop.",
        *(f"Day {day}: light wind, {20 + day} miles." for day in range(12, 20)),
    ]
)
CAT, CAPTAIN = "What is the name of the ship's cat?", "Who is the captain?"


class Ship(BaseModel):
    """What a log says of a ship."""

    captain: str
    cat: str
    sea: Literal["calm", "rough"]


def weather(city: str) -> str:
    """The weather in a city."""
    return f"It is sunny in {city}, 21 degrees."


@pytest.fixture(scope="module")
def llm(qwen_coder: LLM) -> ZSMergeLLM:
    return ZSMergeLLM(llm=qwen_coder, max_tokens=48)


@pytest.fixture(scope="module")
def index() -> SummaryIndex:
    return SummaryIndex.from_documents([Document(text=LOG)])


def test_the_right_tool_is_chosen_with_the_right_arguments(llm: ZSMergeLLM) -> None:
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    tools = [FunctionTool.from_defaults(function) for function in (weather, add)]
    options = {"error_on_no_tool_call": False}  # the model may answer in words
    assert llm.predict_and_call(tools, user_msg="What is 17 plus 25?", **options).response == "42"
    assert "Zürich" in llm.predict_and_call(tools, user_msg="How is the weather in Zürich?", **options).response


async def test_predicted_objects_hold_what_the_text_says(llm: ZSMergeLLM) -> None:
    prompt = PromptTemplate("{log}\n\nDescribe the ship.")
    expected = Ship(captain="Agnes Hill", cat="Bishop", sea="calm")
    assert llm.structured_predict(Ship, prompt, log=LOG) == expected
    assert (await llm.as_structured_llm(Ship).acomplete(prompt.format(log=LOG))).raw == expected


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "simple_summarize"])
def test_a_query_engine_answers(llm: ZSMergeLLM, index: SummaryIndex, mode: str) -> None:
    assert "Bishop" in str(index.as_query_engine(llm=llm, response_mode=mode).query(CAT))


async def test_the_document_query_engine_reads_once_and_answers(llm: ZSMergeLLM) -> None:
    engine = ZSMergeDocumentQueryEngine([LOG], llm)
    answers = [engine.query(CAT), await engine.aquery(CAPTAIN)]
    assert ["Bishop" in str(answers[0]), "Hill" in str(answers[1])] == [True, True]
    assert all(answer.metadata["usage"]["cached_tokens"] >= len(llm.tokenize(LOG)) for answer in answers)
    found = ZSMergeDocumentQueryEngine([LOG], llm, output_cls=Ship).query("Describe the ship.").response
    assert (found.captain, found.cat) == ("Agnes Hill", "Bishop")


async def test_the_document_chat_engine_uses_the_conversation(llm: ZSMergeLLM) -> None:
    chat = ZSMergeDocumentChatEngine([LOG], llm)
    first = chat.chat(CAT)
    second = await chat.achat("And who is the captain?")
    assert ["Bishop" in str(first), "Hill" in str(second)] == [True, True]
    assert second.metadata["usage"]["cached_tokens"] >= first.metadata["usage"]["prompt_tokens"]


def test_the_appending_engine_answers_and_reads_only_what_is_new(llm: ZSMergeLLM, index: SummaryIndex) -> None:
    chat = AppendingContextChatEngine.from_defaults(index.as_retriever(), llm)
    answers = [chat.chat(question) for question in (CAT, CAPTAIN, "Thank you.")]
    assert ["Bishop" in str(answers[0]), "Hill" in str(answers[1])] == [True, True]
    for before, after in pairwise(answer.metadata["usage"] for answer in answers):
        assert after["cached_tokens"] >= before["prompt_tokens"]
        assert after["prompt_tokens"] - after["cached_tokens"] < 40


@pytest.mark.parametrize("kind", ["simple", "context", "condense_question", "condense_plus_context"])
async def test_the_stock_chat_engines_run(llm: ZSMergeLLM, index: SummaryIndex, kind: str) -> None:
    def made() -> Any:
        retriever = index.as_retriever()
        if kind == "simple":
            return SimpleChatEngine.from_defaults(llm=llm, system_prompt=LOG)
        if kind == "context":
            return ContextChatEngine.from_defaults(retriever, llm=llm)
        if kind == "condense_question":
            return CondenseQuestionChatEngine.from_defaults(index.as_query_engine(llm=llm), llm=llm)
        return CondensePlusContextChatEngine.from_defaults(retriever, llm=llm)

    chat = made()
    assert "Bishop" in str(chat.chat(CAT))
    assert str(await chat.achat(CAPTAIN))
    assert "".join(made().stream_chat(CAT).response_gen).strip()
    streamed = await made().astream_chat(CAT)
    assert "".join([piece async for piece in streamed.async_response_gen()]).strip()
    assert [message.role for message in chat.chat_history] == ["user", "assistant"] * 2


async def test_a_react_agent_uses_its_tool(qwen_coder: LLM) -> None:
    # without the stop string a model this small goes on and makes up what it observes
    llm = ZSMergeLLM(llm=qwen_coder, max_tokens=96, stop=["Observation:"])
    answer = await ReActAgent(tools=[weather], llm=llm).run("What is the weather in Paris?")
    assert "weather" in [call.tool_name for call in answer.tool_calls]


async def test_an_agent_workflow_answers_by_its_tool(llm: ZSMergeLLM) -> None:
    workflow = AgentWorkflow.from_tools_or_functions([weather], llm=llm, system_prompt="You are helpful.")
    answer = await workflow.run("What is the weather in Paris?")
    assert "21" in str(answer)
