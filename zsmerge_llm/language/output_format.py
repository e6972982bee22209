"""From a request's tools and response format to the form its answer must have: a grammar, a note, a reader of calls.

What the model is free to do stays free: with `tool_choice="auto"` it may answer in text, but once it begins a call, in
its family's form or in another known one, it can only write a complete one that fits the tool's schema.

After a result it may go on calling. Small models find no end there. So an answer that only repeats calls of this turn
gives way to another one without calls (`OutputFormat.instead`). So does, after `BARE_CALLS` calls, one that lacks the tags its
family writes: only small models of it forget them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.language.chat_template import ChatTemplate, validate_tools
from zsmerge_llm.language.grammar import Constraint, Grammar, GrammarCompiler, json_rule
from zsmerge_llm.language.reasoning import (
    CLOSE,
    OPEN,
    ReasoningConstraint,
    ReasoningMode,
    ReasoningParser,
    own_token,
    thinking,
)
from zsmerge_llm.language.tool_calls import (
    BARE,
    END_MARK,
    HERMES,
    LLAMA,
    MISTRAL,
    ToolCallParser,
    ToolCallStyle,
    canonical,
    family,
)
from zsmerge_llm.types import Message, ResponseFormat, ToolChoice

JSON_NOTE = "Answer with a JSON object and nothing else."
SCHEMA_NOTE = "Answer with JSON that follows this schema, and nothing else:\n"
RESULT_NOTE = "Answer the question in a full sentence, or make the next call if one is still needed."
"""Follows a tool's first result in a turn, where a family writes tags. Without it small models repeat the call."""
RESULTS_NOTE = "Now answer the question in a full sentence, from the results, unless another call is needed first."
"""Follows the later ones. It makes another call less likely: small models find no end."""
BARE_CALLS = 2
SPACE = r"[ \n]{0,16}"
NARROW = r"[ \n]{0,6}"
ANY = r"[ \n]*"
"""White space where calls are looked for behind any text: counting would need too many states."""
PLAIN = r" ?[^\s{}\[\]`(<>,](?s:.*)"
"""Text that does not begin like JSON or code."""


@dataclass(frozen=True)
class OutputFormat:
    """The form of one answer.

    names: of the tools that may be called. shown: special tokens that belong to its text. made: calls that were made in
    this turn already. marked: only calls with the family's mark are wanted. instead: the form for an answer that does
    nothing but repeat calls, or make them without the mark. thinking: what may come before it.
    """

    grammar: Grammar | None = None
    note: str = ""
    names: tuple[str, ...] = ()
    shown: frozenset[int] = frozenset()
    grammars: GrammarCompiler | None = None
    made: frozenset[str] = frozenset()
    marked: bool = False
    instead: OutputFormat | None = None
    thinking: ReasoningMode = "never"

    def noted(self, messages: Sequence[Message]) -> list[Message]:
        """The messages, the last of them with what the model must be told about the form."""
        return [*messages[:-1], {**messages[-1], "note": self.note}] if self.note else list(messages)

    def constraint(self, sampling: SamplingParams) -> Constraint | None:
        """The state of one answer of this form. Raises as `GrammarCompiler.constraint`."""
        if self.grammar is None or self.grammars is None:
            return None
        if self.thinking == "never":
            return self.grammars.constraint(self.grammar, sampling.max_tokens)
        kind = partial(ReasoningConstraint, tokenizer=self.grammars.tokenizer, begun=self.thinking == "begun")
        return self.grammars.constraint(self.grammar, sampling.max_tokens, kind)

    def calls(self) -> ToolCallParser | None:
        """A reader of the calls in one answer; None where there can be none."""
        return ToolCallParser(self.names) if self.names else None

    def thoughts(self) -> ReasoningParser | None:
        """A reader of the thought in one answer; None where there can be none."""
        return None if self.thinking == "never" else ReasoningParser(begun=self.thinking == "begun")


UNCONSTRAINED = OutputFormat()
"""Whatever the model says."""


class OutputFormats:
    """Makes forms for one model."""

    def __init__(self, template: ChatTemplate, grammars: GrammarCompiler) -> None:
        self._template = template
        self._grammars = grammars

    def plain(self, response_format: ResponseFormat | None, grammar: Grammar | None) -> OutputFormat:
        """The form of a completion.

        Raises:
            InputError: a response format that cannot be used. ConfigError: two forms at once.
        """
        if grammar is not None and response_format is not None:
            raise ConfigError("Give either grammar or response_format, not both.")
        found = _response(response_format)
        rule = Grammar(f"start: {found[0]}\n") if found else grammar
        return OutputFormat(rule, grammars=self._grammars) if rule else UNCONSTRAINED

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        response_format: ResponseFormat | None = None,
        grammar: Grammar | None = None,
    ) -> OutputFormat:
        """The form of the answer to `messages`.

        Raises:
            InputError: tools, a choice or a response format that cannot be used. ConfigError: two forms at once.
        """
        choice, found = _choice(tools, tool_choice), _response(response_format)
        if tools and grammar is not None:
            raise ConfigError("Give either grammar or tools, not both.")
        form = self.plain(response_format, grammar)
        if tools:
            form = self._with_tools(messages, tools, choice, parallel_tool_calls, found and found[0])
        if found:
            form = replace(form, note=_unless_said(found[1], messages))
        return self._thoughtful(form)

    def _with_tools(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        choice: str,
        parallel: bool,
        answer: str | None,
    ) -> OutputFormat:
        """The form of an answer that may hold calls; `answer` is the rule for one that holds none."""
        kind = family(self._template.source(tools))
        offered = [tool["function"] for tool in tools if choice in ("auto", "required", "none", _name(tool))]
        rules = _Rules(self._template, kind, offered, parallel)
        if choice == "none":
            return OutputFormat(Grammar(rules.no_call(answer)), grammars=self._grammars)
        form = OutputFormat(None, "", tuple(_name(tool) for tool in tools), rules.shown, self._grammars)
        if choice != "auto":
            return replace(form, grammar=Grammar(rules.calls_only()))
        answered = messages[-1]["role"] == "tool"
        guided, made = answered and kind is HERMES, _made(messages)
        source = rules.calls_or(answer) if answer else rules.calls_or_text(plainly=guided)
        form = replace(form, grammar=Grammar(source))
        if not answered:
            return form
        enough = guided and len(made) >= BARE_CALLS
        note = "" if answer or not guided else RESULTS_NOTE if enough else RESULT_NOTE
        instead = OutputFormat(Grammar(rules.no_call(answer)), note, grammars=self._grammars)
        return replace(form, note=note, made=made, marked=enough, instead=self._thoughtful(instead))

    def _thoughtful(self, form: OutputFormat) -> OutputFormat:
        """The same form, where the model thinks before it answers."""
        if self._thinking == "never":
            return form
        marks = (own_token(self._grammars.tokenizer, mark) for mark in (OPEN, CLOSE))
        shown = form.shown | {mark for mark in marks if mark is not None}
        return replace(form, thinking=self._thinking, shown=shown)

    @cached_property
    def _thinking(self) -> ReasoningMode:
        question: Message = {"role": "user", "content": "?"}
        template = self._template
        whole, before = template.render([question]), template.render([question], add_generation_prompt=False)
        return thinking(template.source(), whole.removeprefix(before))


class _Rules:
    """The rules of a Lark grammar for calls of these functions in a family's form."""

    def __init__(
        self, template: ChatTemplate, kind: ToolCallStyle, functions: Sequence[Mapping[str, Any]], parallel: bool
    ) -> None:
        self._tokenizer = template.tokenizer
        self._kind = kind
        self._names = [function["name"] for function in functions]
        self._schemas = [_parameters(function) for function in functions]
        self._several = parallel and kind.parallel
        marks = (own_token(self._tokenizer, mark) for mark in (kind.mark, END_MARK))
        self.shown = frozenset(mark for mark in marks if mark is not None)

    def calls_only(self) -> str:
        return f"start: {self._opening()}calls\n{self._calls()}"

    def calls_or(self, answer: str) -> str:
        """Calls, with or without the family's mark, or an answer by another rule."""
        return f"start: answer | {self._opening()}calls | call\nanswer: {answer}\n{self._calls()}"

    def calls_or_text(self, plainly: bool) -> str:
        """Calls, or text that may turn into one.

        `plainly`: text that does not begin like JSON or code; bare calls can only stand at the beginning then.
        """
        text = PLAIN if plainly else "(?s:.+)"
        starts, lines = ["TEXT?"], [f"TEXT: /{text}/"]
        if self._kind.mark:
            token = own_token(self._tokenizer, self._kind.mark)
            if token is not None:
                starts.append(f"TEXT? <[{token}]> calls")
            if token is None or token not in self._hidden():
                starts.append("spelled calls")
                lines.append(f"spelled[lazy]: /({text})?{re.escape(self._kind.mark)}/")
        found, rules = self._found("" if plainly else r"((?s:.*)\n)?")
        return f"start: {' | '.join([*starts, *found])}\n" + "\n".join([*lines, *rules]) + f"\n{self._calls()}"

    def no_call(self, answer: str | None) -> str:
        """An answer by another rule, or text without any call."""
        if answer:
            return f"start: {answer}\n"
        names = "|".join(map(_pattern, self._names))
        banned = [re.escape(self._kind.mark)] if self._kind.mark else []
        banned.append(rf"\n{ANY}(```(json)?{ANY})?\{{{ANY}\"name\"{ANY}:{ANY}({names})")
        without = "".join(f" & ~/(?s:.*){each}(?s:.*)/" for each in banned)
        return f"start: TEXT\nTEXT: /{PLAIN}/{without}\n"

    def _calls(self) -> str:
        """What follows the mark that announces calls, in the family's own writing."""
        kind = self._kind
        heads = [_head(name, kind.key) for name in self._names]
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

    def _found(self, before: str) -> tuple[list[str], list[str]]:
        """Bare and fenced calls, in any spacing: what starts them, and their rules. `before`: a pattern."""
        starts, lines = [], [f"SPACE: /{SPACE.replace('0', '1')}/", 'key: "\\"arguments\\"" | "\\"parameters\\""']
        for at, (name, schema) in enumerate(zip(self._names, self._schemas, strict=True)):
            head = rf"\{{{NARROW}\"name\"{NARROW}:{NARROW}{_pattern(name)}"
            lines.append(rf"bare_{at}[lazy]: /{before}{NARROW}{head}/")
            lines.append(rf"fenced_{at}[lazy]: /{before}{NARROW}```(json)?{NARROW}{head}/")
            loose = json_rule(schema, lenient=True, whitespace_flexible=True, whitespace_pattern=SPACE)
            lines.append(f'rest_{at}: SPACE? "," SPACE? key SPACE? ":" SPACE? {loose} SPACE? "}}"')
            starts += [f"bare_{at} rest_{at}", f'fenced_{at} rest_{at} SPACE? "```"']
        return starts, lines

    def _opening(self) -> str:
        """The family's mark before calls that must come; Llama's may be left out."""
        return "" if self._kind in (LLAMA, BARE) else self._mark(self._kind.mark) + " "

    def _mark(self, text: str) -> str:
        token = own_token(self._tokenizer, text)
        if token is None:
            return _text(text)
        return f"<[{token}]>" if token in self._hidden() else f"(<[{token}]> | {_text(text)})"

    def _hidden(self) -> set[int]:
        return {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}


def _head(name: str, key: str) -> str:
    """The beginning of a call, in the pieces that JSON has: so an answer in JSON may begin with the same ones."""
    pieces = ("{", '"name"', ": ", _text(name), ", ", f'"{key}"', ": ")
    return " ".join(map(_text, pieces))


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
    names = [_name(tool) for tool in validate_tools(tools) or ()]
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


def _made(messages: Sequence[Message]) -> frozenset[str]:
    """The calls since the user's last words."""
    last = max((at for at, message in enumerate(messages) if message["role"] == "user"), default=0)
    return frozenset(canonical(call) for message in messages[last:] for call in message.get("tool_calls", ()))


def _unless_said(note: str, messages: Sequence[Message]) -> str:
    """The note, unless the messages say it already."""
    said = "\n".join(message["content"] for message in messages)
    core = note.removeprefix(SCHEMA_NOTE)
    return "" if core in said or (note == JSON_NOTE and "json" in said.lower()) else note
