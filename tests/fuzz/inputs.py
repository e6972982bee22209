"""Strategies for inputs that no caller should send: JSON and what is none, text of all kinds, templates, tool calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import strategies as st

MARKERS = (
    "<|im_end|>",
    "<|im_start|>",
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<think>",
    "</think>",
    "```json",
)
WORDS = ("weather", "name", "arguments", "{", "}", "[", "]", '"', ":", ",", "\n", " ", "1e999", "null", "\\ud800")


def deep(levels: int) -> Any:
    """Return JSON of so many levels."""
    value: Any = "end"
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def circular() -> Any:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def mostly(value: Any, other: Any, times: int = 8) -> Any:
    """Return a strategy that draws from `value` so many times as often as from `other`."""
    return st.integers(0, times).flatmap(lambda at: other if at == times else value)


class Hostile:
    """An object whose own code fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


text = mostly(
    st.text(st.characters(codec="utf-8"), max_size=20)
    | st.lists(st.sampled_from(MARKERS + WORDS), max_size=12).map("".join),
    st.text(max_size=5)
    | st.sampled_from(["\ud800", "a\udfffb", "\0", "\x1b[31m", "\ufdd0\ufdd1", "e\u0301" * 50, "x" * 5000, ""]),
    24,
)
ODD: dict[str, Callable[[], Any]] = {
    "nan": lambda: math.nan,
    "infinity": lambda: -math.inf,
    "400 digits": lambda: 10**400,
    "5000 digits": lambda: -(10**5000),
    "64 bits": lambda: 2**64,
    "complex": lambda: 1j,
    "bytes": lambda: b"\xff\xfe",
    "bytearray": lambda: bytearray(b"x"),
    "set": lambda: {1, 2},
    "object": object,
    "hostile": Hostile,
    "class": lambda: Hostile,
    "function": lambda: len,
    "range": lambda: range(3),
    "tuple": lambda: (1, "a"),
    "ellipsis": lambda: ...,
    "circular": circular,
    "generator": lambda: (each for each in "ab"),
    **{f"{levels} levels": partial(deep, levels) for levels in (50, 99, 101, 300, 990, 5000)},
}
odd = st.sampled_from(sorted(ODD)).map(lambda name: ODD[name]())
scalar = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text)
anything = st.recursive(
    scalar | odd,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text | st.integers() | st.none(), inner, max_size=4),
    max_leaves=8,
)


def dicts(required: dict[str, Any], optional: dict[str, Any]) -> Any:
    """Return dicts that are nearly right: some values are of any kind, some keys are missing or unknown."""
    near = {key: mostly(value, anything, 24) for key, value in {**required, **optional}.items()}
    return st.fixed_dictionaries(
        {key: near[key] for key in required},
        optional={**{key: near[key] for key in optional}, **({"extra": scalar} if required else {})},
    )


call = dicts(
    {"function": dicts({"name": text, "arguments": anything | text}, {})}, {"id": text, "type": st.just("function")}
)
message = dicts(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": text | st.lists(dicts({"type": st.just("text"), "text": text}, {}) | text, max_size=3),
    },
    {"tool_calls": st.lists(call, max_size=2), "tool_call_id": text, "name": text, "reasoning_content": text},
)
QUESTION = {"role": "user", "content": "Hello"}
some = st.lists(message, max_size=4)
messages = mostly(some | some.map(lambda given: [*given, QUESTION]), anything)

schema_type = st.sampled_from(["string", "integer", "number", "boolean", "null", "array", "object", "odd"])
schema = st.recursive(
    dicts({}, {"type": schema_type | st.lists(schema_type, max_size=2), "enum": st.lists(scalar, max_size=3)}),
    lambda inner: dicts(
        {"type": st.sampled_from(["object", "array"])},
        {
            "properties": st.dictionaries(text, inner, max_size=3),
            "required": st.lists(text, max_size=2),
            "items": inner,
            "anyOf": st.lists(inner, max_size=2),
            "$ref": st.sampled_from(["#", "#/$defs/A", "http://x", ""]),
            "$defs": st.dictionaries(st.just("A"), inner, max_size=1),
            "pattern": text | st.sampled_from(["(", "^(?!a)", "a{1000000}", "(a*)*b", "\\p{L}"]),
            "minItems": st.integers(-2, 10**6),
            "maxLength": st.integers(-2, 10**6),
            "format": text,
        },
    ),
    max_leaves=5,
)
tool = dicts(
    {"type": st.just("function"), "function": dicts({"name": text}, {"description": text, "parameters": schema})}, {}
)
tools = mostly(st.none() | st.lists(tool, max_size=3), anything)
tool_choice = mostly(
    st.sampled_from([None, "auto", "required", "none"]),
    dicts({"type": st.just("function"), "function": dicts({"name": text}, {})}, {}) | anything,
)
response_format = mostly(
    st.none()
    | st.just({"type": "json_object"})
    | dicts({"type": st.just("json_schema"), "json_schema": dicts({"name": text, "schema": schema}, {})}, {}),
    anything,
)
numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 2**31, 2**64]), anything)

_EXPRESSIONS = [
    "messages",
    "messages[0].content",
    "messages|length",
    "tools",
    "1//0",
    "1.0/0",
    "range(99999)",
    "'x'*99",
    "messages[0]|tojson",
    "namespace()",
    "raise_exception('no')",
    "messages[-1].role|upper",
    "strftime_now('%Y')",
    "loop.index",
    "bos_token",
    "a.b.c",
    "none.x",
    "{}|items",
    "messages|map(attribute='x')|list|first",
    "'a'.join(messages)",
    "9**9**9",
    "f(3)",
    "messages[0].content.split('a')[7]",
    "'%s%s'|format(1)",
    "[1,2]|sum/0",
    "messages|groupby('role')",
    "dict(a=1)",
    "cycler(1).next()",
    "messages|batch(0)|list",
    "''.__class__",
    "self",
    "caller()",
    "'é'|urlencode",
    "10|round(400)",
    "'{0.x}'.format(1)",
    "[3]|random",
    "'x'|int(base=99)",
    "[1]|min-''",
]
_STATEMENTS = (
    "{{% for m in {0} %}}{1}{{% endfor %}}",
    "{{% if {0} %}}{1}{{% else %}}-{{% endif %}}",
    "{{% set x = {0} %}}{1}",
    "{{% macro f(a) %}}{1}{{% endmacro %}}{{{{ f({0}) }}}}",
    "{{% macro f(a) %}}{{{{ f(a) }}}}{1}{{% endmacro %}}{{{{ f({0}) }}}}",
    "{{% call f({0}) %}}{1}{{% endcall %}}",
    "{{% filter upper %}}{1}{{% endfilter %}}",
    "{{% generation %}}{1}{{% endgeneration %}}",
    "{{% include 'x' %}}{1}",
    "{{% break %}}{1}",
    "{{{{ {0} }}}}{1}",
)
template = st.recursive(
    st.sampled_from(_EXPRESSIONS).map("{{{{ {} }}}}".format) | text,
    lambda inner: st.builds(
        lambda form, expression, body: form.format(expression, body),
        st.sampled_from(_STATEMENTS),
        st.sampled_from(_EXPRESSIONS),
        inner,
    ),
    max_leaves=6,
)
