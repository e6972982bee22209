"""Tools, tool choices and structured output of LangChain, as `tools` and `response_format` of zsmerge-llm."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, cast

from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass
from pydantic import BaseModel

from zsmerge_llm.errors import ConfigError

if TYPE_CHECKING:
    from langchain_core.output_parsers import BaseOutputParser
    from langchain_core.tools import BaseTool

    Tools = Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool]

METHODS = ("json_schema", "function_calling", "json_mode")


def to_tools(tools: Tools, strict: bool | None = None) -> list[dict[str, Any]]:
    """Return tool definitions in the OpenAI format."""
    return [convert_to_openai_tool(tool, strict=strict) for tool in tools]


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


def structured_output(
    model: Runnable[Any, Any], schema: dict[str, Any] | type, method: str, include_raw: bool, strict: bool | None
) -> Runnable[Any, Any]:
    """Return `model` with answers that follow a schema, parsed. See `ChatZSMerge.with_structured_output`."""
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}.")
    metadata = {"ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": schema}}
    if method == "function_calling":
        tool = convert_to_openai_tool(schema, strict=strict)
        name = tool["function"]["name"]
        settings = {"tools": [tool], "tool_choice": name, "parallel_tool_calls": False, **metadata}
        parser = _tool_parser(schema, name)
    elif method == "json_schema":
        settings = {"response_format": _response_format(schema, strict), **metadata}
        parser = _json_parser(schema)
    elif strict is not None:
        raise ConfigError("strict needs a schema, which method='json_mode' does not enforce: use method='json_schema'.")
    else:
        settings = {"response_format": {"type": "json_object"}, **metadata}
        parser = _json_parser(schema)
    bound = model.bind(**settings)
    return _with_raw(bound, parser) if include_raw else bound | parser


def _response_format(schema: dict[str, Any] | type, strict: bool | None) -> dict[str, Any]:
    """Return a response format. A pydantic class keeps its own schema, with its references."""
    if isinstance(schema, type) and issubclass(schema, BaseModel):
        named = {"name": schema.__name__, "schema": schema.model_json_schema()}
    elif isinstance(schema, dict) and "title" not in schema and ("properties" in schema or "$ref" in schema):
        named = {"name": "answer", "schema": schema}
    else:
        full = convert_to_json_schema(schema)
        named = {"name": full["title"], "schema": full}
    return {"type": "json_schema", "json_schema": named if strict is None else {**named, "strict": strict}}


def _json_parser(schema: dict[str, Any] | type) -> BaseOutputParser[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=schema)
    return JsonOutputParser()


def _tool_parser(schema: dict[str, Any] | type, name: str) -> BaseOutputParser[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _with_raw(model: Runnable[Any, Any], parser: BaseOutputParser[Any]) -> Runnable[Any, Any]:
    """Return a runnable that gives a dict of `raw`, `parsed` and `parsing_error`."""
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")
