"""Lark grammars for answers with tool calls, in the style of one model family.

Why not `llguidance.StructTag` (1.9): it cannot require a call, allow exactly one, or write Mistral's list; it allows
text between and behind calls; `[TOOL_CALLS]` cannot be a trigger where it is a special token, nor `<tool_call>` where
it is none; its triggers are literal, so bare JSON is caught neither with other spaces nor only where a line begins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import InputError
from zsmerge_llm.language.grammar import json_rule
from zsmerge_llm.language.reasoning_tags import added_token_id
from zsmerge_llm.language.schema_checks import check_schema, check_strict
from zsmerge_llm.language.tool_calls import (
    ARGUMENT_KEYS,
    BARE,
    END_MARKER,
    LLAMA,
    MARKERS,
    MISTRAL,
    ToolCallStyle,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACES = r"[ \n]{0,16}"
FEW_SPACES = r"[ \n]{0,6}"
ANY_SPACES = r"[ \t\r\n]*"
"""For calls that are looked for behind any text: counting spaces there would need too many states."""
PLAIN_TEXT = r" ?[^\s{}\[\]`(<>,](?s:.*)"
"""Text that does not begin like JSON or code."""
SCHEMA_KEYS_WITHOUT_ARGUMENTS = {"$schema", "type", "title", "description", "properties", "required"}
BANNED_MARKERS = (*(each[:-1] for each in (*MARKERS, END_MARKER)), "<function=", "<invoke name=", "<|tool_call")
"""What no answer without calls holds: all but the last character of the markers that are read, so that a model turns to
something else early, and those of further families."""
NAMING_KEYS = "name|tool|tool_name|function|function_name"
"""Keys of JSON whose value is the tool that a call is for."""
NO_CALL_OBJECT = {"type": "object", "properties": dict.fromkeys(ARGUMENT_KEYS, False), "additionalProperties": True}
"""The schema of any JSON object but a call."""
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def with_other_first_word(source: str, word: str) -> str:
    """Return the grammar of an answer in text, of `ToolGrammar` or any text (""), whose first word is not `word`."""
    source = source or "start: TEXT?\nTEXT: /(?s:.+)/\n"
    lines = re.compile(r"^((?:TEXT|spelled\[lazy\]|(?:bare|fenced)_\d+\[lazy\]): .*)$", re.MULTILINE)
    return lines.sub(lambda line: f"{line[1]} & ~/\\W*(?i:{re.escape(word)})(?s:.*)/", source)


class ToolGrammar:
    """Build grammars for calls of these functions in one family's style.

    Args:
        functions: the `function` parts of OpenAI tool definitions.
        parallel: whether one answer may hold several calls, where the family can.

    Raises:
        InputError: a function's parameters are not a JSON schema, or no arguments can follow it.
        UnsupportedSchemaError: a keyword of a function with `strict: True` cannot be enforced.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        style: ToolCallStyle,
        functions: Sequence[Mapping[str, Any]],
        parallel: bool,
    ) -> None:
        self._style = style
        self._tokenizer = tokenizer
        self._names = [function["name"] for function in functions]
        self._schemas = [_argument_schema(function) for function in functions]
        self._parallel = parallel and style.parallel
        self._hidden_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._marker_ids = {text: added_token_id(tokenizer, text) for text in (style.marker, END_MARKER)}

    @property
    def visible_special_ids(self) -> frozenset[int]:
        """Ids of the family's markers, where they are tokens of their own."""
        return frozenset(token for token in self._marker_ids.values() if token is not None)

    def calls(self) -> str:
        """Return the grammar of one call or several, and nothing else."""
        return f"start: {self._opening()}calls\n{self._call_rules()}"

    def calls_or_rule(self, answer: str) -> str:
        """Return the grammar of calls, with or without the family's marker, or of an answer by another rule."""
        return f"start: answer | {self._opening()}calls | call\nanswer: {answer}\n{self._call_rules()}"

    def calls_or_text(self, plain: bool) -> str:
        """Return the grammar of text that may turn into calls.

        `plain`: only text that does not begin like JSON or code; unmarked calls can only begin the answer then.
        """
        text = PLAIN_TEXT if plain else "(?s:.+)"
        starts, lines = ["TEXT?"], [f"TEXT: /{text}/"]
        if marker := self._style.marker:
            token = self._marker_ids[marker]
            if token is not None:
                starts.append(f"TEXT? <[{token}]> calls")
            if token is None or token not in self._hidden_ids:  # then ordinary tokens may spell the marker, too
                starts.append("spelled calls")
                lines.append(f"spelled[lazy]: /({text})?{re.escape(marker)}/")
        unmarked, rules = self._unmarked_calls("" if plain else r"((?s:.*)\n)?")
        return f"start: {' | '.join([*starts, *unmarked])}\n" + "\n".join([*lines, *rules]) + f"\n{self._call_rules()}"

    def no_calls(self, answer: str | None) -> str:
        """Return the grammar of an answer by another rule or, without one, of text that holds no call.

        That is no family's marker, no JSON that names one of the functions, and none with a name and arguments behind
        it, as in a call of a function that is not there.
        """
        if answer:
            return f"start: {answer}\n"
        between = rf"[\"']{ANY_SPACES}:{ANY_SPACES}"
        names = "|".join(_escaped(json.dumps(name, ensure_ascii=False)[1:-1]) for name in self._names)
        banned = [
            *map(_escaped, BANNED_MARKERS),
            rf"[\"']({NAMING_KEYS}){between}[\"']({names})[\"']",
            rf"[\"']name{between}[\"'][^\"'\n]*[\"']{ANY_SPACES},{ANY_SPACES}[\"']({'|'.join(ARGUMENT_KEYS)}){between}",
        ]
        return f"start: TEXT\nTEXT: /{PLAIN_TEXT}/ & ~/(?s:.*)({'|'.join(banned)})(?s:.*)/\n"

    def _call_rules(self) -> str:
        """Return the rule `calls`, for what follows the marker, with the rules it needs."""
        style = self._style
        heads = [_head(name, style.arguments_key) for name in self._names]
        # Mistral's templates show calls with an id
        ident = """ (", \\"id\\": \\"" /[a-zA-Z0-9]{9}/ "\\"")?""" if style is MISTRAL else ""
        single = [f'call_{at}: {head} args_{at}{ident} "}}"' for at, head in enumerate(heads)]
        args = [f"args_{at}: {json_rule(schema, lenient=True)}" for at, schema in enumerate(self._schemas)]
        call = "call: " + " | ".join(f"call_{at}" for at in range(len(self._names)))
        if style.wrapped:
            wrapped = f'"\\n" call "\\n" {self._marker(END_MARKER)}'
            calls = f"calls: {wrapped}" + self._repeated(f'"\\n" {self._marker(style.marker)} {wrapped}')
        elif style is MISTRAL:
            more = self._repeated('", " call')
            calls = f'calls: " "? "[" call{more} "]"'
        else:
            calls = "calls: call" + self._repeated('"\\n" call')
        return "\n".join([calls, call, *single, *args, ""])

    def _repeated(self, rule: str) -> str:
        return f" ({rule})*" if self._parallel else ""

    def _unmarked_calls(self, before: str) -> tuple[list[str], list[str]]:
        """Return alternatives of `start` for bare and fenced calls, spaced in any way, and the rules they need.

        before: a pattern of the text before a call.
        """
        starts, lines = [], [f"SPACE: /{SPACES.replace('0', '1')}/", 'key: "\\"arguments\\"" | "\\"parameters\\""']
        for at, (name, schema) in enumerate(zip(self._names, self._schemas, strict=True)):
            head = rf"\{{{FEW_SPACES}\"name\"{FEW_SPACES}:{FEW_SPACES}{_name_pattern(name)}"
            lines.append(rf"bare_{at}[lazy]: /{before}{FEW_SPACES}{head}/")
            lines.append(rf"fenced_{at}[lazy]: /{before}{FEW_SPACES}```(json)?{FEW_SPACES}{head}/")
            loose = json_rule(schema, lenient=True, whitespace_flexible=True, whitespace_pattern=SPACES)
            lines.append(f'rest_{at}: SPACE? "," SPACE? key SPACE? ":" SPACE? {loose} SPACE? "}}"')
            starts += [f"bare_{at} rest_{at}", f'fenced_{at} rest_{at} SPACE? "```"']
        return starts, lines

    def _opening(self) -> str:
        """Return the marker before required calls; Llama's is optional."""
        return "" if self._style in (LLAMA, BARE) else self._marker(self._style.marker) + " "

    def _marker(self, text: str) -> str:
        """Return a marker as a term: the token where it is one, and its spelling unless special tokens are hidden."""
        token = self._marker_ids[text]
        if token is None:
            return _literal(text)
        return f"<[{token}]>" if token in self._hidden_ids else f"(<[{token}]> | {_literal(text)})"


def _head(name: str, key: str) -> str:
    """Return the beginning of a call, split as JSON is, so that an answer in JSON may begin in the same way."""
    pieces = ("{", '"name"', ": ", _literal(name), ", ", f'"{key}"', ": ")
    return " ".join(map(_literal, pieces))


def _literal(text: str) -> str:
    """Return a string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _name_pattern(name: str) -> str:
    """Return a regular expression for a function's name as JSON."""
    return _escaped(json.dumps(name, ensure_ascii=False))


def _escaped(text: str) -> str:
    """Return a text as a regular expression of a Lark grammar."""
    return re.escape(text).replace("/", "\\/")


def _argument_schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a function's arguments: an empty object for a function without any."""
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise InputError(
            f"The parameters of tool {function['name']!r} must be a JSON schema, not a {type(schema).__name__}."
        )
    takes_arguments = schema.get("properties") or set(schema) - SCHEMA_KEYS_WITHOUT_ARGUMENTS
    if not takes_arguments:
        return NO_ARGUMENTS
    where = f"The schema of tool {function['name']!r}"
    if function.get("strict") is True:
        check_strict(schema, where)
    check_schema(schema, where)
    return schema
