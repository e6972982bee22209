"""Whole documents, read once for many questions, and conversations that are only appended to."""

from __future__ import annotations

import asyncio
import threading
import time
from itertools import pairwise
from typing import Any

import pytest
from llama_index.core import Document, SummaryIndex
from llama_index.core.base.response.schema import PydanticResponse
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.callbacks.schema import CBEventType
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.tools import QueryEngineTool
from llama_index.llms.zsmerge import (
    AppendingContextChatEngine,
    ZSMergeDocumentChatEngine,
    ZSMergeDocumentQueryEngine,
    ZSMergeLLM,
)
from pydantic import BaseModel

from zsmerge_llm import LLM
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.testing import FakeLLM

TEXT = "\n".join(f"On day {day} the keeper of the light saw {day + 3} ships on the sea." for day in range(30))
DOCUMENTS = [
    Document(text=TEXT, metadata={"title": "Log"}),
    Document(text="The keeper is Agnes {Hill}.", metadata={"title": "Note"}),
]
LONG = " ".join(map(str, range(1000)))


class Keeper(BaseModel):
    """A keeper."""

    name: str


def new_tokens(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens"] - usage["cached_tokens"]


def retriever(*texts: str) -> Any:
    """Finds the texts in turn: the first for the first message, and so on."""
    from llama_index.core.retrievers import BaseRetriever

    class Turns(BaseRetriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            text = left.pop(0)
            return [NodeWithScore(node=TextNode(text=text, id_=text[:20]), score=1.0)] if text else []

    left = list(texts)
    return Turns()


# -- the query engine ------------------------------------------------------------------------------------------------


async def test_a_document_is_read_once_for_many_questions(tiny: LLM) -> None:
    llm = ZSMergeLLM(llm=tiny, max_tokens=6)
    engine = ZSMergeDocumentQueryEngine(DOCUMENTS, llm)
    size = len(llm.tokenize(TEXT))
    answers = [engine.query("Who is the keeper?"), await engine.aquery("Which ships?"), engine.query("When?")]
    for answer in answers:
        assert answer.metadata["usage"]["cached_tokens"] >= size
        assert new_tokens(answer.metadata["usage"]) < 40
    again = engine.query("Who is the keeper?")
    assert str(again) == str(answers[0])


def test_questions_do_not_see_each_other(tiny: LLM) -> None:
    engine = ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=tiny, max_tokens=6))
    alone = ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=tiny, max_tokens=6))
    engine.query("Who is the keeper?")
    second = engine.query("Which ships?")
    assert second.metadata["usage"]["prompt_tokens"] < len(alone._llm.tokenize(TEXT)) + 120
    assert str(second) == str(alone.query("Which ships?"))


async def test_concurrent_questions_read_the_document_once() -> None:
    stand_in = FakeLLM(delay=0.005)
    engine = ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=stand_in))
    answers = await asyncio.gather(*(engine.aquery(f"Question {number}?") for number in range(8)))
    assert stand_in.documents_read == 1
    assert {str(answer) for answer in answers} == {"The sky is blue."}
    (name,) = stand_in.documents
    assert {call.session for call in stand_in.requests} == {name}
    assert "keeper is Agnes {Hill}." in stand_in.documents[name]
    assert "title: Note" in stand_in.documents[name]


def test_an_answer_has_its_sources_and_its_usage() -> None:
    answer = ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=FakeLLM())).query("Who?")
    assert [source.node.node_id for source in answer.source_nodes] == [each.node_id for each in DOCUMENTS]
    assert answer.metadata[DOCUMENTS[1].node_id] == {"title": "Note"}
    assert answer.metadata["usage"]["completion_tokens"] == 4
    assert "Agnes" in answer.get_formatted_sources()


async def test_a_streamed_answer_has_its_usage_at_the_end() -> None:
    engine = ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=FakeLLM()), streaming=True)
    answer = engine.query("Who?")
    assert "usage" not in answer.metadata or answer.metadata["usage"] is None
    assert list(answer.response_gen) == ["The ", "sky ", "is ", "blue.", ""]
    assert answer.metadata["usage"]["completion_tokens"] == 4
    streamed = await engine.aquery("Who?")
    assert "".join([piece async for piece in streamed.async_response_gen()]) == "The sky is blue."
    assert streamed.metadata["usage"]["completion_tokens"] == 4


async def test_closing_a_streamed_answer_stops_decoding(wait) -> None:
    engine = FakeLLM(LONG, delay=0.002)
    queries = ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=engine), streaming=True)
    pieces = queries.query("Who?").response_gen
    next(pieces)
    pieces.close()
    assert (engine.decoded_words, engine.closed_streams) == (1, 1)
    apieces = (await queries.aquery("Who?")).response_gen
    await anext(apieces)
    await apieces.aclose()
    made = engine.decoded_words
    await asyncio.to_thread(wait, lambda: engine.closed_streams == 2)
    assert engine.decoded_words <= made + 2


async def test_a_query_may_ask_for_an_object() -> None:
    engine = FakeLLM('{"name": "Agnes"}')
    queries = ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=engine), output_cls=Keeper)
    for answer in (queries.query("Who?"), await queries.aquery("Who?")):
        assert isinstance(answer, PydanticResponse)
        assert answer.response == Keeper(name="Agnes")
        assert answer.metadata["usage"]["completion_tokens"] == 2
    assert engine.requests[0].response_format["json_schema"]["name"] == "Keeper"
    assert engine.requests[0].prompt[-1]["content"] == "Who?"


def test_other_nodes_are_another_document() -> None:
    engine = FakeLLM()
    queries = ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=engine))
    queries.query("Who?")
    other = NodeWithScore(node=TextNode(text="Something else."))
    answer = queries.synthesize(QueryBundle("Who?"), [other], additional_source_nodes=queries.retrieve("Who?"))
    assert engine.documents_read == 2
    assert len(answer.source_nodes) == 3


def test_the_name_and_the_probe_reach_the_model() -> None:
    engine = FakeLLM()
    llm = ZSMergeLLM(llm=engine, system_prompt="Be brief.")
    ZSMergeDocumentQueryEngine(["A text."], llm, name="log", probe="names").query("Who?")
    assert (engine.documents, engine.document_probe) == ({"log": "A text."}, "names")
    assert [message["role"] for message in engine.requests[0].prompt] == ["system", "user"]


@pytest.mark.parametrize("engine_class", [ZSMergeDocumentQueryEngine, ZSMergeDocumentChatEngine])
def test_notes_are_asked_of_the_model(engine_class: Any) -> None:
    fake = FakeLLM()
    engine = engine_class(["A text."], ZSMergeLLM(llm=fake), notes="who arrives")
    (engine.query if engine_class is ZSMergeDocumentQueryEngine else engine.chat)("Who?")
    assert fake.document_notes == "who arrives"


def test_a_text_that_names_a_file_is_not_taken_for_the_file(tiny: LLM, tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "secret").write_text("The password is MARIGOLD. " * 50)
    monkeypatch.chdir(tmp_path)
    answer = ZSMergeDocumentQueryEngine(["secret"], ZSMergeLLM(llm=tiny, max_tokens=2)).query("Password?")
    assert answer.metadata["usage"]["prompt_tokens"] < 100


def test_a_query_engine_is_a_tool_of_an_agent() -> None:
    queries = ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=FakeLLM()))
    tool = QueryEngineTool.from_defaults(queries, name="log", description="The log.")
    assert str(tool(input="Who?")) == "The sky is blue."


def test_a_query_dispatches_callbacks_and_events(events) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llm = ZSMergeLLM(llm=FakeLLM(), callback_manager=CallbackManager([debug]))
    ZSMergeDocumentQueryEngine(DOCUMENTS, llm).query("Who?")
    for kind in (CBEventType.QUERY, CBEventType.SYNTHESIZE, CBEventType.LLM):
        assert len(debug.get_event_pairs(kind)) == 1
    expected = ["QueryStartEvent", "SynthesizeStartEvent", "LLMChatStartEvent", "LLMChatEndEvent"]
    assert events.names == [*expected, "SynthesizeEndEvent", "QueryEndEvent"]


@pytest.mark.parametrize("documents", [[], "a text", [3]])
def test_documents_must_be_a_list_of_documents(documents: Any) -> None:
    with pytest.raises(InputError, match="document"):
        ZSMergeDocumentQueryEngine(documents, ZSMergeLLM(llm=FakeLLM()))


def test_a_document_without_text_is_refused() -> None:
    with pytest.raises(InputError, match="no text"):
        ZSMergeDocumentQueryEngine([" "], ZSMergeLLM(llm=FakeLLM())).query("Who?")


def test_another_model_or_setting_is_refused() -> None:
    with pytest.raises(ConfigError, match="MockLLM"):
        ZSMergeDocumentQueryEngine(DOCUMENTS, MockLLM())
    with pytest.raises(ConfigError, match="chat template"):
        ZSMergeDocumentChatEngine(DOCUMENTS, ZSMergeLLM(llm=FakeLLM(), is_chat_model=False))
    with pytest.raises(ConfigError, match="streaming"):
        ZSMergeDocumentQueryEngine(DOCUMENTS, ZSMergeLLM(llm=FakeLLM()), output_cls=Keeper, streaming=True)
    with pytest.raises(ConfigError, match="not both"):
        ZSMergeDocumentChatEngine.from_defaults(
            DOCUMENTS, ZSMergeLLM(llm=FakeLLM()), system_prompt="a", prefix_messages=[]
        )


async def test_cancelling_a_query_stops_the_reading(tiny: LLM) -> None:
    engine = ZSMergeDocumentQueryEngine([LONG * 20], ZSMergeLLM(llm=tiny), name="log")
    task = asyncio.create_task(engine.aquery("Who?"))
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    end = time.monotonic() + 10
    while [thread for thread in threading.enumerate() if thread.name == "zsmerge-call"]:
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
    assert "log" not in tiny.store


# -- the document chat engine ----------------------------------------------------------------------------------------


async def test_each_turn_about_a_document_reads_its_own_tokens_only(tiny: LLM) -> None:
    llm = ZSMergeLLM(llm=tiny, max_tokens=6)
    chat = ZSMergeDocumentChatEngine.from_defaults(DOCUMENTS, llm, system_prompt="Be brief.")
    size, usages = len(llm.tokenize(TEXT)), []
    usages.append(chat.chat("Who is the keeper?").metadata["usage"])
    usages.append((await chat.achat("And the ships?")).metadata["usage"])
    streamed = chat.stream_chat("When was that?")
    assert "".join(streamed.response_gen).strip()
    usages.append(streamed.metadata["usage"])
    astreamed = await chat.astream_chat("Thank you.")
    assert "".join([piece async for piece in astreamed.async_response_gen()]).strip()
    usages.append(astreamed.metadata["usage"])
    assert usages[0]["cached_tokens"] >= size
    for before, after in pairwise(usages):
        assert after["cached_tokens"] >= before["prompt_tokens"]
        assert after["reuse"] == "continued"
        assert new_tokens(after) < 60
    assert [message.role for message in chat.chat_history] == ["user", "assistant"] * 4


async def test_reset_starts_a_new_conversation() -> None:
    engine = FakeLLM("One.", "Two.")
    chat = ZSMergeDocumentChatEngine.from_defaults(
        DOCUMENTS, ZSMergeLLM(llm=engine), chat_history=[ChatMessage("Hello."), ChatMessage("Hi.", role="assistant")]
    )
    answer = chat.chat("Who?")
    assert (str(answer), len(answer.source_nodes)) == ("One.", 2)
    assert [message["content"] for message in engine.requests[0].prompt] == ["Hello.", "Hi.", "Who?"]
    chat.reset()
    await chat.achat("Who?")
    assert [message["content"] for message in engine.requests[1].prompt] == ["Who?"]
    chat.chat("Where?", chat_history=[])
    assert [message["content"] for message in engine.requests[2].prompt] == ["Where?"]
    assert engine.documents_read == 1


async def test_a_closed_stream_stops_and_its_text_so_far_is_in_the_memory(wait) -> None:
    engine = FakeLLM(LONG, LONG, "Bye.", delay=0.002)
    chat = ZSMergeDocumentChatEngine(DOCUMENTS, ZSMergeLLM(llm=engine))
    for _ in chat.stream_chat("Count!").response_gen:
        break
    assert (engine.decoded_words, engine.closed_streams) == (1, 1)
    stream = (await chat.astream_chat("Again!")).async_response_gen()
    await anext(stream)
    await stream.aclose()
    made = engine.decoded_words
    await asyncio.to_thread(wait, lambda: engine.closed_streams == 2)
    assert engine.decoded_words <= made + 2
    assert [message.content.strip() for message in chat.chat_history] == ["Count!", "0", "Again!", "0"]
    assert str(chat.chat("Bye!")) == "Bye."


async def test_a_stream_that_fails_does_not_change_the_memory(events) -> None:
    engine = FakeLLM()
    chat = ZSMergeDocumentChatEngine(DOCUMENTS, ZSMergeLLM(llm=engine))
    engine.error = InputError("No.")
    with pytest.raises(InputError):
        list(chat.stream_chat("Who?").response_gen)
    with pytest.raises(InputError):
        _ = [piece async for piece in (await chat.astream_chat("Who?")).async_response_gen()]
    assert chat.chat_history == []
    assert events.names.count("StreamChatErrorEvent") == 2


def test_a_streamed_chat_dispatches_events(events) -> None:
    chat = ZSMergeDocumentChatEngine(DOCUMENTS, ZSMergeLLM(llm=FakeLLM()))
    chat.stream_chat("Who?").print_response_stream()
    names = [name for name in events.names if name.startswith("StreamChat")]
    assert names == ["StreamChatStartEvent", *["StreamChatDeltaReceivedEvent"] * 4, "StreamChatEndEvent"]


async def test_a_sync_stream_cannot_be_read_as_async_or_the_reverse() -> None:
    chat = ZSMergeDocumentChatEngine(DOCUMENTS, ZSMergeLLM(llm=FakeLLM()))
    with pytest.raises(ConfigError, match="response_gen"):
        _ = [piece async for piece in chat.stream_chat("Who?").async_response_gen()]
    with pytest.raises(ConfigError, match="async_response_gen"):
        list((await chat.astream_chat("Who?")).response_gen)


# -- context that is appended ----------------------------------------------------------------------------------------

CONTEXTS = [f"Part {part}. " + f"The ship number {part} is on the sea. " * 12 for part in range(4)]


def test_appended_context_is_read_once_and_the_stock_engine_reads_everything_again(tiny: LLM, events) -> None:
    llm = ZSMergeLLM(llm=tiny, max_tokens=6)
    ours = AppendingContextChatEngine.from_defaults(retriever(*CONTEXTS), llm, system_prompt="Be brief.")
    stock = ContextChatEngine.from_defaults(retriever(*CONTEXTS), llm=llm, system_prompt="Be brief.")
    question, part = "What is on the sea?", len(llm.tokenize(CONTEXTS[0]))
    for engine in (ours, stock):
        for _ in CONTEXTS:
            engine.chat(question)
    appended, rewritten = events.usages[:4], events.usages[4:]
    for before, after in pairwise(appended):
        assert after["reuse"] == "continued"
        assert after["cached_tokens"] >= before["prompt_tokens"]
        assert part < new_tokens(after) < part + 120
    for usage in rewritten[1:]:
        assert new_tokens(usage) > 0.9 * usage["prompt_tokens"]  # what is left is the beginning of the system message


async def test_the_four_chat_methods_append_the_context() -> None:
    engine = FakeLLM("One.", "Two.", "Three.", "Four.")
    llm = ZSMergeLLM(llm=engine)
    chat = AppendingContextChatEngine.from_defaults(retriever(*CONTEXTS), llm, system_prompt="Be brief.")
    answers = [chat.chat("a?"), await chat.achat("b?")]
    assert "".join(chat.stream_chat("c?").response_gen) == "Three."
    streamed = await chat.astream_chat("d?")
    assert "".join([piece async for piece in streamed.async_response_gen()]) == "Four."
    assert [str(answer) for answer in answers] == ["One.", "Two."]
    assert answers[0].sources[0].tool_name == "retriever"
    assert streamed.source_nodes[0].node.text == CONTEXTS[3]
    prompt = engine.requests[3].prompt
    assert [message["role"] for message in prompt] == ["system"] + ["user", "assistant"] * 3 + ["user"]
    assert prompt[0]["content"] == "Be brief."
    for number, (context, question) in enumerate(zip(CONTEXTS, "abcd", strict=True)):
        content = prompt[1 + 2 * number]["content"]
        assert context.strip() in content
        assert content.splitlines()[-1] == f"{question}?"
    assert engine.requests[0].prompt == prompt[:2]


def test_a_node_that_the_conversation_holds_is_not_appended_again() -> None:
    engine = FakeLLM()
    chat = AppendingContextChatEngine.from_defaults(
        retriever(CONTEXTS[0], CONTEXTS[0], "", CONTEXTS[0]), ZSMergeLLM(llm=engine)
    )
    for question in ("a?", "b?", "c?"):
        answer = chat.chat(question)
    assert [message["content"] for message in engine.requests[2].prompt[2::2]] == ["b?", "c?"]
    assert answer.source_nodes == []
    chat.reset()
    chat.chat("d?")
    assert CONTEXTS[0].strip() in engine.requests[3].prompt[0]["content"]


async def test_postprocessors_and_a_template_of_ones_own_are_used() -> None:
    from llama_index.core.postprocessor import SimilarityPostprocessor

    engine = FakeLLM()
    nothing = SimilarityPostprocessor(similarity_cutoff=2.0)
    chat = AppendingContextChatEngine.from_defaults(
        retriever(*CONTEXTS), ZSMergeLLM(llm=engine), node_postprocessors=[nothing]
    )
    chat.chat("a?")
    await chat.achat("b?")
    assert [message["content"] for message in engine.requests[1].prompt] == ["a?", "The sky is blue.", "b?"]
    chat = AppendingContextChatEngine.from_defaults(
        retriever("{query_str}"), ZSMergeLLM(llm=engine), context_template="<{context_str}> {query_str}"
    )
    chat.chat("c?")
    assert engine.requests[2].prompt[-1]["content"] == "<{query_str}> c?"


def test_an_index_feeds_the_appending_engine() -> None:
    engine = FakeLLM()
    index = SummaryIndex.from_documents(DOCUMENTS)
    AppendingContextChatEngine.from_defaults(index.as_retriever(), ZSMergeLLM(llm=engine)).chat("Who?")
    assert TEXT in engine.requests[0].prompt[0]["content"]
