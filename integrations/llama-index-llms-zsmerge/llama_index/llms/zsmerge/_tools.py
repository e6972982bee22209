"""Conversion of LlamaIndex's tools and choices to the OpenAI format, and of tool calls to its `ToolSelection`s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from llama_index.core.base.llms.types import ChatResponse
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools import FunctionTool, ToolMetadata
from llama_index.llms.zsmerge._messages import arguments, tool_calls, with_id
from llama_index.llms.zsmerge._parsing import warn_shortened

from zsmerge_llm import OutputType
from zsmerge_llm.errors import InputError
from zsmerge_llm.types import ToolChoice

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool


def to_tool(tool: BaseTool) -> dict[str, Any]:
    """Return a tool's definition. LlamaIndex's `to_openai_tool` alters names, and then cannot find the tool."""
    metadata = tool.metadata
    function = {
        "name": metadata.get_name(),
        "description": metadata.description or "",
        "parameters": _parameters(tool),
    }
    return {"type": "function", "function": function}


def _parameters(tool: BaseTool) -> dict[str, Any]:
    """Return the schema of a tool's arguments. LlamaIndex leaves out `$ref` and `additionalProperties` of a class."""
    if tool.metadata.fn_schema is None:
        return tool.metadata.get_parameters_dict()
    schema = OutputType.of_type(tool.metadata.fn_schema).schema
    return schema if "$ref" in schema else tool.metadata.get_parameters_dict()


def callable_tools(tools: Sequence[BaseTool]) -> list[BaseTool]:
    """Return tools that LlamaIndex can call. It looks for `properties`, and a class that refers to itself has them
    behind a reference."""
    return [
        _ReferenceTool(tool)
        if isinstance(tool, FunctionTool) and "properties" not in tool.metadata.get_parameters_dict()
        else tool
        for tool in tools
    ]


class _ReferenceMetadata(ToolMetadata):
    def get_parameters_dict(self) -> dict[str, Any]:
        schema: dict[str, Any] = self.fn_schema.model_json_schema() if self.fn_schema is not None else {}
        target = schema.get("$defs", {}).get(schema.get("$ref", "").removeprefix("#/$defs/"), {})
        found = {key: target[key] for key in ("type", "properties", "required") if key in target}
        return {"properties": {}, **super().get_parameters_dict(), **found}


class _ReferenceTool(FunctionTool):
    """A tool with the parameters that its reference stands for."""

    def __init__(self, tool: FunctionTool) -> None:
        vars(self).update(vars(tool))

    @property
    def metadata(self) -> ToolMetadata:
        return _ReferenceMetadata(**vars(super().metadata))


def to_tool_choice(choice: str | Mapping[str, Any] | None) -> ToolChoice | None:
    """Convert None, "auto", "none", "required" (or "any"), a tool's name or a dictionary that holds one.

    Raises:
        InputError: a dictionary without a name.
    """
    if choice is None or choice == "auto" or choice == "none" or choice == "required":
        return cast("ToolChoice | None", choice)
    if choice == "any":
        return "required"
    named = choice.get("function", choice) if isinstance(choice, Mapping) else {"name": choice}
    name = named.get("name") if isinstance(named, Mapping) else None
    if not isinstance(name, str) or not name:
        form = "{'type': 'function', 'function': {'name': ...}}"
        raise InputError(f"tool_choice must be 'auto', 'required', 'none', a tool's name or {form}.")
    return {"type": "function", "function": {"name": name}}


def to_tool_selections(response: ChatResponse, error_on_no_tool_call: bool = True) -> list[ToolSelection]:
    """Return the calls of a response. Raises ValueError if there is none and `error_on_no_tool_call`.

    Of calls in an unfinished response, the arguments are those that have been written so far.
    """
    unfinished = isinstance(response.raw, dict) and response.raw.get("finish_reason", "") is None
    calls = [with_id(call) for call in tool_calls(response.message)]
    if not calls and error_on_no_tool_call:
        invalid = response.raw.get("invalid_tool_calls") if isinstance(response.raw, dict) else None
        answered = f"answered {response.message.content!r}"
        output = f"began a call that cannot be read: {invalid!r}" if invalid else answered
        raise ValueError(
            f"The model called no tool; it {output}. Pass tool_required=True to require a call, "
            "and raise max_tokens if the answer was cut."
        )
    if calls and isinstance(response.raw, dict) and response.raw.get("finish_reason") == "length":
        warn_shortened("call of " + ", ".join(call["function"]["name"] for call in calls))
    return [
        ToolSelection(tool_id=call["id"], tool_name=call["function"]["name"], tool_kwargs=arguments(call, unfinished))
        for call in calls
    ]
