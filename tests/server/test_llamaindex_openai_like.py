"""LlamaIndex's OpenAILike against the server: what programs written for OpenAI's models do.

llama-index-llms-openai 0.8 needs an openai below 3, which would hold back the other tests. So these are skipped unless
it is installed. Annotations are no strings here: LlamaIndex reads the tool's types from them.
"""

from typing import Any, Literal

import pytest
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.zsmerge import WholeHistoryMemory
from pydantic import BaseModel

openai_like = pytest.importorskip("llama_index.llms.openai_like", reason="llama-index-llms-openai-like is optional")
OpenAILike, OpenAILikeResponses = openai_like.OpenAILike, openai_like.OpenAILikeResponses

ASK = [ChatMessage("Name a tree, please.")]
KINDS = pytest.mark.parametrize("kind", [OpenAILike, OpenAILikeResponses])


def weather(city: Literal["Oslo", "Rome"]) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


class Place(BaseModel):
    """A place."""

    kind: Literal["town", "village"]
    coastal: bool


def connect(address: str, kind: Any = OpenAILike, **settings: Any) -> Any:
    """Return a model of the server."""
    limit = "max_output_tokens" if kind is OpenAILikeResponses else "max_tokens"
    abilities = {"is_chat_model": True, "is_function_calling_model": True, "should_use_structured_outputs": True}
    settings = {limit: 12, "temperature": 0, "context_window": 100_000, "max_retries": 0, **abilities, **settings}
    return kind(model="tiny", api_base=f"{address}/v1", api_key="none", **settings)


@KINDS
async def test_a_conversation_is_answered_in_every_way(address: str, kind: Any) -> None:
    llm = connect(address, kind)
    texts = [llm.chat(ASK).message.content, (await llm.achat(ASK)).message.content]
    texts.append("".join(piece.delta or "" for piece in llm.stream_chat(ASK)))
    texts.append("".join([piece.delta or "" async for piece in await llm.astream_chat(ASK)]))
    assert texts[0]
    assert len(set(texts)) == 1


def test_a_text_is_continued(address: str) -> None:
    llm = connect(address, is_chat_model=False)
    whole = llm.complete("Once upon").text
    assert whole
    assert "".join(piece.delta or "" for piece in llm.stream_complete("Once upon")) == whole


def test_a_conversation_is_read_once(address: str) -> None:
    llm = connect(address)
    first = llm.chat(ASK)
    later = llm.chat([*ASK, first.message, ChatMessage("And a river?")])
    usage = later.raw.usage
    assert usage.prompt_tokens_details.cached_tokens > first.raw.usage.prompt_tokens


@KINDS
def test_a_required_tool_is_called(address: str, kind: Any) -> None:
    limit = {"max_output_tokens" if kind is OpenAILikeResponses else "max_tokens": 400}
    llm = connect(address, kind, **limit)
    tools = [FunctionTool.from_defaults(weather)]
    answer = llm.chat_with_tools(tools, user_msg="What is the weather?", tool_required=True)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert call.tool_name == "weather"
    assert call.tool_kwargs["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_agent_calls_a_tool_and_reads_its_result(address: str, streaming: bool) -> None:
    llm = connect(address, max_tokens=200)
    agent = FunctionAgent(tools=[weather], llm=llm, initial_tool_choice="weather", streaming=streaming)
    memory = WholeHistoryMemory.from_defaults()
    for text in ("What is the weather?", "And elsewhere?"):
        await agent.run(text, memory=memory)
    roles = [message.role.value for message in memory.get()]
    assert roles[:4] == ["user", "assistant", "tool", "assistant"]
    assert roles.count("user") == 2


def test_structured_output_is_of_the_class(address: str) -> None:
    llm = connect(address, max_tokens=400)
    assert isinstance(llm.structured_predict(Place, PromptTemplate("Describe a place.")), Place)
