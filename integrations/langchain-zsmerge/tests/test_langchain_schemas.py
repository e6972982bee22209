"""`with_structured_output` with every form of schema, on a tiny random model and on scripted answers."""

from __future__ import annotations

import dataclasses
import enum
import warnings
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.exceptions import OutputParserException
from langchain_zsmerge import ChatZSMerge
from langgraph.graph import START, StateGraph
from pydantic import BaseModel
from pydantic.v1 import BaseModel as BaseModelV1

from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.errors import ConfigError, InvalidOutputError, ShortenedOutputWarning, UnsupportedSchemaError
from zsmerge_llm.testing import scripted_answer, tiny_model

X = {"type": "object", "properties": {"x": {"type": "integer", "maximum": 9}}, "required": ["x"]}
LOOK_AHEAD = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"
ROOTS: dict[str, Any] = {
    "a reference": {"title": "Answer", "description": "d", "$ref": "#/$defs/A", "$defs": {"A": X}},
    "anyOf": {"title": "Answer", "anyOf": [X, X]},
    "allOf": {"title": "Answer", "allOf": [X]},
    "oneOf": {"title": "Answer", "oneOf": [X]},
    "name, schema and strict": {"name": "answer", "schema": X, "strict": True},
    "a response format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": X}},
    "a tool": {"type": "function", "function": {"name": "answer", "parameters": X}},
    "a named schema": {"name": "answer", **X},
}


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


class Old(BaseModelV1):
    ready: bool


@dataclasses.dataclass
class Point:
    up: bool


@pytest.fixture(scope="module")
def chat() -> ChatZSMerge:
    model, tokenizer = tiny_model()
    return ChatZSMerge(llm=LLM(model, tokenizer=tokenizer, cache=CacheConfig(slots=8192)), max_tokens=80)


def shortened(text: str) -> Any:
    """Return an answer that its token limit ended."""
    return dataclasses.replace(scripted_answer(text), finish_reason="length")


def answer(chat: ChatZSMerge, schema: Any, method: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShortenedOutputWarning)
        return chat.with_structured_output(schema, method=method, **options).invoke("Make one.")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("root", ROOTS)
def test_a_schema_is_enforced_whatever_its_root(chat: ChatZSMerge, root: str, method: str) -> None:
    assert isinstance(answer(chat, ROOTS[root], method)["x"], int)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        ({"title": "L", "type": "array", "items": {"type": "boolean"}, "maxItems": 3}, list),
        ({"title": "S", "enum": ["red", "blue"]}, str),
        ({"type": "object", "patternProperties": {"^x$": {"type": "boolean"}}, "additionalProperties": False}, dict),
        (list[bool], list),
        (Colour, Colour),
        (Lenient, Lenient),
        (Tree, Tree),
        (Old, Old),
        (Point, Point),
    ],
)
def test_values_have_the_wanted_type(chat: ChatZSMerge, schema: Any, kind: type, method: str) -> None:
    made = answer(chat, schema, method, max_tokens=160)
    assert type(made) is kind


def test_a_keyword_that_cannot_be_enforced_is_refused_when_strict_and_checked_otherwise(llm: Any) -> None:
    schema = {"title": "P", "type": "object", "properties": {"n": {"type": "string", "pattern": LOOK_AHEAD}}}
    llm.answers = ['{"n": "+"}']
    with pytest.raises(OutputParserException, match="does not match"):
        ChatZSMerge(llm=llm).with_structured_output(schema).invoke("?")
    llm.answers = ['{"n": "+12.5"}']
    assert ChatZSMerge(llm=llm).with_structured_output(schema).invoke("?") == {"n": "+12.5"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_a_strict_schema_names_the_keyword_that_cannot_be_enforced(chat: ChatZSMerge, method: str) -> None:
    with pytest.raises(UnsupportedSchemaError, match=r"uniqueItems.*strict=False"):
        answer(chat, Lenient, method, strict=True)


def test_one_tool_with_such_a_pattern_does_not_take_down_the_others(chat: ChatZSMerge) -> None:
    odd = {"type": "object", "properties": {"n": {"type": "string", "pattern": LOOK_AHEAD}}, "required": ["n"]}
    tools = [{"name": "odd", "parameters": odd}, {"name": "plain", "parameters": X}]
    message = chat.bind_tools(tools, tool_choice="plain").invoke("Call it.")
    assert message.tool_calls[0]["name"] == "plain"
    with pytest.raises(UnsupportedSchemaError, match=r"'odd'.*pattern"):
        chat.bind_tools(tools, strict=True).invoke("Call it.")


def test_a_cut_answer_is_an_error_and_a_shortened_one_a_warning(llm: Any) -> None:
    class Rows(BaseModel):
        rows: list[str]

    chat = ChatZSMerge(llm=llm)
    llm.answers = [shortened('{"rows": []}')]
    with pytest.warns(ShortenedOutputWarning, match="finish_reason 'length'"):
        chat.with_structured_output(Rows).invoke("?")
    with pytest.warns(ShortenedOutputWarning):
        raw = chat.with_structured_output(Rows, include_raw=True).invoke("?")
    assert raw["raw"].response_metadata["finish_reason"] == "length"
    llm.answers = [shortened('{"rows": ["a')]
    for run in (lambda model: model.invoke("?"), lambda model: list(model.stream("?"))):
        with pytest.raises(InvalidOutputError, match="raise max_tokens"):
            run(chat.with_structured_output(Rows))
    with pytest.raises(OutputParserException, match="no complete call"):
        chat.with_structured_output(Rows, method="function_calling").invoke("?")


def test_an_invalid_answer_is_asked_for_once_more_with_its_error(llm: Any) -> None:
    llm.answers = ['{"value": "maybe", "children": []}', '{"value": true, "children": []}']
    made = ChatZSMerge(llm=llm, retry_invalid=True).with_structured_output(Tree).invoke("?")
    assert made == Tree(value=True, children=[])
    said, question = llm.requests[1].prompt[-2:]
    assert (said["role"], "valid Tree" in question["content"]) == ("assistant", True)


def test_callbacks_and_graphs_get_no_tokens_of_an_answer_that_is_discarded(llm: Any) -> None:
    wrong, right = '{"value": "maybe", "children": []}', '{"value": true, "children": []}'

    class Tokens(BaseCallbackHandler):
        text = ""

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.text += token

    tokens = Tokens()
    model = ChatZSMerge(llm=llm, streaming=True, retry_invalid=True).with_structured_output(Tree)
    llm.answers = [scripted_answer(wrong, reasoning="Hm."), right]
    assert model.invoke("?", {"callbacks": [tokens]}) == Tree(value=True, children=[])
    assert tokens.text == right

    graph = StateGraph(dict)
    graph.add_node("ask", lambda state: {"made": model.invoke("?")})
    graph.add_edge(START, "ask")
    llm.answers = [scripted_answer(wrong, reasoning="Hm."), right]
    pieces = [message for message, _ in graph.compile().stream({}, stream_mode="messages")]
    assert "".join(message.text for message in pieces) == right
    assert not any(message.additional_kwargs.get("reasoning_content") for message in pieces)


def test_what_is_no_schema_is_refused_by_name(chat: ChatZSMerge) -> None:
    class Odd(BaseModel):
        run: Callable[[], int]

    with pytest.raises(UnsupportedSchemaError, match="no JSON schema"):
        chat.with_structured_output(Odd)
    with pytest.raises(ConfigError, match="schema must be"):
        chat.with_structured_output("Odd")
    with pytest.raises(ValueError, match="no finite value"):
        answer(chat, {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]}, "json_schema")
