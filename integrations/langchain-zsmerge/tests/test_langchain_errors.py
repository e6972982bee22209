"""Errors are of LangChain's classes, too; its cache tells weights apart; wrong names show the nearest one."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core import exceptions
from langchain_core.caches import InMemoryCache
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_zsmerge import ChatZSMerge, ZSMergeDocuments, ZSMergeLLM

from zsmerge_llm import errors
from zsmerge_llm.testing import FakeLLM

CLASSES = [
    (errors.ContextLimitError, exceptions.ContextOverflowError),
    (errors.QueueFullError, exceptions.ModelRateLimitError),
    (errors.DeadlineExceededError, exceptions.ModelTimeoutError),
    (errors.ModelNotFoundError, exceptions.ModelNotFoundError),
    (errors.InputError, exceptions.ModelInvalidRequestError),
    (errors.UnsupportedContentError, exceptions.ModelInvalidRequestError),
    (errors.DeviceMemoryError, exceptions.ModelAPIError),
    (errors.ForkedProcessError, exceptions.ModelError),
    (errors.SessionCorruptError, exceptions.ModelError),
]


async def consume(stream: Any) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize(("own", "theirs"), CLASSES)
def test_an_error_is_of_our_class_and_of_langchains_however_the_model_is_called(own: Any, theirs: Any) -> None:
    fake = FakeLLM(error=own("why, and what to do"))
    for model in (ChatZSMerge(llm=fake), ZSMergeLLM(llm=fake)):
        calls: list[Callable[[Any], Any]] = [
            lambda model: model.invoke("x"),
            lambda model: list(model.stream("x")),
            lambda model: model.batch(["x", "y"]),
            lambda model: asyncio.run(model.ainvoke("x")),
            lambda model: asyncio.run(consume(model.astream("x"))),
        ]
        for call in calls:
            with pytest.raises(own, match="why, and what to do") as caught:
                call(model)
            assert isinstance(caught.value, theirs)
            again = pickle.loads(pickle.dumps(caught.value))
            assert isinstance(again, own)
            assert isinstance(again, theirs)
            assert str(again) == "why, and what to do"


def test_every_error_has_a_class_of_langchain() -> None:
    from langchain_zsmerge._errors import as_langchain

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and not issubclass(kind, Warning)]
    for kind in kinds:
        assert isinstance(as_langchain(kind("text")), (kind, exceptions.LangChainException))
        assert str(as_langchain(kind("text"))) == "text"


def test_a_fallback_for_long_prompts_runs() -> None:
    chat = ChatZSMerge(llm=FakeLLM(error=errors.ContextLimitError("too long")))
    shorter = RunnableLambda(lambda _: "summarized")
    chain = chat.with_fallbacks([shorter], exceptions_to_handle=(exceptions.ContextOverflowError,))

    assert chain.invoke("x") == "summarized"


def test_errors_of_other_methods_are_langchains_as_well() -> None:
    chat = ChatZSMerge(llm=FakeLLM())
    with pytest.raises(errors.ConfigError) as unknown:
        chat.bind_tools([], tool_choice="none of them")
    with pytest.raises(errors.ConfigError) as method:
        chat.with_structured_output({"title": "A", "type": "object"}, method="guess")  # type: ignore[arg-type]
    missing = ZSMergeDocuments(model=chat, documents=[Path("missing.txt")])
    with pytest.raises(errors.InputError) as unread:
        missing.invoke("x")
    for caught in (unknown, method, unread):
        assert isinstance(caught.value, exceptions.ModelInvalidRequestError)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("temperatur", "temperature"), ("max_token", "max_tokens"), ("session", "session_id"), ("grammer", "grammar")],
)
def test_a_wrong_option_of_a_call_shows_the_nearest_one(given: str, nearest: str) -> None:
    with pytest.raises(errors.ConfigError, match=rf"no option {given};.* Did you mean {nearest}\?"):
        ChatZSMerge(llm=FakeLLM()).invoke("x", **{given: 1})


@pytest.mark.parametrize("kind", [ChatZSMerge, ZSMergeLLM])
def test_the_cache_of_answers_belongs_to_the_weights(kind: Any) -> None:
    cache, answers = InMemoryCache(), []
    for fingerprint in ("one", "two", "one"):
        fake = FakeLLM(f"by {fingerprint}")
        fake.store = type(fake.store)(fingerprint)
        model = kind(llm=fake, cache=cache)
        answers += [model.invoke("x"), asyncio.run(model.ainvoke("x"))]
        assert len(fake.requests) == (len(answers) < 5)
    texts = [getattr(answer, "content", answer) for answer in answers]
    assert texts == ["by one", "by one", "by two", "by two", "by one", "by one"]


def test_the_cache_of_answers_is_not_asked_for_a_fingerprint_where_there_is_none() -> None:
    fake = FakeLLM()
    del fake.store
    assert ZSMergeLLM(llm=fake).invoke("x")
    assert ChatZSMerge(llm=fake).invoke([HumanMessage("x")]).content
