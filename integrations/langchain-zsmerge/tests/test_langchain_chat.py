"""Answers, streams and sessions of `ChatZSMerge`."""

from __future__ import annotations

import time
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.messages import AIMessageChunk, HumanMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from langchain_core.runnables.history import RunnableWithMessageHistory
from langchain_zsmerge import ChatZSMerge

from zsmerge_llm.errors import ConfigError


def test_an_answer_has_text_usage_and_metadata(chat: ChatZSMerge) -> None:
    answer = chat.invoke("Why?")
    assert answer.text == "The sky is blue."
    assert answer.usage_metadata == {
        "input_tokens": 7,
        "output_tokens": 4,
        "total_tokens": 11,
        "input_token_details": {"cache_read": 5},
    }
    assert answer.response_metadata["model_name"] == "fake"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["token_usage"]["cache_bytes"] == 1024


def test_settings_of_the_object_and_of_the_call_reach_the_model(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm, temperature=0.7, top_k=5, seed=3, stop=["END"])
    chat.bind(top_k=9).invoke("hi", stop=["\n", "END"], max_tokens=8)
    sampling = llm.requests[0].sampling
    assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.max_tokens) == (0.7, 9, 3, 8)
    assert sampling.stop == ("END", "\n")


def test_an_unknown_option_of_a_call_is_refused(chat: ChatZSMerge) -> None:
    with pytest.raises(ConfigError, match="no option logit_bias"):
        chat.invoke("hi", logit_bias={})
    with pytest.raises(ConfigError, match="temperature must lie"):
        chat.invoke("hi", temperature=-2)


def test_a_call_may_name_another_model_unless_the_model_was_given(chat: ChatZSMerge, llm: Any) -> None:
    assert chat.invoke("hi", model="fake").text
    with pytest.raises(ConfigError, match=r"ChatZSMerge\(model='gpt'\)"):
        chat.invoke("hi", model="gpt")
    own = ChatZSMerge(model="smollm2", temperature=0)
    other = own._request(None, {"model": "other"})
    assert (other.model, other.llm.model) == ("other", "other")
    assert other.llm is ChatZSMerge(model="other").core
    assert own._request(None, {}).llm is own.core


def test_a_chain_of_prompt_model_and_parser_streams(chat: ChatZSMerge, llm: Any) -> None:
    chain = ChatPromptTemplate.from_messages([("system", "be {how}"), ("human", "{q}")]) | chat | StrOutputParser()
    assert [piece for piece in chain.stream({"how": "brief", "q": "why?"}) if piece] == ["The ", "sky ", "is ", "blue."]
    assert llm.requests[0].prompt == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "why?"},
    ]


def test_streamed_chunks_add_up_to_the_answer(chat: ChatZSMerge) -> None:
    chunks = list(chat.stream("Why?"))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    assert isinstance(whole, AIMessageChunk)
    assert whole.text == "The sky is blue."
    assert whole.response_metadata == chat.invoke("Why?").response_metadata
    assert whole.usage_metadata == chat.invoke("Why?").usage_metadata
    assert [chunk.chunk_position for chunk in chunks].count("last") == 1


def test_breaking_out_of_a_stream_stops_decoding(slow_llm: Any) -> None:
    for _ in ChatZSMerge(llm=slow_llm).stream("hi"):
        break
    assert slow_llm.decoded_words == 1
    assert slow_llm.closed_streams == 1


def test_a_time_limit_stops_the_answer(slow_llm: Any) -> None:
    chat = ChatZSMerge(llm=slow_llm, timeout=0.1)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"timeout=0\.1 s"):
        chat.invoke("hi")
    with pytest.raises(TimeoutError):
        list(chat.stream("hi"))
    assert time.monotonic() - started < 1.0
    assert ChatZSMerge(llm=slow_llm, timeout=30).invoke("hi", max_tokens=1).text == "word "


def test_a_token_callback_sees_each_token(llm: Any) -> None:
    tokens: list[str] = []

    class Listener(BaseCallbackHandler):
        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            tokens.append(token)

    ChatZSMerge(llm=llm, streaming=True).invoke("hi", config={"callbacks": [Listener()]})
    assert "".join(tokens) == "The sky is blue."


def test_langchains_cache_serves_the_same_question_in_any_session(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm, cache=InMemoryCache())
    chat.invoke("hi", session_id="a")
    chat.invoke("hi", session_id="b")
    assert len(llm.requests) == 1
    chat.invoke("hi", temperature=0.5)
    assert len(llm.requests) == 2


def test_content_version_v1_round_trips(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm, output_version="v1")
    answer = chat.invoke("hi")
    assert answer.content == [{"type": "text", "text": "The sky is blue."}]
    chat.invoke([HumanMessage("hi"), answer, HumanMessage("and?")])
    assert llm.requests[1].prompt[1]["content"] == [{"type": "text", "text": "The sky is blue."}]


def test_reread_is_an_option_of_a_call(chat: ChatZSMerge, llm: Any) -> None:
    chat.invoke("hi")
    chat.bind(reread=True).invoke("hi")
    assert [request.reread for request in llm.requests] == [False, True]


@pytest.mark.parametrize("config", [{"session_id": "ann"}, {"thread_id": "ann"}])
def test_a_config_names_the_session_in_every_sync_method(chat: ChatZSMerge, llm: Any, config: Any) -> None:
    run = {"configurable": config}
    chat.invoke("hi", config=run)
    list(chat.stream("hi", config=run))
    chat.batch(["hi", "ho"], config=run)
    (chat | StrOutputParser()).invoke("hi", config=run)
    list((chat | StrOutputParser()).stream("hi", config=run))
    assert [request.session for request in llm.requests] == ["ann"] * 6


async def test_a_config_names_the_session_in_every_async_method(chat: ChatZSMerge, llm: Any) -> None:
    run: Any = {"configurable": {"thread_id": 7}}
    await chat.ainvoke("hi", config=run)
    _ = [chunk async for chunk in chat.astream("hi", config=run)]
    await chat.abatch(["hi", "ho"], config=run)
    _ = [event async for event in chat.astream_events("hi", config=run, version="v2")]
    assert [request.session for request in llm.requests] == ["7"] * 5


def test_a_model_called_inside_a_runnable_finds_the_session_of_the_run(chat: ChatZSMerge, llm: Any) -> None:
    step = RunnableLambda(lambda question: chat.invoke(question).text)
    step.invoke("hi", config={"configurable": {"thread_id": "ann"}})
    assert llm.requests[0].session == "ann"


def test_a_session_of_the_call_or_binding_overrides_the_config(chat: ChatZSMerge, llm: Any) -> None:
    run: Any = {"configurable": {"session_id": "config"}}
    chat.invoke("hi", config=run, session_id="call")
    chat.bind(session_id="bound").invoke("hi", config=run)
    chat.invoke("hi")
    assert [request.session for request in llm.requests] == ["call", "bound", None]


def test_a_message_history_keeps_the_session(chat: ChatZSMerge, llm: Any) -> None:
    histories: dict[str, InMemoryChatMessageHistory] = {}
    talk = RunnableWithMessageHistory(chat, lambda name: histories.setdefault(name, InMemoryChatMessageHistory()))
    for question in ("one", "two"):
        talk.invoke([HumanMessage(question)], config={"configurable": {"session_id": "ann"}})
    assert llm.requests[1].session == "ann"
    assert [message["role"] for message in llm.requests[1].prompt] == ["user", "assistant", "user"]


def test_warming_up_loads_before_the_first_call(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm)
    assert chat.warm_up() is chat
    assert llm.is_warm
