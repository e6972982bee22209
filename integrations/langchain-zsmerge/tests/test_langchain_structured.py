"""`with_structured_output` in all its methods, on a fake model."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.exceptions import OutputParserException
from langchain_zsmerge import ChatZSMerge
from pydantic import BaseModel
from typing_extensions import TypedDict

from zsmerge_llm.errors import ConfigError
from zsmerge_llm.testing import scripted_answer


class Node(BaseModel):
    """A node of a tree."""

    name: str
    children: list[Node] = []


class Named(TypedDict):
    """Something with a name."""

    name: str


BARE = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TITLED = {"title": "Thing", "description": "It.", **BARE}
TOOL = {"name": "Thing", "description": "It.", "parameters": BARE}


@pytest.mark.parametrize(
    ("schema", "name"), [(Named, "Named"), (BARE, "answer"), (TITLED, "Thing"), (TOOL, "Thing"), (Node, "Node")]
)
def test_every_kind_of_schema_becomes_a_response_format(llm: Any, schema: Any, name: str) -> None:
    llm.answers = ['{"name": "it"}']
    result = ChatZSMerge(llm=llm).with_structured_output(schema).invoke("?")
    assert result == (Node(name="it") if schema is Node else {"name": "it"})
    wanted = llm.requests[0].response_format["json_schema"]
    assert wanted["name"] == name
    assert "name" in str(wanted["schema"])
    assert "strict" not in wanted


def test_a_recursive_class_keeps_its_references(llm: Any) -> None:
    llm.answers = ['{"name": "a", "children": [{"name": "b", "children": []}]}']
    result = ChatZSMerge(llm=llm).with_structured_output(Node, strict=True).invoke("?")
    assert result == Node(name="a", children=[Node(name="b")])
    wanted = llm.requests[0].response_format["json_schema"]
    assert wanted["strict"] is True
    assert "$defs" in wanted["schema"]


@pytest.mark.parametrize("schema", [Named, TITLED, TOOL, Node])
def test_function_calling_asks_for_one_call_of_the_schema(llm: Any, schema: Any) -> None:
    name = schema["name"] if schema is TOOL else getattr(schema, "__name__", "Thing")
    llm.answers = [scripted_answer("", {"name": name, "arguments": '{"name": "it"}'})]
    model = ChatZSMerge(llm=llm).with_structured_output(schema, method="function_calling")
    assert model.invoke("?") == (Node(name="it") if schema is Node else {"name": "it"})
    assert list(model.stream("?"))[-1] == model.invoke("?")
    assert llm.requests[0].tool_choice == {"type": "function", "function": {"name": name}}
    assert llm.requests[0].parallel_tool_calls is False


def test_json_mode_asks_for_json_alone(llm: Any) -> None:
    llm.answers = ['{"name": "it"}']
    assert ChatZSMerge(llm=llm).with_structured_output(Node, method="json_mode").invoke("?") == Node(name="it")
    assert llm.requests[0].response_format == {"type": "json_object"}


def test_output_that_breaks_the_schema_raises_or_is_a_parsing_error(llm: Any) -> None:
    llm.answers = ['{"nam']
    chat = ChatZSMerge(llm=llm)
    with pytest.raises(OutputParserException):
        chat.with_structured_output(Node).invoke("?")
    result = chat.with_structured_output(Node, include_raw=True, max_tokens=3).invoke("?")
    assert isinstance(result, dict)
    assert result["raw"].text == '{"nam'
    assert result["parsed"] is None
    assert isinstance(result["parsing_error"], OutputParserException)
    assert llm.requests[-1].sampling.max_tokens == 3


def test_unknown_methods_and_contradictions_are_refused(llm: Any) -> None:
    chat = ChatZSMerge(llm=llm)
    with pytest.raises(ConfigError, match="use one of json_schema, function_calling, json_mode"):
        chat.with_structured_output(Node, method="regex")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="json_schema"):
        chat.with_structured_output(Node, method="json_mode", strict=True)
