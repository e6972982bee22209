"""Structured prediction of classes that no grammar enforces in full, and of answers that were cut or shortened."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from decimal import Decimal
from importlib.metadata import version
from typing import Any

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.program.function_program import get_function_tool
from llama_index.core.prompts import PromptTemplate
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.zsmerge import ZSMergeDocumentQueryEngine, ZSMergeLLM
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


class Chain(BaseModel):
    rest: Chain | None = None


@pytest.mark.parametrize(
    ("wanted", "arguments"),
    [
        (Tree, {"value": True, "children": [{"value": False, "children": []}]}),
        pytest.param(
            *(Chain, {"rest": {"rest": None}}),
            marks=pytest.mark.skipif(
                tuple(map(int, version("llama-index-core").split(".")[:3])) < (0, 14, 25),
                reason="LlamaIndex before 0.14.25 calls a tool of one argument with what is in it",
            ),
        ),
    ],
)
async def test_a_recursive_class_is_predicted_by_a_call(wanted: type[BaseModel], arguments: dict[str, Any]) -> None:
    call = scripted_answer("", {"name": wanted.__name__, "arguments": arguments})
    llm = ZSMergeLLM(llm=FakeLLM(call), pydantic_program_mode=PydanticProgramMode.FUNCTION)
    expected = wanted.model_validate(arguments)
    assert llm.structured_predict(wanted, PROMPT) == expected
    assert await llm.astructured_predict(wanted, PROMPT) == expected
    assert list(llm.stream_structured_predict(wanted, PROMPT))[-1] == expected


INVALID, VALID = '{"rows": 1}', '{"rows": ["a", "b"]}'
MESSAGES = [ChatMessage(content="Make one.")]


async def test_a_stream_of_objects_begins_with_the_second_answer_where_the_first_is_invalid() -> None:
    for first in (INVALID, VALID):
        engine = FakeLLM()
        llm = ZSMergeLLM(llm=engine, retry_invalid=True)

        def answer_in_turn(engine: FakeLLM = engine, first: str = first) -> None:
            engine.answers = [first, VALID]

        answer_in_turn()
        streamed = list(llm.stream_structured_predict(Rows, PROMPT))
        answer_in_turn()
        astreamed = [each async for each in await llm.astream_structured_predict(Rows, PROMPT)]
        assert streamed[-1] == astreamed[-1] == Rows(rows=["a", "b"])
        assert len(engine.requests) == (4 if first == INVALID else 2)
        assert (len(streamed) > 1) == (len(astreamed) > 1) == (first == INVALID)


@pytest.mark.parametrize("method", ["chat", "achat", "stream_chat", "astream_chat", "complete", "astream_complete"])
async def test_a_structured_llm_asks_once_more_by_every_method(method: str) -> None:
    engine = FakeLLM(INVALID, VALID)
    llm = ZSMergeLLM(llm=engine, retry_invalid=True).as_structured_llm(Rows)
    made = getattr(llm, method)("Make one." if "complete" in method else MESSAGES)
    made = await made if method.startswith("a") else made
    if "stream" in method:
        made = [each async for each in made] if method.startswith("a") else list(made)
        assert "".join(each.delta for each in made) == VALID
        made = made[-1]
    assert made.raw == Rows(rows=["a", "b"])
    assert "valid Rows" in engine.requests[1].prompt[-1]["content"]


async def test_a_document_s_engine_asks_once_more() -> None:
    for answer in ("query", "aquery"):
        engine = FakeLLM(INVALID, VALID)
        llm = ZSMergeLLM(llm=engine, retry_invalid=True)
        made = getattr(ZSMergeDocumentQueryEngine(["A text."], llm, output_cls=Rows), answer)("Which rows?")
        made = await made if answer == "aquery" else made
        assert made.response == Rows(rows=["a", "b"])
        assert len({request.session for request in engine.requests}) == 1


async def test_an_invalid_answer_is_asked_for_once_more_with_its_error() -> None:
    for predict in ("structured_predict", "astructured_predict"):
        engine = FakeLLM('{"rows": 1}', '{"rows": ["a"]}')
        made = getattr(ZSMergeLLM(llm=engine, retry_invalid=True), predict)(Rows, PROMPT)
        assert (await made if predict.startswith("a") else made) == Rows(rows=["a"])
        assert "valid Rows" in engine.requests[1].prompt[-1]["content"]
