"""Tools and tool choices of LangChain, as `tools` and `tool_choice` of zsmerge-llm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel

from zsmerge_llm import OutputType
from zsmerge_llm.errors import ConfigError, UnsupportedSchemaError

if TYPE_CHECKING:
    Tools = Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool]


def to_tools(tools: Tools, strict: bool | None = None) -> list[dict[str, Any]]:
    """Return tool definitions in the OpenAI format. `strict`: what each of them says; None: what it says itself.

    Raises:
        UnsupportedSchemaError: a tool that LangChain or pydantic has no schema for.
    """
    return [_with_strict(_to_tool(tool), strict) for tool in tools]


def _to_tool(tool: Any) -> dict[str, Any]:
    recursive = _recursive_schema(tool.tool_call_schema if isinstance(tool, BaseTool) else tool)
    if recursive is None:
        try:
            return convert_to_openai_tool(tool)
        except Exception as error:  # pydantic's and LangChain's own, of many kinds
            raise UnsupportedSchemaError(
                f"{getattr(tool, 'name', None) or getattr(tool, '__name__', tool)!r} cannot be offered as a tool: "
                f"{error} Give it arguments that JSON can hold."
            ) from error
    name, about = (
        (tool.name, tool.description) if isinstance(tool, BaseTool) else (recursive.name, recursive.description)
    )
    return {"type": "function", "function": {"name": name, "description": about, "parameters": recursive.schema}}


def _recursive_schema(arguments: Any) -> OutputType | None:
    """Return what a pydantic class with references asks for. LangChain's conversion cuts recursive classes off."""
    if not (isinstance(arguments, type) and issubclass(arguments, BaseModel)):
        return None
    found = OutputType.of_type(arguments)
    return found if _contains_itself(found.schema, found.schema.get("$defs", {}), ()) else None


def _contains_itself(schema: Any, definitions: Mapping[str, Any], entered: tuple[str, ...]) -> bool:
    if isinstance(schema, list):
        return any(_contains_itself(part, definitions, entered) for part in schema)
    if not isinstance(schema, dict):
        return False
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in entered:
            return True
        target = definitions.get(reference.removeprefix("#/$defs/"))
        if _contains_itself(target, definitions, (*entered, reference)):
            return True
    parts = [part for key, part in schema.items() if key != "$defs"]
    return any(_contains_itself(part, definitions, entered) for part in parts)


def _with_strict(tool: dict[str, Any], strict: bool | None) -> dict[str, Any]:
    return tool if strict is None else {**tool, "function": {**tool["function"], "strict": strict}}


def to_tool_choice(choice: Any, tools: Sequence[dict[str, Any]]) -> str | dict[str, Any] | None:
    """Return a tool choice in the OpenAI format, or None for no choice.

    Args:
        choice: None, "auto", "none", "any", "required", a bool (True: some tool), a tool's name, or a dict that names
            one in OpenAI's or Anthropic's format.

    Raises:
        ConfigError: any other choice.
    """
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, Mapping):
        function = choice.get("function")
        named = function.get("name") if isinstance(function, Mapping) else choice.get("name")
        choice = named or choice.get("type")
    if choice in names:
        return {"type": "function", "function": {"name": choice}}
    if choice is None or choice is False:
        return None
    if choice is True or choice in ("any", "required"):
        return "required"
    if choice in ("auto", "none"):
        return cast(str, choice)
    raise ConfigError(
        f"tool_choice={choice!r} is none of the tools ({', '.join(names) or 'none given'}): "
        "use 'auto', 'any', 'none' or a tool's name."
    )
