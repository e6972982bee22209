"""Keyword arguments of requests: visible in signatures, and refused by name where they are unknown."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from zsmerge_llm import LLM
from zsmerge_llm.generation.options import ChatOptions, CompletionOptions, RequestOptions

REQUESTS = {
    "chat": {"session", "probe", "reread", "tools", "progress", "cancel", "sampling"},
    "stream": {"session", "probe", "reread", "tools", "progress", "cancel", "sampling"},
    "batch": {"tools", "tool_choice", "parallel_tool_calls", "cancel", "sampling"},
    "complete": {"response_format", "grammar", "progress", "cancel", "sampling"},
    "stream_complete": {"response_format", "grammar", "progress", "cancel", "sampling"},
    "batch_complete": {"response_format", "grammar", "cancel", "sampling"},
}


@pytest.mark.parametrize("name", [*REQUESTS])
def test_signatures_list_the_keyword_arguments_with_their_defaults(name: str) -> None:
    parameters = inspect.signature(getattr(LLM, name)).parameters
    assert set(parameters) >= REQUESTS[name]
    keywords = [each for each in parameters.values() if each.kind is each.KEYWORD_ONLY]
    assert all(each.default is not each.empty and each.annotation is not each.empty for each in keywords)
    assert not any(each.kind is each.VAR_KEYWORD for each in parameters.values())


@pytest.mark.parametrize("name", [*REQUESTS])
def test_an_unknown_keyword_argument_is_refused_at_once_and_the_error_lists_the_known_ones(name: str) -> None:
    llm = LLM()
    message = r"max_tokens: known are sampling.*Write sampling=SamplingParams\(max_tokens=\.\.\.\)\.$"
    with pytest.raises(TypeError, match=message):
        getattr(llm, name)("Hello", max_tokens=3)
    assert not llm.loaded


def test_a_batch_takes_no_session() -> None:
    unknown: Any = {"session": "it"}
    with pytest.raises(TypeError, match="session"):
        LLM().batch(["Hello"], **unknown)


def test_request_options_hold_every_keyword_argument() -> None:
    names = {each.name for each in dataclasses.fields(RequestOptions)}
    assert names == set(ChatOptions.__annotations__) | set(CompletionOptions.__annotations__)
