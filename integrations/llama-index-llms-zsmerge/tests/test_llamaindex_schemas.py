"""Structured prediction of classes that no grammar enforces in full, and of answers that were cut or shortened."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from decimal import Decimal
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.zsmerge import ZSMergeLLM
from llama_index.llms.zsmerge._tools import to_tool
from pydantic import BaseModel, RootModel

from zsmerge_llm.errors import InvalidOutputError, ShortenedOutputWarning
from zsmerge_llm.testing import FakeLLM, scripted_answer

PROMPT = PromptTemplate("Make one.")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Lenient(BaseModel):
    tags: set[Colour]
    counts: dict[Colour, int]
    data: bytes
    price: Decimal


class Tree(BaseModel):
    value: bool
    children: list[Tree]


class Flags(RootModel[list[bool]]):
    pass


class Rows(BaseModel):
    rows: list[str]


def shortened(text: str, *calls: Any) -> Any:
    """Return an answer that its token limit ended."""
    return dataclasses.replace(scripted_answer(text, *calls), finish_reason="length")


@pytest.mark.parametrize("wanted", [Lenient, Tree, Flags])
def test_objects_have_their_class(tiny: Any, wanted: type[BaseModel]) -> None:
    llm = ZSMergeLLM(llm=tiny, max_tokens=160)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShortenedOutputWarning)
        assert type(llm.structured_predict(wanted, PROMPT)) is wanted
        assert type(list(llm.stream_structured_predict(wanted, PROMPT))[-1]) is wanted
        assert type(llm.as_structured_llm(wanted).chat([ChatMessage(content="?")]).raw) is wanted


def test_a_recursive_class_keeps_its_references_as_a_tool() -> None:
    parameters = to_tool(get_function_tool(Tree))["function"]["parameters"]
    assert parameters["$ref"] == "#/$defs/Tree"
    assert "children" in parameters["$defs"]["Tree"]["properties"]


def test_a_shortened_object_warns_and_shows_its_finish_reason() -> None:
    llm = ZSMergeLLM(llm=FakeLLM(shortened('{"rows": []}')))
    with pytest.warns(ShortenedOutputWarning, match="finish_reason 'length'"):
        assert llm.structured_predict(Rows, PROMPT) == Rows(rows=[])
    with pytest.warns(ShortenedOutputWarning):
        response = llm.as_structured_llm(Rows).chat([ChatMessage(content="?")])
    assert response.additional_kwargs["finish_reason"] == "length"
    call = {"name": "Rows", "arguments": '{"rows": []}'}
    llm = ZSMergeLLM(llm=FakeLLM(shortened("", call)), pydantic_program_mode=PydanticProgramMode.FUNCTION)
    with pytest.warns(ShortenedOutputWarning):
        llm.structured_predict(Rows, PROMPT)


@pytest.mark.parametrize("mode", [PydanticProgramMode.DEFAULT, PydanticProgramMode.FUNCTION])
def test_a_cut_answer_is_an_error_of_ours(mode: PydanticProgramMode) -> None:
    llm = ZSMergeLLM(llm=FakeLLM(shortened('{"rows": ["a')), pydantic_program_mode=mode)
    with pytest.raises(InvalidOutputError, match="max_tokens"):
        llm.structured_predict(Rows, PROMPT)


async def test_an_invalid_answer_is_asked_for_once_more_with_its_error() -> None:
    for predict in ("structured_predict", "astructured_predict"):
        engine = FakeLLM('{"rows": 1}', '{"rows": ["a"]}')
        made = getattr(ZSMergeLLM(llm=engine, retry_invalid=True), predict)(Rows, PROMPT)
        assert (await made if predict.startswith("a") else made) == Rows(rows=["a"])
        assert "valid Rows" in engine.requests[1].prompt[-1]["content"]
