"""Structured output: any schema or type as a response format or a tool, and a parser that lets nothing pass unseen."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from langchain_core.exceptions import OutputParserException
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage
from langchain_core.output_parsers import BaseCumulativeTransformOutputParser
from langchain_core.outputs import ChatGeneration, Generation
from langchain_core.prompt_values import PromptValue
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnableMap, RunnablePassthrough
from langchain_core.runnables.config import merge_configs
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.json import parse_partial_json
from typing_extensions import is_typeddict

from zsmerge_llm import OutputType
from zsmerge_llm.errors import ConfigError, InvalidOutputError, ShortenedOutputWarning, UnsupportedSchemaError

METHODS = ("json_schema", "function_calling", "json_mode")
FIRST_ATTEMPT, SECOND_ATTEMPT = RunnableConfig(tags=["nostream"]), RunnableConfig(tags=["retry:attempt:2"])
"""Configs of the runs where an invalid answer is asked for again, with the tags of LangGraph and LangChain."""
WRAPPED = "value"
"""The argument that holds a value which is no object: arguments of a tool are one."""


class StructuredOutputError(OutputParserException, InvalidOutputError):
    """An answer is not what its schema asks for: LangChain's error and ours. `llm_output` is the text."""


def output_type(schema: Any) -> tuple[OutputType, bool | None]:
    """Return what answers become, and whether the schema says of itself that it is strict.

    Args:
        schema: a type, a function or a tool; a JSON schema with any root; `{"name": ..., "schema": ..., "strict": ...}`
            or `{"type": "json_schema", "json_schema": ...}` as in OpenAI's format; a tool in a usual format.

    Raises:
        ConfigError: none of these. UnsupportedSchemaError: a type without a JSON schema.
    """
    if not isinstance(schema, Mapping):
        return _of_type(schema), None
    if schema.get("type") == "json_schema" and isinstance(schema.get("json_schema"), Mapping):
        schema = schema["json_schema"]
    if schema.get("type") == "function" and isinstance(schema.get("function"), Mapping):
        schema = schema["function"]
    if "toolSpec" in schema:
        spec = schema["toolSpec"]
        schema = {**spec, "parameters": (spec.get("inputSchema") or {}).get("json")}
    name, description, strict = (schema.get(key) for key in ("name", "description", "strict"))
    for key in ("schema", "parameters", "input_schema"):
        if isinstance(name, str) and isinstance(inner := schema.get(key), Mapping):
            return OutputType.of_schema(inner, name, description or ""), strict
    if isinstance(name, str) and not schema.keys() - {"name", "description", "strict", "parameters"}:
        return OutputType.of_schema({"type": "object", "properties": {}}, name, description or ""), strict
    return OutputType.of_schema(schema, name if isinstance(name, str) else ""), None


def _of_type(wanted: Any) -> OutputType:
    if isinstance(wanted, str | int | float | bytes | list | tuple | set | None):
        raise ConfigError(
            f"schema must be a pydantic class or another type, a JSON schema or a tool, not {wanted!r}: see "
            "with_structured_output."
        )
    if is_typeddict(wanted) or isinstance(wanted, BaseTool) or (callable(wanted) and _is_function(wanted)):
        try:
            made = convert_to_json_schema(wanted)
        except Exception as error:  # LangChain's conversion knows fewer types than pydantic
            if not is_typeddict(wanted):
                raise UnsupportedSchemaError(
                    f"{wanted!r} has no JSON schema: {error} Give a pydantic class."
                ) from error
            found = OutputType.of_type(wanted)
            return OutputType.of_schema(found.schema, found.name, found.description)
        return OutputType.of_schema(made)
    return OutputType.of_type(wanted)


def _is_function(wanted: Any) -> bool:
    return hasattr(wanted, "__code__") or hasattr(wanted, "__func__")


def structured_output(
    model: Runnable[Any, Any], schema: Any, method: str, include_raw: bool, strict: bool | None, retry: bool
) -> Runnable[Any, Any]:
    """Return `model` with answers that follow a schema, parsed. See `ChatZSMerge.with_structured_output`."""
    if method not in METHODS:
        raise ConfigError(f"method={method!r} is unknown: use one of {', '.join(METHODS)}.")
    if method == "json_mode" and strict is not None:
        raise ConfigError("strict needs a schema, which method='json_mode' does not enforce: use method='json_schema'.")
    wanted, own_strict = output_type(schema)
    strict = own_strict if strict is None else strict
    declared = {} if strict is None else {"strict": strict}
    shown = {"title": wanted.name, **wanted.schema} if isinstance(schema, Mapping) else schema
    metadata = {
        "ls_structured_output_format": {"kwargs": {"method": method, "strict": strict}, "schema": _traced(shown)}
    }
    if method == "function_calling":
        function = {"name": wanted.name, "description": wanted.description, "parameters": _parameters(wanted)}
        settings: dict[str, Any] = {
            "tools": [{"type": "function", "function": {**function, **declared}}],
            "tool_choice": wanted.name,
            "parallel_tool_calls": False,
        }
    elif method == "json_schema":
        described = {"name": wanted.name, "schema": wanted.schema, **declared}
        settings = {"response_format": {"type": "json_schema", "json_schema": described}}
    else:
        settings = {"response_format": {"type": "json_object"}}
    bound = model.bind(**settings, **metadata)
    parser = StructuredParser(wanted=wanted, from_call=method == "function_calling")
    if retry:
        bound = _with_retry(bound, parser)
    return _with_raw(bound, parser) if include_raw else bound | parser


def _traced(schema: Any) -> Any:
    """Return a schema as LangSmith's metadata takes it: a dict or a class that LangChain converts."""
    try:
        convert_to_openai_tool(schema)
    except Exception:  # its conversion knows fewer schemas: traces show the name alone
        return {"title": getattr(schema, "__name__", None) or "answer", "type": "object", "properties": {}}
    return schema


def _parameters(wanted: OutputType) -> dict[str, Any]:
    """Return the schema of a tool's arguments, which are an object."""
    if _is_object(wanted.schema):
        return wanted.schema
    schema = dict(wanted.schema)
    shared: dict[str, Any] = {key: schema.pop(key) for key in ("$defs", "definitions") if key in schema}
    return {"type": "object", "properties": {WRAPPED: schema}, "required": [WRAPPED], **shared}


def _is_object(schema: Mapping[str, Any]) -> bool:
    """Return whether values of a schema are objects whatever the model makes of it."""
    reference, target = schema.get("$ref"), schema
    if isinstance(reference, str) and reference.startswith("#/"):
        for key in reference[2:].split("/"):
            target = target.get(key, {}) if isinstance(target, Mapping) else {}
        return target is not schema and target.get("type") == "object"
    return schema.get("type") == "object"


class StructuredParser(BaseCumulativeTransformOutputParser[Any]):
    """Parse an answer or the arguments of its call. Streams yield what has been written so far.

    Raises:
        StructuredOutputError: the answer was cut, holds no call, or breaks its schema.
    """

    wanted: Any
    """An `OutputType`."""
    from_call: bool = False
    """Whether the value is the arguments of a tool call."""

    @property
    def _type(self) -> str:
        return "zsmerge-structured"

    def _diff(self, prev: Any, next: Any) -> Any:
        return next

    def parse(self, text: str) -> Any:
        return self._checked(text, None)

    def parse_result(self, result: list[Generation], *, partial: bool = False) -> Any:
        message = result[0].message if isinstance(result[0], ChatGeneration) else None
        if not isinstance(message, AIMessage):
            return self.parse(result[0].text)
        reason = message.response_metadata.get("finish_reason")
        if partial and reason is None and isinstance(message, AIMessageChunk):
            return self._growing(message)
        value = self._checked(self._text(message, reason), reason)
        if reason == "length":
            warnings.warn(
                f"This {self.wanted.name} is valid and incomplete: the answer was ended early to fit into its token "
                "limit (finish_reason 'length'). Raise max_tokens.",
                ShortenedOutputWarning,
                stacklevel=2,
            )
        return value

    def _text(self, message: AIMessage, reason: str | None) -> str:
        """Return the JSON of a finished answer."""
        if not self.from_call:
            return str(message.text)
        for call in message.tool_calls:
            if call["name"] == self.wanted.name:
                return json.dumps(self._unwrapped(call["args"]))
        begun = "".join(str(call["args"]) for call in message.invalid_tool_calls) or str(message.text)
        remedy = "Raise max_tokens." if reason == "length" else 'Use method="json_schema".'
        raise StructuredOutputError(
            f"The answer holds no complete call of {self.wanted.name} (finish_reason {reason!r}): {begun[:200]!r}. "
            f"{remedy}",
            llm_output=begun,
        )

    def _unwrapped(self, arguments: Any) -> Any:
        return arguments if _is_object(self.wanted.schema) else arguments.get(WRAPPED)

    def _checked(self, text: str, reason: str | None) -> Any:
        try:
            return self.wanted.parse(text, reason)
        except InvalidOutputError as error:
            raise StructuredOutputError(str(error), llm_output=text) from error

    def _growing(self, message: AIMessageChunk) -> Any:
        """Return what an unfinished answer holds: None until it is valid, or any JSON for a schema without a class."""
        if self.from_call:
            return None
        try:
            value = parse_partial_json(str(message.text))
            return self.wanted.partial(value)
        except (ValueError, TypeError, ArithmeticError, RecursionError):
            return None


def _with_retry(model: Runnable[Any, Any], parser: StructuredParser) -> Runnable[Any, Any]:
    """Return a model that answers once more, and is shown the error, where its answer breaks the schema.

    Callbacks get no tokens of a first answer, which may be discarded, and LangGraph streams nothing of it.
    """
    tentative = model.bind(stream=False)

    def again(given: LanguageModelInput, message: AIMessage) -> list[Any] | None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShortenedOutputWarning)
            try:
                parser.parse_result([ChatGeneration(message=message)])
            except StructuredOutputError as error:
                said = str(message.text) or str(error.llm_output)
                return [*_messages(given), AIMessage(said), HumanMessage(error.correction)]
        return None

    def invoke(given: LanguageModelInput, config: RunnableConfig) -> Any:
        message = tentative.invoke(given, merge_configs(config, FIRST_ATTEMPT))
        asked = again(given, message)
        return message if asked is None else model.invoke(asked, merge_configs(config, SECOND_ATTEMPT))

    async def ainvoke(given: LanguageModelInput, config: RunnableConfig) -> Any:
        message = await tentative.ainvoke(given, merge_configs(config, FIRST_ATTEMPT))
        asked = again(given, message)
        return message if asked is None else await model.ainvoke(asked, merge_configs(config, SECOND_ATTEMPT))

    return RunnableLambda(invoke, ainvoke)


def _messages(given: LanguageModelInput) -> list[Any]:
    if isinstance(given, str):
        return [HumanMessage(given)]
    return given.to_messages() if isinstance(given, PromptValue) else list(given)


def _with_raw(model: Runnable[Any, Any], parser: StructuredParser) -> Runnable[Any, Any]:
    """Return a runnable that gives a dict of `raw`, `parsed` and `parsing_error`."""
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=model) | parsed.with_fallbacks([failed], exception_key="parsing_error")
