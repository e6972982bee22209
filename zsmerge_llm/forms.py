"""From a request's tools and response format to the form its answer must have: a grammar, a note, a reader of calls.

What the model is free to do stays free: with `tool_choice="auto"` it may answer in text, but once it begins a call, in
its family's form or in another known one, it can only write a complete one that fits the tool's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zsmerge_llm.chat import Template, checked_tools
from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.grammar import Constraint, Grammar, Grammars, json_rule
from zsmerge_llm.toolcalls import BARE, END_MARK, HERMES, LLAMA, MISTRAL, CallStream, Family, family
from zsmerge_llm.types import Message, ResponseFormat, ToolChoice

JSON_NOTE = "Answer with a JSON object and nothing else."
SCHEMA_NOTE = "Answer with JSON that follows this schema, and nothing else:\n"
RESULT_NOTE = "Answer the question in plain words from this result, unless another call is needed first."
"""Follows a tool's result where a model's family writes tags. Without it small models repeat the call."""
SPACE = r"[ \n]{0,16}"
PLAIN = r" ?[^\s{}\[\]`(<>,](?s:.*)"
"""Text that does not begin like JSON or code."""


@dataclass(frozen=True)
class Form:
    """The form of one answer. `shown` are special tokens that belong to its text."""

    grammar: Grammar | None = None
    note: str = ""
    names: tuple[str, ...] = ()
    shown: frozenset[int] = frozenset()
    grammars: Grammars | None = None

    def noted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, the last of them with what the model must be told about the form."""
        return [*messages[:-1], {**messages[-1], "note": self.note}] if self.note else list(messages)

    def constraint(self, sampling: SamplingParams) -> Constraint | None:
        """The state of one answer of this form. Raises as `Grammars.constraint`."""
        if self.grammar is None or self.grammars is None:
            return None
        return self.grammars.constraint(self.grammar, sampling.max_tokens)

    def calls(self) -> CallStream | None:
        """A reader of the calls in one answer; None where there can be none."""
        return CallStream(self.names) if self.names else None


FREE = Form()
"""Whatever the model says."""


class Forms:
    """Makes forms for one model."""

    def __init__(self, template: Template, grammars: Grammars) -> None:
        self._template = template
        self._grammars = grammars

    def plain(self, response_format: ResponseFormat | None, grammar: Grammar | None) -> Form:
        """The form of a completion.

        Raises:
            InputError: a response format that cannot be used. ConfigError: two forms at once.
        """
        if grammar is not None and response_format is not None:
            raise ConfigError("Give either grammar or response_format, not both.")
        found = _response(response_format)
        rule = Grammar(f"start: {found[0]}\n") if found else grammar
        return Form(rule, grammars=self._grammars) if rule else FREE

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        response_format: ResponseFormat | None = None,
        grammar: Grammar | None = None,
    ) -> Form:
        """The form of the answer to `messages`.

        Raises:
            InputError: tools, a choice or a response format that cannot be used. ConfigError: two forms at once.
        """
        choice = _choice(tools, tool_choice)
        if not tools:
            form = self.plain(response_format, grammar)
            found = _response(response_format)
            return Form(form.grammar, _unless_said(found[1], messages), grammars=form.grammars) if found else form
        if grammar is not None:
            raise ConfigError("Give either grammar or tools, not both.")
        found, kind = _response(response_format), family(self._template.source(tools))
        answered = messages[-1]["role"] == "tool"
        offered = [tool["function"] for tool in tools if choice in ("auto", "required", "none", _name(tool))]
        rules = _Rules(self._template, kind, offered, parallel_tool_calls)
        note = _unless_said(found[1], messages) if found else ""
        if choice == "none":
            return Form(Grammar(rules.no_call(found and found[0])), note, grammars=self._grammars)
        if choice != "auto":
            source = rules.calls_only()
        elif found:
            source, note = rules.calls_or(found[0], bare=not answered), note
        else:
            guided = answered and kind is HERMES
            source, note = rules.calls_or_text(begun_plainly=guided), RESULT_NOTE if guided else ""
        return Form(Grammar(source), note, tuple(_name(tool) for tool in tools), rules.shown, self._grammars)


class _Rules:
    """The rules of a Lark grammar for calls of these functions in a family's form."""

    def __init__(
        self, template: Template, kind: Family, functions: Sequence[Mapping[str, Any]], parallel: bool
    ) -> None:
        self._tokenizer = template.tokenizer
        self._kind = kind
        self._names = [function["name"] for function in functions]
        self._schemas = [_parameters(function) for function in functions]
        self._several = parallel and kind.parallel
        self.shown = frozenset(token for mark in (kind.mark, END_MARK) if (token := self._special(mark)) is not None)

    def calls_only(self) -> str:
        return f"start: {self._opening()}calls\n{self._calls()}"

    def calls_or(self, answer: str, bare: bool) -> str:
        """Calls, or an answer by another rule. `bare`: calls without the family's mark too."""
        bare_call = " | call" if bare or self._kind in (LLAMA, BARE) else ""
        return f"start: answer | {self._opening()}calls{bare_call}\nanswer: {answer}\n{self._calls()}"

    def calls_or_text(self, begun_plainly: bool) -> str:
        """Calls, or text that may turn into one.

        `begun_plainly`: nothing that begins like JSON or code, and calls only as models write them that learnt it.
        """
        starts = ["TEXT?"]
        text = PLAIN if begun_plainly else "(?s:.+)"
        lines = [f"TEXT: /{text}/"]
        if self._kind.mark:
            token = self._special(self._kind.mark)
            if token is not None:
                starts.append(f"TEXT? <[{token}]> calls")
            if token is None or not (begun_plainly or token in self._hidden()):
                before = f"({PLAIN})?" if begun_plainly else "(?s:.*)"
                starts.append("spelled calls")
                lines.append(f"spelled[lazy]: /{before}{re.escape(self._kind.mark)}/")
        if not begun_plainly:
            found, rules = self._found()
            starts, lines = starts + found, lines + rules
        return f"start: {' | '.join(starts)}\n" + "\n".join(lines) + f"\n{self._calls()}"

    def no_call(self, answer: str | None) -> str:
        """An answer by another rule, or text without any call."""
        if answer:
            return f"start: {answer}\n"
        names = "|".join(map(_pattern, self._names))
        banned = [re.escape(self._kind.mark)] if self._kind.mark else []
        banned.append(rf"\n{SPACE}(```(json)?{SPACE})?\{{{SPACE}\"name\"{SPACE}:{SPACE}({names})")
        without = "".join(f" & ~/(?s:.*){each}(?s:.*)/" for each in banned)
        return f"start: TEXT\nTEXT: /{PLAIN}/{without}\n"

    def _calls(self) -> str:
        """What follows the mark that announces calls, in the family's own writing."""
        kind = self._kind
        heads = [_text(f'{{"name": {_text(name)}, "{kind.key}": ') for name in self._names]
        ident = """ (", \\"id\\": \\"" /[a-zA-Z0-9]{9}/ "\\"")?""" if kind is MISTRAL else ""  # its templates show them
        single = [f'call_{at}: {head} args_{at}{ident} "}}"' for at, head in enumerate(heads)]
        args = [f"args_{at}: {json_rule(schema, lenient=True)}" for at, schema in enumerate(self._schemas)]
        call = "call: " + " | ".join(f"call_{at}" for at in range(len(self._names)))
        if kind.wrapped:
            wrapped = f'"\\n" call "\\n" {self._mark(END_MARK)}'
            calls = f"calls: {wrapped}" + self._again(f'"\\n" {self._mark(kind.mark)} {wrapped}')
        elif kind is MISTRAL:
            more = self._again('", " call')
            calls = f'calls: " "? "[" call{more} "]"'
        else:
            calls = "calls: call" + self._again('"\\n" call')
        return "\n".join([calls, call, *single, *args, ""])

    def _again(self, rule: str) -> str:
        return f" ({rule})*" if self._several else ""

    def _found(self) -> tuple[list[str], list[str]]:
        """Bare and fenced calls, in any spacing: what starts them, and their rules."""
        starts, lines = [], [f"SPACE: /{SPACE.replace('0', '1')}/", 'key: "\\"arguments\\"" | "\\"parameters\\""']
        for at, (name, schema) in enumerate(zip(self._names, self._schemas, strict=True)):
            head = rf"\{{{SPACE}\"name\"{SPACE}:{SPACE}{_pattern(name)}"
            lines.append(rf"bare_{at}[lazy]: /((?s:.*)\n)?{SPACE}{head}/")
            lines.append(rf"fenced_{at}[lazy]: /((?s:.*)\n)?{SPACE}```(json)?{SPACE}{head}/")
            loose = json_rule(schema, lenient=True, whitespace_flexible=True, whitespace_pattern=SPACE)
            lines.append(f'rest_{at}: SPACE? "," SPACE? key SPACE? ":" SPACE? {loose} SPACE? "}}"')
            starts += [f"bare_{at} rest_{at}", f'fenced_{at} rest_{at} SPACE? "```"']
        return starts, lines

    def _opening(self) -> str:
        """The family's mark before calls that must come; Llama's may be left out."""
        return "" if self._kind in (LLAMA, BARE) else self._mark(self._kind.mark) + " "

    def _mark(self, text: str) -> str:
        token = self._special(text)
        if token is None:
            return _text(text)
        return f"<[{token}]>" if token in self._hidden() else f"(<[{token}]> | {_text(text)})"

    def _special(self, text: str) -> int | None:
        """The token of its own that a mark has, if any."""
        added = self._tokenizer.added_tokens_decoder
        return next((index for index, token in added.items() if token.content == text), None)

    def _hidden(self) -> set[int]:
        return {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}


def _text(text: str) -> str:
    """A string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _pattern(name: str) -> str:
    """A regular expression for a function's name as JSON."""
    return re.escape(json.dumps(name, ensure_ascii=False)).replace("/", "\\/")


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool["function"]["name"])


def _parameters(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a function's arguments; one that takes none gets none."""
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise InputError(f"The parameters of tool {function['name']!r} must be a JSON schema, not {schema!r:.80}.")
    return schema if schema.get("properties") or set(schema) - _BARE_KEYS else _NOTHING


_BARE_KEYS = {"$schema", "type", "title", "description", "properties", "required"}
_NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def _choice(tools: Sequence[dict[str, Any]] | None, choice: ToolChoice | None) -> str:
    """ "auto", "required", "none" or a tool's name."""
    names = [_name(tool) for tool in checked_tools(tools) or ()]
    if len(set(names)) < len(names):
        raise InputError("Two tools have the same name: give each its own.")
    if isinstance(choice, Mapping):
        function = choice.get("function")
        wanted = function.get("name") if isinstance(function, Mapping) else None
        if wanted in names:
            return str(wanted)
        raise InputError(
            f"tool_choice names {wanted!r}, which is none of the tools: {', '.join(names) or 'none given'}."
        )
    if choice is None:
        return "auto"
    if choice not in ("auto", "required", "none"):
        form = '{"type": "function", "function": {"name": ...}}'
        raise InputError(f"tool_choice must be 'auto', 'required', 'none' or {form}, not {choice!r}.")
    if choice == "required" and not names:
        raise InputError("tool_choice is 'required' and there are no tools: pass tools, or tool_choice='auto'.")
    return choice


def _response(wanted: ResponseFormat | None) -> tuple[str, str] | None:
    """The rule and the note of a response format."""
    if wanted is None or (isinstance(wanted, Mapping) and wanted.get("type") == "text"):
        return None
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind == "json_object":
        return json_rule({"type": "object"}), JSON_NOTE
    described = wanted.get("json_schema") if kind == "json_schema" else None
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(described, Mapping) or not isinstance(schema, Mapping):
        form = '{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}'
        raise InputError(f'response_format must be {{"type": "json_object"}} or {form}, not {wanted!r:.80}.')
    rule = json_rule(schema, lenient=described.get("strict") is False)
    return rule, SCHEMA_NOTE + json.dumps(schema, ensure_ascii=False)


def _unless_said(note: str, messages: Sequence[Message]) -> str:
    """The note, unless the messages say it already."""
    said = "\n".join(message["content"] for message in messages)
    core = note.removeprefix(SCHEMA_NOTE)
    return "" if core in said or (note == JSON_NOTE and "json" in said.lower()) else note
