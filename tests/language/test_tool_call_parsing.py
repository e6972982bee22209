"""Tool calls are found in every family's style, wherever pieces end, and kept out of the text."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.templates import FOLDER, SPECIAL_TOKENS
from tests.support.tools import CALL, WEATHER, name_and_arguments
from zsmerge_llm.language.tool_call_stream import RedundancyGate, canonical_call, merge_deltas
from zsmerge_llm.language.tool_calls import (
    BARE,
    HERMES,
    LLAMA,
    MISTRAL,
    ToolCallParser,
    parse_tool_calls,
    tool_call_style,
)
from zsmerge_llm.types import ToolCallDelta

FOUND: list[tuple[str, str, list[tuple[str, dict[str, Any]]]]] = [
    (f"<tool_call>\n{CALL}\n</tool_call>", "", [WEATHER]),
    (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "Let me see.", [WEATHER] * 2),
    (f"[TOOL_CALLS] [{CALL}, {CALL}]", "", [WEATHER] * 2),
    (f'[TOOL_CALLS][{CALL[:-1]}, "id": "abcdefg01"}}]', "", [WEATHER]),
    ('<|python_tag|>{"name": "now", "parameters": {}}; {"name": "now"}', "", [("now", {})] * 2),
    ('{"name": "weather", "parameters": {"place": "Zürich"}}', "", [WEATHER]),
    (f"{CALL}\n{CALL}\n", "", [WEATHER] * 2),
    (f"I shall look.\n\n  {CALL}", "I shall look.", [WEATHER]),
    (f"```json\n{CALL}\n```", "", [WEATHER]),
    ('Here:\n```\n{\n  "name": "weather",\n  "arguments": {\n    "place": "Zürich"\n  }\n}\n```', "Here:", [WEATHER]),
    ('{"type": "function", "function": {"name": "now", "arguments": "{}"}}', "", [("now", {})]),
    ("<tool_call>[" + CALL + "]</tool_call> Wait.", "Wait.", [WEATHER]),
]
TEXTS = [
    "It is 18 degrees.",
    '{"name": "John", "age": 3}',
    '```json\n{"name": "John"}\n```\n',
    '{"weather": "fine"}',
    'Write {"name": "weather"} to call it.',
    "if a < b: [1, 2]\n```python\nprint(1)\n```",
    "<tool", "", "  \n",
]  # fmt: skip
BROKEN = [
    '<tool_call>\n{"name": "weather", "argu',
    "<tool_call>weather(Zürich)</tool_call>",
    '{"name": "weather", "arguments": "Zürich"}',
    '{"name": "weather", "arguments": [1]}',
    "[TOOL_CALLS] weather",
    '<|python_tag|>weather.call(place="Zürich")',
    '<tool_call>{"arguments": {}}</tool_call>',
]


def streamed(text: str, cuts: Sequence[int]) -> tuple[str, Any]:
    """What is shown of a text that comes in pieces, and the whole answer."""
    stream, places = (
        ToolCallParser(["weather", "now"]),
        sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)}),
    )
    shown = "".join(stream.push(text[a:b]) for a, b in itertools.pairwise(places))
    rest, parsed = stream.finish()
    return shown + rest, parsed


@pytest.mark.parametrize(("text", "content", "calls"), FOUND)
def test_tool_calls_are_parsed_in_every_style(text: str, content: str, calls: list[Any]) -> None:
    parsed = parse_tool_calls(text, ["weather", "now"])
    assert (parsed.content, name_and_arguments(parsed.calls), parsed.invalid) == (content, calls, [])
    assert len({call["id"] for call in parsed.calls}) == len(calls)
    assert all(call["type"] == "function" for call in parsed.calls)


@pytest.mark.parametrize("text", TEXTS)
def test_text_without_calls_is_unchanged(text: str) -> None:
    parsed = parse_tool_calls(text, ["weather", "now"])
    assert (parsed.content, parsed.calls, parsed.invalid) == (text, [], [])


@pytest.mark.parametrize("text", BROKEN)
def test_a_malformed_call_is_returned_with_an_error_and_raises_nothing(text: str) -> None:
    parsed = parse_tool_calls(text, ["weather", "now"])
    assert (parsed.content, parsed.calls) == ("", [])
    (call,) = parsed.invalid
    assert call["error"]
    assert call["function"]["name"] in (None, "weather")


def test_bare_and_fenced_json_that_names_no_given_tool_is_text() -> None:
    for text in (CALL, f"```json\n{CALL}\n```"):
        assert parse_tool_calls(text, ["now"]).content == text


@given(text=st.sampled_from([*(text for text, _, _ in FOUND), *TEXTS, *BROKEN]), cuts=st.lists(st.integers(0, 200)))
@settings(deadline=None)
def test_streamed_pieces_add_up_to_the_parsed_text_and_never_hold_a_call(text: str, cuts: list[int]) -> None:
    shown, parsed = streamed(text, cuts)
    assert shown == parsed.content == parse_tool_calls(text, ["weather", "now"]).content


@given(
    texts=st.lists(st.sampled_from([*(text for text, _, _ in FOUND), *TEXTS, *BROKEN]), max_size=3),
    cuts=st.lists(st.integers(0, 400)),
)
@settings(deadline=None)
def test_pieces_of_calls_add_up_to_the_parsed_calls_wherever_they_are_cut(texts: list[str], cuts: list[int]) -> None:
    text = "\n".join(texts)
    parser, places = (
        ToolCallParser(["weather", "now"]),
        sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)}),
    )
    for a, b in itertools.pairwise(places):
        parser.push(text[a:b])
    _, parsed = parser.finish()
    whole, added = parse_tool_calls(text, ["weather", "now"]), merge_deltas(parser.deltas)
    assert [call["function"] for call in parsed.calls] == [call["function"] for call in whole.calls]
    assert parsed.content == whole.content
    pieces = {(delta.id, delta.name, delta.arguments) for delta in added}
    assert pieces >= {(call["id"], *call["function"].values()) for call in parsed.calls}
    assert len(added) <= len(parsed.calls) + len(parsed.invalid)


@given(
    text=st.text(st.sampled_from('<tool_call>{}[]"name:weather\n `TOOL_CALLS,'), max_size=60),
    cuts=st.lists(st.integers(0, 60)),
)
@settings(deadline=None)
def test_no_text_breaks_the_parser(text: str, cuts: list[int]) -> None:
    shown, parsed = streamed(text, cuts)
    assert shown == parsed.content


def test_plain_text_is_passed_on_at_once() -> None:
    stream = ToolCallParser(["weather"])
    assert [stream.push(piece) for piece in ("It is", " warm", '{"na', "me", '": "J')] == [
        "It is", " warm", '{"na', "me", '": "J',
    ]  # fmt: skip
    early = ToolCallParser(["weather"])
    assert [early.push(piece) for piece in ('{"na', 'me": "', "Jo")] == ["", "", '{"name": "Jo']


def test_the_tool_call_style_is_known_from_the_chat_template() -> None:
    kinds = {name: tool_call_style((FOLDER / f"{name}.jinja").read_text(encoding="utf-8")) for name in SPECIAL_TOKENS}
    assert kinds.pop("llama3") == LLAMA
    assert {kinds.pop("mistral-v0.3"), kinds.pop("mistral-nemo")} == {MISTRAL}
    assert set(kinds.values()) == {HERMES}
    assert tool_call_style("{{ tools }}") == BARE


@given(value=st.text(st.sampled_from('ab "\\ü\n'), max_size=4), other=st.text(st.sampled_from('ab "\\ü\n'), max_size=4))
def test_a_repeated_call_is_never_passed_on_and_a_new_one_always(value: str, other: str) -> None:
    previous = canonical_call({"function": {"name": "f", "arguments": {"x": value}}})
    for spaced in (True, False):
        gate = RedundancyGate([previous])
        text = json.dumps({"x": other}, ensure_ascii=spaced, indent=1 if spaced else None)
        passed = [delta for letter in text for delta in gate.push([ToolCallDelta(0, letter, name="f")])]
        assert "".join(delta.arguments for delta in passed) == ("" if value == other else text)
