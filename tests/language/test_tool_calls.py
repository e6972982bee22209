"""Tool calls: read in every family's form, kept out of the text, made as asked, and remembered by the conversation."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.scripted_model import saying
from tests.support.talk import ROOMY, Talk, said, talker
from tests.support.templates import ENDS, FOLDER, TOOLS
from zsmerge_llm import LLM, Result, SamplingParams
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.language.output_format import FIRST_RESULT_INSTRUCTION, JSON_INSTRUCTION
from zsmerge_llm.language.tool_calls import (
    BARE,
    HERMES,
    LLAMA,
    MISTRAL,
    ToolCallParser,
    parse_tool_calls,
    tool_call_style,
)
from zsmerge_llm.types import Usage

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "größe": {"enum": ["klein", "groß"]}},
            "required": ["a", "größe"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "The time."}}
BOTH = [*TOOLS, ADD, NOW]
FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "it", "schema": {"type": "object", "properties": {"x": {"type": "boolean"}}}},
}
WARM = SamplingParams(max_tokens=80, temperature=1.0, seed=3)
WEATHER = ("weather", {"place": "Zürich"})
CALL = '{"name": "weather", "arguments": {"place": "Zürich"}}'
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


def made(calls: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


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
def test_calls_are_found_in_every_form(text: str, content: str, calls: list[Any]) -> None:
    parsed = parse_tool_calls(text, ["weather", "now"])
    assert (parsed.content, made(parsed.calls), parsed.invalid) == (content, calls, [])
    assert len({call["id"] for call in parsed.calls}) == len(calls)
    assert all(call["type"] == "function" for call in parsed.calls)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_left_as_it_is(text: str) -> None:
    parsed = parse_tool_calls(text, ["weather", "now"])
    assert (parsed.content, parsed.calls, parsed.invalid) == (text, [], [])


@pytest.mark.parametrize("text", BROKEN)
def test_a_call_that_cannot_be_read_is_reported_and_raises_nothing(text: str) -> None:
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
def test_a_stream_shows_what_the_whole_answer_shows_and_never_a_call(text: str, cuts: list[int]) -> None:
    shown, parsed = streamed(text, cuts)
    assert shown == parsed.content == parse_tool_calls(text, ["weather", "now"]).content


@given(
    text=st.text(st.sampled_from('<tool_call>{}[]"name:weather\n `TOOL_CALLS,'), max_size=60),
    cuts=st.lists(st.integers(0, 60)),
)
@settings(deadline=None)
def test_no_text_breaks_the_reader(text: str, cuts: list[int]) -> None:
    shown, parsed = streamed(text, cuts)
    assert shown == parsed.content


def test_plain_text_is_shown_at_once() -> None:
    stream = ToolCallParser(["weather"])
    assert [stream.push(piece) for piece in ("It is", " warm", '{"na', "me", '": "J')] == [
        "It is", " warm", '{"na', "me", '": "J',
    ]  # fmt: skip
    early = ToolCallParser(["weather"])
    assert [early.push(piece) for piece in ('{"na', 'me": "', "Jo")] == ["", "", '{"name": "Jo']


def test_the_family_is_told_by_the_template() -> None:
    kinds = {name: tool_call_style((FOLDER / f"{name}.jinja").read_text(encoding="utf-8")) for name in ENDS}
    assert kinds.pop("llama3") == LLAMA
    assert {kinds.pop("mistral-v0.3"), kinds.pop("mistral-nemo")} == {MISTRAL}
    assert set(kinds.values()) == {HERMES}
    assert tool_call_style("{{ tools }}") == BARE


# -- what a model can be made to do ----------------------------------------------------------------------------------


def check(result: Result, tools: Sequence[dict[str, Any]] = BOTH) -> None:
    """Every call is of a given tool and fits its schema."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
    for name, arguments in made(result.tool_calls):
        jsonschema.validate(arguments, schemas[name])
    assert not result.invalid_tool_calls
    assert not any(mark in result.text for mark in ("<tool_call>", "[TOOL_CALLS]", "arguments"))


@pytest.mark.parametrize("name", [*ENDS])
def test_the_choice_of_tools_is_kept_to_by_every_family(name: str) -> None:
    llm = talker(name)
    for seed in range(3):
        params = WARM.replace(seed=seed)
        required = llm.chat("Hello", tools=BOTH, tool_choice="required", sampling=params)
        assert required.tool_calls
        assert required.text == ""
        named = llm.chat(
            "Hello", tools=BOTH, tool_choice={"type": "function", "function": {"name": "add"}}, sampling=params
        )
        assert {name for name, _ in made(named.tool_calls)} == {"add"}
        none = llm.chat("Hello", tools=BOTH, tool_choice="none", sampling=params)
        assert none.tool_calls == []
        alone = llm.chat("Hello", tools=BOTH, tool_choice="required", parallel_tool_calls=False, sampling=params)
        assert len(alone.tool_calls) == 1
        for result in (required, named, none, alone, llm.chat("Hello", tools=BOTH, sampling=params)):
            check(result)


def test_a_model_that_begins_a_call_can_only_finish_it() -> None:
    """Qwen2.5-Coder's way: bare JSON, as soon as a tool is named."""
    llm = talker("qwen2.5")
    form = llm._load().output_formats.chat([{"role": "user", "content": "?"}], BOTH)
    for text in ('{"name": "weather"', '```json\n{\n  "name": "weather"', 'Hm.\n{"name": "weather"', "So\n<tool_call>"):
        constraint = form.constraint(SamplingParams(max_tokens=200))
        assert constraint is not None
        said = llm._load().template.encode(text)
        assert [constraint.accept(token) for token in said] == said
        generator = torch.Generator().manual_seed(1)
        while not constraint.complete:
            logits = constraint.mask(torch.rand(len(llm.tokenizer), generator=generator))
            said.append(constraint.accept(int(logits.argmax())))
        parsed = parse_tool_calls(llm.tokenizer.decode(said), ["weather", "add", "now"])
        assert len(parsed.calls) == 1, llm.tokenizer.decode(said)
        assert not parsed.invalid
        check(Result("", "stop", Usage(1, 0, 1, 0, 0.0, 0.0, 0), parsed.calls))


def test_calls_cut_short_are_whole_and_the_answer_says_that_it_was_cut() -> None:
    llm = talker("qwen2.5")
    for limit in (40, 45, 50, 60):
        result = llm.chat("Hello", tools=TOOLS, tool_choice="required", sampling=WARM.replace(max_tokens=limit))
        check(result)
        assert result.finish_reason == ("tool_calls" if result.usage.completion_tokens < limit else "length")
    for limit in (1, 5, 15):
        short = llm.chat("Hello", tools=TOOLS, tool_choice="required", sampling=WARM.replace(max_tokens=limit))
        assert (short.finish_reason, short.text, short.tool_calls) == ("length", "", [])
        assert short.invalid_tool_calls


def test_a_stream_gives_the_calls_with_its_last_chunk_and_never_shows_them() -> None:
    llm = talker("mistral-nemo")
    *chunks, last = llm.stream("Hello", tools=BOTH, tool_choice="required", sampling=WARM)
    assert not any(chunk.tool_calls or chunk.text for chunk in chunks)
    assert last.tool_calls
    assert last.finish_reason in ("tool_calls", "length")


def test_a_batch_makes_calls_and_keeps_to_formats() -> None:
    llm = talker("qwen2.5")
    for result in llm.batch(["Hello", "Good day to you"], tools=BOTH, tool_choice="required", sampling=WARM):
        assert result.tool_calls
        check(result)
    for result in llm.batch(["Hello", "Good day to you"], response_format=FORMAT, sampling=WARM):
        assert set(json.loads(result.text)) <= {"x"}


def test_tools_and_a_response_format_together_give_the_one_or_the_other() -> None:
    llm = talker("qwen2.5")
    for seed in range(6):
        result = llm.chat("Hello", tools=TOOLS, response_format=FORMAT, sampling=WARM.replace(seed=seed))
        assert bool(result.tool_calls) != bool(result.text)
        if result.text:
            assert set(json.loads(result.text)) <= {"x"}


def test_an_answer_in_json_may_begin_as_a_call_does() -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    llm = talker("qwen2.5", cache=ROOMY)
    with saying(llm, '{"name": "Ann"}'):
        result = llm.chat("Hello", tools=BOTH, response_format=wanted)
    assert (result.text, result.tool_calls) == ('{"name": "Ann"}', [])
    with saying(llm, CALL):
        assert made(llm.chat("Hello", tools=BOTH, response_format=wanted).tool_calls) == [WEATHER]


@pytest.mark.parametrize(
    ("wanted", "error", "part"),
    [
        ({"tool_choice": "required"}, InputError, "there are no tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, InputError, "tool_choice must be"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, InputError, "none of the"),
        ({"tools": [*TOOLS, *TOOLS]}, InputError, "same name"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": "y"}}]}, InputError, "JSON schema"),
        ({"response_format": {"type": "xml"}}, InputError, "response_format must be"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, InputError, "response_format"),
        ({"tools": TOOLS, "grammar": object()}, ConfigError, "not both"),
    ],
)
def test_requests_that_contradict_themselves_are_refused(wanted: dict[str, Any], error: type, part: str) -> None:
    llm = talker()
    with pytest.raises(error, match=part):
        llm.stream("Hello", **wanted)
    assert len(llm.store) == 0


# -- what the conversation remembers ---------------------------------------------------------------------------------


def with_results(messages: list[dict[str, Any]], result: Result, content: str = "18 degrees") -> list[dict[str, Any]]:
    """The conversation as callers go on with it."""
    answers = [{"role": "tool", "tool_call_id": call["id"], "content": content} for call in result.tool_calls]
    reply = {"role": "assistant", "content": result.text or None, "tool_calls": result.tool_calls}
    return [*messages, reply, *answers]


@pytest.mark.parametrize("name", [*ENDS])
def test_a_conversation_with_calls_goes_on_without_reading_anything_twice(name: str) -> None:
    llm = talker(name, cache=ROOMY)
    messages = said("Hello")
    first = llm.chat(messages, tools=BOTH, tool_choice="required", sampling=WARM, session="it")
    assistant_message = llm.session("it").tokens
    messages = with_results(messages, first)
    second = llm.chat(messages, tools=BOTH, tool_choice="none", sampling=WARM.replace(max_tokens=4))
    tokens = llm.session("it").tokens
    assert second.usage.reuse == "continued"
    assert tokens[: len(assistant_message)] == assistant_message  # what was generated is never made into tokens again
    assert second.usage.cached_tokens <= len(assistant_message)
    text = llm.tokenizer.decode(tokens)
    assert text.count("18 degrees") == len(first.tool_calls)
    held = llm.session("it").cache
    fresh = llm.engine.read(llm.engine.new_cache(), tokens[: held.seen])
    torch.testing.assert_close(held.logits[0].float(), fresh, rtol=1e-3, atol=1e-3)


def test_a_format_is_told_to_the_model_unless_the_messages_say_it() -> None:
    llm = talker("qwen2.5", cache=ROOMY)
    llm.chat("Hello", response_format=FORMAT, sampling=WARM, session="it")
    text = llm.tokenizer.decode(llm.session("it").tokens)
    assert json.dumps(FORMAT["json_schema"]["schema"]) in text
    told = f"Hello {json.dumps(FORMAT['json_schema']['schema'])}"
    llm.chat(told, response_format=FORMAT, sampling=WARM, session="told")
    assert llm.tokenizer.decode(llm.session("told").tokens).count('"boolean"') == 1
    llm.chat("Give me JSON.", response_format={"type": "json_object"}, sampling=WARM, session="mode")
    assert JSON_INSTRUCTION not in llm.tokenizer.decode(llm.session("mode").tokens)


def test_a_conversation_with_a_format_goes_on_with_and_without_it() -> None:
    talk = Talk(talker("qwen2.5", cache=ROOMY), "it")
    talk.tell("One")
    for wanted in (FORMAT, None, {"type": "json_object"}, FORMAT):
        before = talk.llm.session("it").tokens
        result = talk.tell("And", response_format=wanted, sampling=WARM)
        assert result.usage.reuse == "continued"
        assert talk.llm.session("it").tokens[: len(before)] == before
    assert len(talk.llm.store) == 1


def test_the_same_question_with_another_format_is_not_the_same_prompt() -> None:
    talk = Talk(talker("qwen2.5", cache=ROOMY), "it", said("One", "Two", "Three"))
    plain = talk.llm.chat(talk.messages, sampling=WARM, session="it")
    formed = talk.llm.chat(talk.messages, sampling=WARM, session="it", response_format=FORMAT)
    assert formed.usage.prompt_tokens > plain.usage.prompt_tokens
    assert formed.usage.cached_tokens < plain.usage.prompt_tokens
    again = talk.llm.chat(talk.messages, sampling=WARM, session="it", response_format=FORMAT)
    assert again.usage.reuse == "restored"
    assert again.usage.cached_tokens == again.usage.prompt_tokens == formed.usage.prompt_tokens
    assert again.text == formed.text


def test_after_a_result_the_model_is_asked_for_words() -> None:
    llm = talker("qwen2.5", cache=ROOMY)
    messages = said("Hello")
    first = llm.chat(messages, tools=TOOLS, tool_choice="required", sampling=WARM, parallel_tool_calls=False)
    messages = with_results(messages, first)
    for seed in range(5):
        answer = llm.chat(messages, tools=TOOLS, sampling=WARM.replace(seed=seed), session="it")
        assert not answer.text.lstrip().startswith(("{", "[", "```"))
    assert llm.tokenizer.decode(llm.session("it").tokens).count(FIRST_RESULT_INSTRUCTION) == 1


def asked_and_told() -> list[dict[str, Any]]:
    """A question, the call for it, and its result."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Zürich"}'}}
    reply = {"role": "assistant", "content": None, "tool_calls": [call]}
    return [*said("Is it warm in Zürich?"), reply, {"role": "tool", "tool_call_id": "c1", "content": "18 degrees"}]


def test_after_a_result_another_call_may_follow() -> None:
    llm = talker("qwen2.5", cache=ROOMY)
    for text in ('{"name": "now", "arguments": {}}', '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'):
        with saying(llm, text):
            assert made(llm.chat(asked_and_told(), tools=BOTH).tool_calls) == [("now", {})]
    elsewhere = CALL.replace("Zürich", "Bern")
    with saying(llm, elsewhere):
        assert made(llm.chat(asked_and_told(), tools=BOTH).tool_calls) == [("weather", {"place": "Bern"})]


@pytest.mark.parametrize("name", ["qwen2.5", "smollm2", "llama3"])
def test_a_call_that_was_just_made_gives_way_to_words(name: str) -> None:
    llm = talker(name, cache=ROOMY)
    spaced = '{"name": "weather",  "arguments":  {"place":  "Zürich"}}'
    for text in (CALL, spaced):
        with saying(llm, text, "It is 18 degrees."):
            *pieces, last = llm.stream(asked_and_told(), tools=BOTH, session="it")
        assert "".join(piece.text for piece in pieces) + last.text == "It is 18 degrees."
        assert (last.tool_calls, last.finish_reason) == ([], "stop")
        tokens = llm.session("it").tokens
        assert llm.tokenizer.decode(tokens[last.usage.prompt_tokens :]) == "It is 18 degrees."
        reply = {"role": "assistant", "content": "It is 18 degrees."}
        further = [*asked_and_told(), reply, *said("Thanks")]
        is_multi_turn = llm.chat(further, tools=BOTH, sampling=WARM.replace(max_tokens=2))
        assert is_multi_turn.usage.reuse == "continued"


def test_after_two_calls_only_tagged_ones_may_follow_where_a_family_writes_tags() -> None:
    llm = talker("qwen2.5", cache=ROOMY)
    call = {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    again = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    messages = [*asked_and_told(), *again, {"role": "tool", "tool_call_id": "c2", "content": "noon"}]
    third = CALL.replace("Zürich", "Bern")
    with saying(llm, third, "It is 18 degrees."):
        result = llm.chat(messages, tools=BOTH)
    assert (result.text, result.tool_calls) == ("It is 18 degrees.", [])
    with saying(llm, f"<tool_call>\n{third}\n</tool_call>"):
        assert made(llm.chat(messages, tools=BOTH).tool_calls) == [("weather", {"place": "Bern"})]


def test_no_call_is_made_where_none_may_be_whatever_the_text_looks_like() -> None:
    llm = talker("qwen2.5", cache=ROOMY)
    text = 'You can use this:\n\n```json\n{\n  "name": "John",\n\n\n  "of": [{"name": "weath"}]}\n```\n\n\nOr not.'
    with saying(llm, text):
        assert llm.chat("Hello", tools=BOTH, tool_choice="none").text == text


def test_a_repeated_call_behind_words_leaves_the_words() -> None:
    llm = talker("qwen2.5", cache=ROOMY)
    with saying(llm, f"It is warm.\n{CALL}"):
        result = llm.chat(asked_and_told(), tools=BOTH)
    assert (result.text, result.tool_calls, result.finish_reason) == ("It is warm.", [], "stop")


def test_a_call_of_an_earlier_turn_may_be_made_again() -> None:
    llm = talker("qwen2.5", cache=ROOMY)
    reply = {"role": "assistant", "content": "It is."}
    with saying(llm, CALL):
        result = llm.chat([*asked_and_told(), reply, *said("And now?")], tools=BOTH)
    assert made(result.tool_calls) == [WEATHER]


def test_in_a_batch_repeated_calls_give_way_to_words_too() -> None:
    llm = talker("qwen2.5", cache=ROOMY)
    with saying(llm, CALL, CALL, "It is 18 degrees.", "It is 18 degrees."):
        results = llm.batch([asked_and_told(), asked_and_told()], tools=BOTH)
    assert [(result.text, result.tool_calls) for result in results] == [("It is 18 degrees.", [])] * 2


def test_a_template_without_system_messages_is_told_of_tools_by_the_user() -> None:
    text = talker("gemma2")._load().template.render(said("Hello"), TOOLS)
    assert text.index("# Tools") < text.index("Hello")


# -- a real model ----------------------------------------------------------------------------------------------------


def _tool(name: str, description: str, argument: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


REAL = [
    _tool("get_weather", "Get the current weather of a city.", "city"),
    _tool("calculator", "Evaluate an arithmetic expression.", "expression"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "name", "argument", "result", "answer"),
    [
        ("What is the weather in Paris?", "get_weather", "Paris", "18 degrees, sunny", "18"),
        ("What is 17 * 23?", "calculator", "17", "391", "391"),
    ],
)
def test_qwen_chooses_the_right_tool_and_answers_in_words_after_the_result(
    qwen_coder: LLM, question: str, name: str, argument: str, result: str, answer: str
) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    first = qwen_coder.chat(messages, tools=REAL, sampling=SamplingParams(max_tokens=100))
    assert first.finish_reason == "tool_calls"
    assert first.text == ""
    ((called, arguments),) = made(first.tool_calls)
    assert called == name
    assert argument in next(iter(arguments.values()))
    last, calls = first, 1
    while last.tool_calls and calls < 4:  # it has the calculator calculate its own result, too
        messages = with_results(messages, last, result)
        last, calls = qwen_coder.chat(messages, tools=REAL, sampling=SamplingParams(max_tokens=60)), calls + 1
        assert last.usage.reuse == "continued"
    assert last.tool_calls == []
    assert answer in last.text


@pytest.mark.slow
def test_qwen_makes_all_the_calls_a_question_needs_and_then_answers_in_words(qwen_coder: LLM) -> None:
    results = {"get_weather": "18 degrees, sunny", "calculator": "391"}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Paris, and what is 17 * 23?"}]
    calls: list[str] = []
    for _ in range(4):
        answer = qwen_coder.chat(messages, tools=REAL, sampling=SamplingParams(max_tokens=100))
        if not answer.tool_calls:
            break
        messages.append({"role": "assistant", "content": answer.text, "tool_calls": answer.tool_calls})
        for call in answer.tool_calls:
            calls.append(call["function"]["name"])
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": results[calls[-1]]})
    assert calls[:2] == ["get_weather", "calculator"]
    assert answer.text
    assert answer.usage.reuse == "continued"


@pytest.mark.slow
def test_qwen_needs_no_tool_for_a_greeting_and_keeps_to_a_schema(qwen_coder: LLM) -> None:
    greeting = qwen_coder.chat("Hello, who are you?", tools=REAL, sampling=SamplingParams(max_tokens=60))
    assert (greeting.tool_calls, greeting.finish_reason) == ([], "stop")
    properties = {"city": {"type": "string"}, "country": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["city", "country"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    place = qwen_coder.chat("Where is the Eiffel Tower?", response_format=wanted)
    assert json.loads(place.text) == {"city": "Paris", "country": "France"}
