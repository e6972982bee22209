"""LangChain features around a model: callbacks, caches, histories, configurable fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.chat_history import InMemoryChatMessageHistory
from langchain_core.globals import set_llm_cache
from langchain_core.messages import HumanMessage
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import ConfigurableField, RunnableWithMessageHistory
from langchain_zsmerge import ChatZSMerge, ZSMergeLLM

WHOLE = ["start", "end"]
STREAMED = ["start", "The ", "sky ", "is ", "blue.", "end"]


class Listener(BaseCallbackHandler):
    """Writes down what happens to a model."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        self.heard.append("start")

    def on_llm_start(self, *_: Any, **__: Any) -> None:
        self.heard.append("start")

    def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.heard += [token] if token else []

    def on_llm_end(self, *_: Any, **__: Any) -> None:
        self.heard.append("end")

    def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.heard.append(str(error))


class AsyncListener(AsyncCallbackHandler):
    """The same, asynchronously."""

    def __init__(self) -> None:
        self.told = Listener()

    async def on_chat_model_start(self, *_: Any, **__: Any) -> None:
        self.told.on_chat_model_start()

    async def on_llm_start(self, *_: Any, **__: Any) -> None:
        self.told.on_llm_start()

    async def on_llm_new_token(self, token: str, **_: Any) -> None:
        self.told.on_llm_new_token(token)

    async def on_llm_end(self, *_: Any, **__: Any) -> None:
        self.told.on_llm_end()

    async def on_llm_error(self, error: BaseException, **_: Any) -> None:
        self.told.on_llm_error(error)


class Broken:
    """A model that fails."""

    model = "broken"

    def stream(self, *_: Any, **__: Any) -> Iterator[Any]:
        raise RuntimeError("no luck")

    chat = complete = stream_complete = stream


@pytest.mark.parametrize("make", [ChatZSMerge, ZSMergeLLM])
def test_callbacks_get_the_start_each_token_and_the_end(make: Any, llm: Any) -> None:
    listener = Listener()
    make(llm=llm).invoke("hi", {"callbacks": [listener]})
    assert listener.heard == WHOLE
    listener = Listener()
    list(make(llm=llm).stream("hi", {"callbacks": [listener]}))
    assert listener.heard == STREAMED


@pytest.mark.parametrize("make", [ChatZSMerge, ZSMergeLLM])
async def test_async_callbacks_get_the_same_events(make: Any, llm: Any) -> None:
    listener = AsyncListener()
    await make(llm=llm).ainvoke("hi", {"callbacks": [listener]})
    assert listener.told.heard == WHOLE
    listener = AsyncListener()
    _ = [piece async for piece in make(llm=llm).astream("hi", {"callbacks": [listener]})]
    assert listener.told.heard == STREAMED


@pytest.mark.parametrize("make", [ChatZSMerge, ZSMergeLLM])
async def test_callbacks_get_errors(make: Any) -> None:
    model, listener = make(llm=Broken()), Listener()
    run: Any = {"callbacks": [listener]}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no luck"):
            model.invoke("hi", run)
        with pytest.raises(RuntimeError, match="no luck"):
            list(model.stream("hi", run))
        with pytest.raises(RuntimeError, match="no luck"):
            await model.ainvoke("hi", run)
    assert listener.heard == ["start", "no luck"] * 6


@pytest.fixture
def global_cache() -> Iterator[None]:
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.mark.parametrize("make", [ChatZSMerge, ZSMergeLLM])
async def test_the_global_answer_cache_serves_repeated_prompts(make: Any, llm: Any, global_cache: None) -> None:
    model = make(llm=llm)
    first = model.invoke("hi")
    again, later = model.invoke("hi"), await model.ainvoke("hi")
    assert len(llm.requests) == 1
    words = [answer if isinstance(answer, str) else answer.text for answer in (first, again, later)]
    assert words == ["The sky is blue."] * 3
    model.invoke("hi", stop=["sky"])  # another answer
    make(llm=llm, cache=False).invoke("hi")
    assert len(llm.requests) == 3


def test_the_answer_cache_distinguishes_response_formats(llm: Any, global_cache: None) -> None:
    chat = ChatZSMerge(llm=llm)
    for options in ({}, {"response_format": {"type": "json_object"}}, {"tools": [{"name": "f", "description": "F."}]}):
        chat.invoke("hi", **options)
        chat.invoke("hi", **options)
    assert len(llm.requests) == 3


async def test_a_chain_with_a_message_history_keeps_sessions_apart(llm: Any) -> None:
    kept: dict[str, InMemoryChatMessageHistory] = {}
    prompt = ChatPromptTemplate([("system", "Be brief."), MessagesPlaceholder("history"), ("user", "{question}")])
    talk = RunnableWithMessageHistory(
        prompt | ChatZSMerge(llm=llm),
        lambda name: kept.setdefault(name, InMemoryChatMessageHistory()),
        input_messages_key="question",
        history_messages_key="history",
    )
    for name in ("ann", "bob", "ann"):
        await talk.ainvoke({"question": f"I am {name}."}, {"configurable": {"session_id": name}})
    said = [message["content"] for message in llm.requests[-1].prompt]
    assert said == ["Be brief.", "I am ann.", "The sky is blue.", "I am ann."]
    assert [request.session for request in llm.requests] == ["ann", "bob", "ann"]
    assert [len(history.messages) for history in kept.values()] == [4, 2]


def test_configurable_fields_and_alternatives_change_one_call(llm: Any) -> None:
    model = ChatZSMerge(llm=llm, max_tokens=9).configurable_fields(
        temperature=ConfigurableField("heat"), max_tokens=ConfigurableField("length")
    )
    model.invoke("hi", {"configurable": {"heat": 0.9, "length": 3}})
    model.invoke("hi")
    heard = [(request.sampling.temperature, request.sampling.max_tokens) for request in llm.requests]
    assert heard == [(0.9, 3), (0.0, 9)]
    either = ChatZSMerge(llm=llm).configurable_alternatives(
        ConfigurableField("model"), default_key="first", second=ChatZSMerge(llm=llm, temperature=0.5)
    )
    either.invoke([HumanMessage("hi")], {"configurable": {"model": "second"}})
    assert llm.requests[-1].sampling.temperature == 0.5
