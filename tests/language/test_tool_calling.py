"""A model can only make calls that were asked for and fit their schema; redundant calls give way to text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
import torch

from tests.support.chat import LARGE_CACHE, dialogue, make_llm
from tests.support.scripted_model import scripted_answers
from tests.support.templates import SPECIAL_TOKENS, TOOLS
from tests.support.tools import (
    ALL_TOOLS,
    CALL,
    FORMAT,
    SAMPLED,
    WEATHER,
    name_and_arguments,
    question_and_result,
    with_results,
)
from zsmerge_llm import Grammar, Result, SamplingParams
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.language.output_format import FIRST_RESULT_INSTRUCTION
from zsmerge_llm.language.tool_calls import parse_tool_calls
from zsmerge_llm.types import Usage


def check(result: Result, tools: Sequence[dict[str, Any]] = ALL_TOOLS) -> None:
    """Every call is of a given tool and fits its schema."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
    for name, arguments in name_and_arguments(result.tool_calls):
        jsonschema.validate(arguments, schemas[name])
    assert not result.invalid_tool_calls
    assert not any(mark in result.text for mark in ("<tool_call>", "[TOOL_CALLS]", "arguments"))


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS])
def test_tool_choice_is_enforced_for_every_family(name: str) -> None:
    llm = make_llm(name)
    for seed in range(3):
        params = SAMPLED.replace(seed=seed)
        required = llm.chat("Hello", tools=ALL_TOOLS, tool_choice="required", sampling=params)
        assert required.tool_calls
        assert required.text == ""
        named = llm.chat(
            "Hello", tools=ALL_TOOLS, tool_choice={"type": "function", "function": {"name": "add"}}, sampling=params
        )
        assert {name for name, _ in name_and_arguments(named.tool_calls)} == {"add"}
        none = llm.chat("Hello", tools=ALL_TOOLS, tool_choice="none", sampling=params)
        assert none.tool_calls == []
        alone = llm.chat("Hello", tools=ALL_TOOLS, tool_choice="required", parallel_tool_calls=False, sampling=params)
        assert len(alone.tool_calls) == 1
        for result in (required, named, none, alone, llm.chat("Hello", tools=ALL_TOOLS, sampling=params)):
            check(result)


def test_a_call_that_has_begun_can_only_be_completed() -> None:
    """Qwen2.5-Coder's way: bare JSON, as soon as a tool is named."""
    llm = make_llm("qwen2.5")
    form = llm._load().output_formats.chat([{"role": "user", "content": "?"}], ALL_TOOLS)
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


def test_calls_within_few_tokens_are_complete_and_the_finish_reason_is_length() -> None:
    llm = make_llm("qwen2.5")
    for limit in (40, 45, 50, 60):
        result = llm.chat("Hello", tools=TOOLS, tool_choice="required", sampling=SAMPLED.replace(max_tokens=limit))
        check(result)
        assert result.finish_reason == ("tool_calls" if result.usage.completion_tokens < limit else "length")
    for limit in (1, 5, 15):
        short = llm.chat("Hello", tools=TOOLS, tool_choice="required", sampling=SAMPLED.replace(max_tokens=limit))
        assert (short.finish_reason, short.text, short.tool_calls) == ("length", "", [])
        assert short.invalid_tool_calls


def test_only_the_last_chunk_of_a_stream_holds_tool_calls() -> None:
    llm = make_llm("mistral-nemo")
    *chunks, last = llm.stream("Hello", tools=ALL_TOOLS, tool_choice="required", sampling=SAMPLED)
    assert not any(chunk.tool_calls or chunk.text for chunk in chunks)
    assert last.tool_calls
    assert last.finish_reason in ("tool_calls", "length")


def test_a_batch_supports_tools_and_response_formats() -> None:
    llm = make_llm("qwen2.5")
    for result in llm.batch(["Hello", "Good day to you"], tools=ALL_TOOLS, tool_choice="required", sampling=SAMPLED):
        assert result.tool_calls
        check(result)
    for result in llm.batch(["Hello", "Good day to you"], response_format=FORMAT, sampling=SAMPLED):
        assert set(json.loads(result.text)) <= {"x"}


def test_tools_with_a_response_format_give_either_calls_or_json() -> None:
    llm = make_llm("qwen2.5")
    for seed in range(6):
        result = llm.chat("Hello", tools=TOOLS, response_format=FORMAT, sampling=SAMPLED.replace(seed=seed))
        assert bool(result.tool_calls) != bool(result.text)
        if result.text:
            assert set(json.loads(result.text)) <= {"x"}


def test_an_answer_in_json_may_begin_like_a_call() -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, '{"name": "Ann"}'):
        result = llm.chat("Hello", tools=ALL_TOOLS, response_format=wanted)
    assert (result.text, result.tool_calls) == ('{"name": "Ann"}', [])
    with scripted_answers(llm, CALL):
        assert name_and_arguments(llm.chat("Hello", tools=ALL_TOOLS, response_format=wanted).tool_calls) == [WEATHER]


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
        ({"tools": TOOLS, "grammar": Grammar.choice("a")}, ConfigError, "not both"),
    ],
)
def test_invalid_and_contradictory_requests_are_refused(wanted: dict[str, Any], error: type, part: str) -> None:
    llm = make_llm()
    with pytest.raises(error, match=part):
        llm.stream("Hello", **wanted)
    assert len(llm.store) == 0


def test_after_a_tool_result_the_model_is_instructed_to_answer_in_text() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    messages = dialogue("Hello")
    first = llm.chat(messages, tools=TOOLS, tool_choice="required", sampling=SAMPLED, parallel_tool_calls=False)
    messages = with_results(messages, first)
    for seed in range(5):
        answer = llm.chat(messages, tools=TOOLS, sampling=SAMPLED.replace(seed=seed), session="it")
        assert not answer.text.lstrip().startswith(("{", "[", "```"))
    assert llm.tokenizer.decode(llm.session("it").tokens).count(FIRST_RESULT_INSTRUCTION) == 1


def test_after_a_tool_result_another_call_is_allowed() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    for text in ('{"name": "now", "arguments": {}}', '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'):
        with scripted_answers(llm, text):
            assert name_and_arguments(llm.chat(question_and_result(), tools=ALL_TOOLS).tool_calls) == [("now", {})]
    elsewhere = CALL.replace("Zürich", "Bern")
    with scripted_answers(llm, elsewhere):
        assert name_and_arguments(llm.chat(question_and_result(), tools=ALL_TOOLS).tool_calls) == [
            ("weather", {"place": "Bern"})
        ]


@pytest.mark.parametrize("name", ["qwen2.5", "smollm2", "llama3"])
def test_a_repeated_call_is_replaced_by_a_text_answer(name: str) -> None:
    llm = make_llm(name, cache=LARGE_CACHE)
    spaced = '{"name": "weather",  "arguments":  {"place":  "Zürich"}}'
    for text in (CALL, spaced):
        with scripted_answers(llm, text, "It is 18 degrees."):
            *pieces, last = llm.stream(question_and_result(), tools=ALL_TOOLS, session="it")
        assert "".join(piece.text for piece in pieces) + last.text == "It is 18 degrees."
        assert (last.tool_calls, last.finish_reason) == ([], "stop")
        tokens = llm.session("it").tokens
        assert llm.tokenizer.decode(tokens[last.usage.prompt_tokens :]) == "It is 18 degrees."
        reply = {"role": "assistant", "content": "It is 18 degrees."}
        further = [*question_and_result(), reply, *dialogue("Thanks")]
        continued = llm.chat(further, tools=ALL_TOOLS, sampling=SAMPLED.replace(max_tokens=2))
        assert continued.usage.reuse == "continued"


def test_after_two_calls_further_ones_need_the_familys_marker() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    call = {"id": "c2", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    again = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    messages = [*question_and_result(), *again, {"role": "tool", "tool_call_id": "c2", "content": "noon"}]
    third = CALL.replace("Zürich", "Bern")
    with scripted_answers(llm, third, "It is 18 degrees."):
        result = llm.chat(messages, tools=ALL_TOOLS)
    assert (result.text, result.tool_calls) == ("It is 18 degrees.", [])
    with scripted_answers(llm, f"<tool_call>\n{third}\n</tool_call>"):
        assert name_and_arguments(llm.chat(messages, tools=ALL_TOOLS).tool_calls) == [("weather", {"place": "Bern"})]


def test_text_that_resembles_a_call_is_text_when_tool_choice_is_none() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    text = 'You can use this:\n\n```json\n{\n  "name": "John",\n\n\n  "of": [{"name": "weath"}]}\n```\n\n\nOr not.'
    with scripted_answers(llm, text):
        assert llm.chat("Hello", tools=ALL_TOOLS, tool_choice="none").text == text


def test_of_text_with_a_repeated_call_the_text_remains() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, f"It is warm.\n{CALL}"):
        result = llm.chat(question_and_result(), tools=ALL_TOOLS)
    assert (result.text, result.tool_calls, result.finish_reason) == ("It is warm.", [], "stop")


def test_a_call_of_an_earlier_turn_can_be_repeated() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    reply = {"role": "assistant", "content": "It is."}
    with scripted_answers(llm, CALL):
        result = llm.chat([*question_and_result(), reply, *dialogue("And now?")], tools=ALL_TOOLS)
    assert name_and_arguments(result.tool_calls) == [WEATHER]


def test_in_a_batch_repeated_calls_are_replaced_by_text_answers() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, CALL, CALL, "It is 18 degrees.", "It is 18 degrees."):
        results = llm.batch([question_and_result(), question_and_result()], tools=ALL_TOOLS)
    assert [(result.text, result.tool_calls) for result in results] == [("It is 18 degrees.", [])] * 2


def test_a_template_without_system_messages_gets_the_tools_in_the_user_message() -> None:
    text = make_llm("gemma2")._load().template.render(dialogue("Hello"), TOOLS)
    assert text.index("# Tools") < text.index("Hello")
