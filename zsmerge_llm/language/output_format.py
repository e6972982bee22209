"""From a request's tools and response format to what its answer must look like: grammar, instruction and parsers.

With `tool_choice="auto"` the model may answer in text. Once it begins a call, in its family's style or in another known
one, it can only complete it, with arguments that are valid under the tool's schema.

After a tool result it may call again, and small models never stop. So an answer that only repeats calls of this turn is
discarded and generated again without calls (`OutputFormat.fallback`). The same holds, after `MAX_UNMARKED_CALLS` calls,
for one without the family's markers: only small models leave them out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import ConfigError, InputError, shown
from zsmerge_llm.language.chat_template import ChatTemplate, validate_tools
from zsmerge_llm.language.grammar import Constraint, Grammar, GrammarCompiler, json_rule
from zsmerge_llm.language.harmony import HarmonyGrammar, HarmonyParser
from zsmerge_llm.language.json_schema import schema_text, validation_error, value_error
from zsmerge_llm.language.message_forms import CALL_TAG, RESULT_TAG, TOOL_INSTRUCTIONS
from zsmerge_llm.language.prompt_echo import NOTHING_ADDED, AddedTexts, EchoFilter
from zsmerge_llm.language.reasoning import ReasoningConstraint, ReasoningParser
from zsmerge_llm.language.reasoning_tags import (
    HARMONY,
    THINK,
    ReasoningMode,
    ReasoningTags,
    added_token_id,
    control_tokens_of,
    reasoning_mode,
    reasoning_tags,
)
from zsmerge_llm.language.schema_checks import check_schema, check_strict
from zsmerge_llm.language.tool_call_stream import RedundancyGate, canonical_call
from zsmerge_llm.language.tool_calls import HARMONY_CALLS, HERMES, ParsedAnswer, ToolCallParser, tool_call_style
from zsmerge_llm.language.tool_grammar import NO_CALL_OBJECT, ToolGrammar, with_other_first_word
from zsmerge_llm.types import Message, ResponseFormat, ToolChoice

JSON_INSTRUCTION = "Answer with a JSON object and nothing else."
SCHEMA_INSTRUCTION = "Answer with JSON that follows this schema, and nothing else:\n"
FIRST_RESULT_INSTRUCTION = "Answer the question in a full sentence, or make the next call if one is still needed."
"""Follows a tool's first result in a turn, for families with markers. Without it small models repeat the call."""
LATER_RESULT_INSTRUCTION = (
    "Now answer the question in a full sentence, from the results, unless another call is needed first."
)
"""Follows the later results. It makes another call less likely: small models never stop calling."""
MAX_UNMARKED_CALLS = 2
"""Calls of one turn after which further ones need the family's marker."""
MAX_ECHOES = 3
"""Attempts at one answer that may begin by repeating what was added to the prompt."""


@dataclass(frozen=True)
class OutputFormat:
    """What one answer must look like."""

    grammar: Grammar | None = None
    """The allowed answers; None: any."""
    instruction: str = ""
    """What the model is told about it, at the end of the last message."""
    tool_names: tuple[str, ...] = ()
    """Tools that may be called."""
    visible_special_ids: frozenset[int] = frozenset()
    """Special tokens that belong to the text, such as markers of tool calls."""
    compiler: GrammarCompiler | None = None
    previous_calls: frozenset[str] = frozenset()
    """Calls that were made in this turn, as `canonical_call` writes them."""
    require_marker: bool = False
    """Whether a call without the family's marker is redundant."""
    fallback: OutputFormat | None = None
    """The format of a second attempt, where the first only made redundant calls."""
    reasoning: ReasoningMode = "off"
    """Whether reasoning may precede the answer."""
    reasoning_tags: ReasoningTags = THINK
    """How the family marks it."""
    schema: Mapping[str, Any] | None = None
    """The JSON schema of an answer without calls."""
    argument_schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The JSON schema of the arguments, by the name of a tool."""
    is_text: bool = False
    """Whether the answer is in text (or calls tools), and in no format that is asked for."""
    added: AddedTexts = NOTHING_ADDED
    """Texts in the prompt that an answer in text must not repeat."""
    other_first_words: tuple[str, ...] = ()
    """Words with which echoes of them began, and the answer must not begin."""

    def with_instruction(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages, the last of them with the instruction as its `note`."""
        if not self.instruction:
            return list(messages)
        return [*messages[:-1], {**messages[-1], "note": self.instruction}]

    def constraint(self, sampling: SamplingParams, reasoning: Sequence[int] = ()) -> Constraint | None:
        """Return the state of constrained decoding for one answer. Raises as `GrammarCompiler.constraint`.

        reasoning: ids that the answer begins with, of an attempt before; (): the model reasons itself.
        """
        if self.grammar is None or self.compiler is None:
            return None
        answer = self.compiler.constraint(self.grammar, sampling.max_tokens)
        if self.reasoning == "off":
            return answer
        is_open = self.reasoning == "open"
        settings = (is_open, reasoning, self.reasoning_tags, bool(self.tool_names))
        return ReasoningConstraint(answer, self.compiler.tokenizer, *settings)

    def tool_call_parser(self) -> ToolCallParser | None:
        """Return a parser for one answer; None if it holds no calls."""
        return ToolCallParser(self.tool_names) if self.tool_names else None

    def redundancy_gate(self) -> RedundancyGate:
        """Return what holds back calls that may turn out to be redundant."""
        return RedundancyGate(self.previous_calls)

    def reasoning_parser(self) -> ReasoningParser | HarmonyParser | None:
        """Return a parser for one answer; None if it holds no reasoning."""
        if self.reasoning_tags is HARMONY:
            return HarmonyParser()
        return None if self.reasoning == "off" else ReasoningParser(self.reasoning == "open", self.reasoning_tags)

    def behind(self, prompt: str) -> OutputFormat:
        """Return the same format behind a prompt, or the end of one: there it is seen how the model reasons."""
        if self.reasoning == "off":
            return self
        return replace(self, reasoning=reasoning_mode(self.reasoning_tags, prompt))

    def with_added(self, *texts: str, document: str = "") -> OutputFormat:
        """Return the format of an answer in text for a prompt with further added texts, about a document."""
        if not texts or not self.is_text:
            return self
        fallback = self.fallback and self.fallback.with_added(*texts, document=document)
        return replace(self, added=self.added.plus(*texts, document=document), fallback=fallback)

    def echo_filter(self) -> EchoFilter | None:
        """Return a filter for one answer; None if nothing was added to the prompt."""
        return EchoFilter(self.added) if self.added.texts or self.added.tags else None

    def without_echo(self, word: str) -> OutputFormat | None:
        """Return the format of another attempt, whose first word is not this one; None after `MAX_ECHOES`."""
        if len(self.other_first_words) == MAX_ECHOES or self.compiler is None:
            return None
        grammar = Grammar(with_other_first_word(self.grammar.source if self.grammar else "", word))
        return replace(self, grammar=grammar, other_first_words=(*self.other_first_words, word))

    def error(self, text: str, calls: Sequence[Mapping[str, Any]]) -> str:
        """Return how a finished answer breaks its schemas, or ""."""
        if calls:
            functions = [call["function"] for call in calls]
            wrong = ((each["name"], self._argument_error(each)) for each in functions)
            return " ".join(f"Call of {name}: {problem}" for name, problem in wrong if problem)
        return validation_error(text, self.schema) if self.schema is not None else ""

    def _argument_error(self, function: Mapping[str, Any]) -> str:
        schema = self.argument_schemas.get(function["name"])
        return value_error(json.loads(function["arguments"]), schema) if schema else ""

    def calls_are_redundant(self, parsed: ParsedAnswer) -> bool:
        """Return whether there are calls, and all repeat calls of this turn or one lacks a required marker."""
        if self.require_marker and parsed.has_unmarked:
            return bool(parsed.calls)
        return bool(parsed.calls) and all(canonical_call(call) in self.previous_calls for call in parsed.calls)


UNCONSTRAINED = OutputFormat()
"""Any text, without tools."""


class OutputFormats:
    """Derive output formats from requests to one model."""

    def __init__(self, template: ChatTemplate, compiler: GrammarCompiler) -> None:
        self._template = template
        self._compiler = compiler

    def using(self, template: ChatTemplate) -> OutputFormats:
        """Return the same with another template: that of a request with variables of its own."""
        return OutputFormats(template, self._compiler)

    def completion(self, response_format: ResponseFormat | None, grammar: Grammar | None) -> OutputFormat:
        """Return the format of a completion.

        Raises:
            InputError: an invalid response format. ConfigError: both a grammar and a response format.
        """
        if grammar is not None and response_format is not None:
            raise ConfigError("Give either grammar or response_format, not both.")
        parsed = _parse_response_format(response_format)
        if parsed:
            return OutputFormat(Grammar(f"start: {parsed.rule}\n"), compiler=self._compiler, schema=parsed.schema)
        return OutputFormat(grammar, compiler=self._compiler) if grammar else UNCONSTRAINED

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        response_format: ResponseFormat | None = None,
        grammar: Grammar | None = None,
    ) -> OutputFormat:
        """Return the format of the answer to `messages`.

        Raises:
            InputError: invalid tools, tool choice or response format.
            ConfigError: a grammar together with tools or a response format.
        """
        choice, parsed = _parse_tool_choice(tools, tool_choice), _parse_response_format(response_format)
        if tools and grammar is not None:
            raise ConfigError("Give either grammar or tools, not both.")
        output_format = self.completion(response_format, grammar)
        if tools:
            rule = parsed.rule if parsed else None
            if choice == "none" and parsed and parsed.instruction == JSON_INSTRUCTION:
                rule = json_rule(NO_CALL_OBJECT)  # of any form, and so of a call's
            output_format = self._with_tools(messages, tools, choice, parallel_tool_calls, rule)
        if parsed:
            output_format = replace(output_format, instruction=_unless_stated(parsed, messages), schema=parsed.schema)
        elif grammar is None:
            added = AddedTexts(self._added_texts(messages, tools), _tags(messages, tools), messages)
            free = partial(replace, is_text=True, added=added, compiler=self._compiler)
            fallback = output_format.fallback
            output_format = free(output_format, fallback=None if fallback is None else free(fallback))
        return self._with_reasoning(output_format)

    def _added_texts(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> tuple[str, ...]:
        """Return what is added to a prompt for its tools, in this turn and in earlier ones."""
        if not tools:
            return ()
        source = self._template.source(tools)
        guided = _has_results(messages) and tool_call_style(source) is HERMES
        explanation = () if re.search(r"\btools\b", source) else (TOOL_INSTRUCTIONS,)
        return (*explanation, *((FIRST_RESULT_INSTRUCTION, LATER_RESULT_INSTRUCTION) if guided else ()))

    def _with_tools(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        choice: str,
        parallel: bool,
        answer: str | None,
    ) -> OutputFormat:
        """Return the format of an answer that may hold calls; `answer`: the grammar rule for one without calls."""
        style = tool_call_style(self._template.source(tools))
        offered = [tool["function"] for tool in tools if choice in ("auto", "required", "none", _name(tool))]
        kind = HarmonyGrammar if style is HARMONY_CALLS else ToolGrammar
        grammar = kind(self._template.tokenizer, style, offered, parallel)
        without_calls = OutputFormat(Grammar(grammar.no_calls(answer)), compiler=self._compiler)
        if choice == "none":
            return without_calls
        with_calls = OutputFormat(
            tool_names=tuple(_name(tool) for tool in tools),
            visible_special_ids=grammar.visible_special_ids,
            compiler=self._compiler,
            argument_schemas={_name(tool): tool["function"].get("parameters") or {} for tool in tools},
        )
        if choice != "auto":
            return replace(with_calls, grammar=Grammar(grammar.calls()))
        after_result = messages[-1]["role"] == "tool"
        guided, previous = after_result and style is HERMES, _calls_of_this_turn(messages)
        source = grammar.calls_or_rule(answer) if answer else grammar.calls_or_text(plain=guided)
        with_calls = replace(with_calls, grammar=Grammar(source))
        if not after_result:
            return with_calls
        require_marker = guided and len(previous) >= MAX_UNMARKED_CALLS
        instruction = LATER_RESULT_INSTRUCTION if require_marker else FIRST_RESULT_INSTRUCTION
        return replace(
            with_calls,
            instruction=instruction if guided and not answer else "",
            previous_calls=previous,
            require_marker=require_marker,
            fallback=self._with_reasoning(without_calls),
        )

    def _with_reasoning(self, output_format: OutputFormat) -> OutputFormat:
        """Return the same format for an answer behind reasoning, if the model reasons."""
        tags = reasoning_tags(self._template.source())
        if tags is None:
            return output_format
        ids = (added_token_id(self._template.tokenizer, tag) for tag in control_tokens_of(tags))
        visible = output_format.visible_special_ids.union(tag for tag in ids if tag is not None)
        return replace(output_format, reasoning="optional", reasoning_tags=tags, visible_special_ids=visible)


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool["function"]["name"])


def _tags(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> tuple[str, ...]:
    """Return the tags around calls and results in a prompt that no answer holds. With tools a call may be in order."""
    called = any(message.get("tool_calls") for message in messages)
    return (*((CALL_TAG,) if called and not tools else ()), *((RESULT_TAG,) if _has_results(messages) else ()))


def _has_results(messages: Sequence[Message]) -> bool:
    return any(message["role"] == "tool" for message in messages)


def _parse_tool_choice(tools: Sequence[dict[str, Any]] | None, choice: ToolChoice | None) -> str:
    """Return "auto", "required", "none" or a tool's name."""
    names = [_name(tool) for tool in validate_tools(tools) or ()]
    if len(set(names)) < len(names):
        raise InputError("Two tools have the same name: give each its own.")
    if isinstance(choice, Mapping):
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, Mapping) else None
        if wanted in names:
            return str(wanted)
        raise InputError(
            f"tool_choice names {shown(wanted)}, which is none of the tools: {', '.join(names) or 'none given'}."
        )
    if choice is None:
        return "auto"
    if choice not in ("auto", "required", "none"):
        expected = '{"type": "function", "function": {"name": ...}}'
        raise InputError(f"tool_choice must be 'auto', 'required', 'none' or {expected}, not {shown(choice)}.")
    if choice == "required" and not names:
        raise InputError("tool_choice is 'required' and there are no tools: pass tools, or tool_choice='auto'.")
    return choice


class _JsonFormat(NamedTuple):
    """What a response format asks for."""

    rule: str
    """The rule of a Lark grammar."""
    instruction: str
    schema: Mapping[str, Any]


def _parse_response_format(response_format: ResponseFormat | None) -> _JsonFormat | None:
    """Return what a response format asks for; None for free text."""
    if response_format is None or (isinstance(response_format, Mapping) and response_format.get("type") == "text"):
        return None
    kind = given = response_format.get("type") if isinstance(response_format, Mapping) else response_format
    if kind == "json_object":
        return _JsonFormat(json_rule({"type": "object"}), JSON_INSTRUCTION, {"type": "object"})
    described = response_format.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(described, Mapping) or not isinstance(schema, Mapping):
        expected = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        raise InputError(f'response_format must be {{"type": "json_object"}} or {expected}, not {shown(given)}.')
    if described.get("strict") is True:
        check_strict(schema, "The schema of the response format")
    check_schema(schema, "The schema of the response format")
    return _JsonFormat(json_rule(schema, lenient=True), SCHEMA_INSTRUCTION + schema_text(schema), schema)


def _calls_of_this_turn(messages: Sequence[Message]) -> frozenset[str]:
    """Return the calls since the last user message."""
    last = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=0)
    return frozenset(canonical_call(call) for message in messages[last:] for call in message.get("tool_calls", ()))


def _unless_stated(wanted: _JsonFormat, messages: Sequence[Message]) -> str:
    """Return the instruction, or "" if the messages state it already."""
    texts = [message["content"] for message in reversed(messages)]  # the newest first: there it usually is
    if wanted.instruction == JSON_INSTRUCTION:
        return "" if any("json" in text.lower() for text in texts) else wanted.instruction
    schema = wanted.schema
    stated = {schema_text(schema), json.dumps(schema), json.dumps(schema, ensure_ascii=False)}
    return "" if any(form in text for text in texts for form in stated) else wanted.instruction
