"""Query and chat engines: whole documents in one prompt, conversations in whole."""

from __future__ import annotations

import socket

import pytest
from llama_index.core import Document, Settings, SummaryIndex, get_response_synthesizer
from llama_index.core.chat_engine import SimpleChatEngine
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import TextNode
from llama_index.llms.zsmerge import ZSMergeLLM

from zsmerge_llm.testing import FakeLLM

LINES = [f"Line {number} tells of the lighthouse keeper and the sea." for number in range(3800)]
DOCUMENT = "\n".join(LINES)


@pytest.fixture(autouse=True)
def offline(monkeypatch) -> None:
    """No connection is made: LlamaIndex counts tokens with the tiktoken files it ships."""

    def refuse(*args: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def own_tokenizer():
    """LlamaIndex counting by the model's tokenizer, for one test."""
    before = Settings._tokenizer
    engine = FakeLLM()
    Settings.tokenizer = ZSMergeLLM(llm=engine).tokenize
    yield
    import llama_index.core

    llama_index.core.global_tokenizer = None
    Settings._tokenizer = before


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "simple_summarize"])
def test_a_whole_document_goes_into_one_call(mode):
    assert len(DOCUMENT) > 200_000
    engine = FakeLLM("He kept the light.")
    index = SummaryIndex.from_documents([Document(text=DOCUMENT)])
    answer = index.as_query_engine(llm=ZSMergeLLM(llm=engine), response_mode=mode).query("What did he do?")
    assert str(answer) == "He kept the light."
    (call,) = engine.requests
    asked = call.prompt[-1]["content"]
    assert all(line in asked for line in LINES)


def test_the_default_query_engine_streams_a_whole_document():
    engine = FakeLLM("He kept the light.")
    index = SummaryIndex.from_documents([Document(text=DOCUMENT)])
    answer = index.as_query_engine(llm=ZSMergeLLM(llm=engine), streaming=True).query("What did he do?")
    assert "".join(answer.response_gen) == "He kept the light."
    assert len(engine.requests) == 1


async def test_an_async_query_is_one_call_too():
    engine = FakeLLM("He kept the light.")
    index = SummaryIndex.from_documents([Document(text=DOCUMENT)])
    answer = await index.as_query_engine(llm=ZSMergeLLM(llm=engine)).aquery("What did he do?")
    assert str(answer) == "He kept the light."
    assert len(engine.requests) == 1


@pytest.mark.usefixtures("own_tokenizer")
def test_llama_index_can_count_with_the_models_tokenizer():
    engine = FakeLLM("He kept the light.")
    index = SummaryIndex.from_documents([Document(text=DOCUMENT)])
    index.as_query_engine(llm=ZSMergeLLM(llm=engine)).query("What did he do?")
    assert len(engine.requests) == 1


def test_a_small_window_brings_back_the_refine_calls():
    engine = FakeLLM("He kept the light.")
    synthesizer = get_response_synthesizer(
        llm=ZSMergeLLM(llm=engine, context_window=8000, max_tokens=64), response_mode="compact"
    )
    synthesizer.get_response("What did he do?", [DOCUMENT])
    assert len(engine.requests) > 3


def test_a_synthesizer_takes_nodes_without_retrieval():
    engine = FakeLLM("He kept the light.")
    synthesizer = get_response_synthesizer(llm=ZSMergeLLM(llm=engine), response_mode="compact")
    texts = [node.text for node in (TextNode(text=line) for line in LINES[:50])]
    assert synthesizer.get_response("What did he do?", texts) == "He kept the light."
    assert len(engine.requests) == 1


async def test_predict_and_apredict_send_messages():
    engine = FakeLLM("Paris.")
    llm = ZSMergeLLM(llm=engine, system_prompt="Be brief.")
    prompt = PromptTemplate("Capital of {country}?")
    assert llm.predict(prompt, country="France") == await llm.apredict(prompt, country="France") == "Paris."
    assert "".join(llm.stream(prompt, country="France")) == "Paris."
    expected = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
    assert [call.prompt for call in engine.requests] == [expected] * 3


async def test_a_base_model_gets_the_prompt_as_text():
    engine = FakeLLM("Paris.")
    llm = ZSMergeLLM(llm=engine, is_chat_model=False)
    assert await llm.apredict(PromptTemplate("Capital of {country}?"), country="France") == "Paris."
    assert (engine.requests[0].method, engine.requests[0].prompt) == ("complete", "Capital of France?")


async def test_a_chat_engine_sends_the_conversation_so_far():
    engine = FakeLLM("Hello Ann.", "Your name is Ann.", "Bye.", "See you.")
    chat = SimpleChatEngine.from_defaults(llm=ZSMergeLLM(llm=engine, session="ann"), system_prompt="Be brief.")
    assert str(chat.chat("I am Ann.")) == "Hello Ann."
    assert "".join(chat.stream_chat("Who am I?").response_gen) == "Your name is Ann."
    assert str(await chat.achat("Bye.")) == "Bye."
    streamed = await chat.astream_chat("Bye again.")
    assert "".join([text async for text in streamed.async_response_gen()]) == "See you."
    assert [message["role"] for message in engine.requests[-1].prompt] == ["system"] + ["user", "assistant"] * 3 + [
        "user"
    ]
    assert engine.requests[-1].prompt[4]["content"] == "Your name is Ann."
    assert {call.session for call in engine.requests} == {"ann"}


def test_a_memory_made_for_the_model_keeps_long_conversations():
    memory = ChatMemoryBuffer.from_defaults(llm=ZSMergeLLM(llm=FakeLLM()))
    assert memory.token_limit >= 500_000
