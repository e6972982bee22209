"""Families mark reasoning in their own ways; a request says how much of it there is, in each interface's words."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.language.test_reasoning import FORMAT, QWEN3, reasoning_model
from tests.support.chat import LARGE_CACHE, dialogue, make_llm
from tests.support.scripted_model import scripted_answers
from tests.support.templates import FOLDER, TOOLS
from tests.support.tools import CALL, WEATHER, name_and_arguments, with_results
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.language.harmony import HarmonyParser
from zsmerge_llm.language.reasoning_tags import effort_args, reasoning_mode, reasoning_tags

THOUGHT, ANSWER, JSON = "Two and two, I think.", "It is 4.", '{"x": true}'
TOKENS = SamplingParams(max_tokens=400)
FAMILIES = {
    "qwen3": "<think>\n{}\n</think>\n\n{}",
    "deepseek-r1": "{}\n</think>\n\n{}",
    "smollm3": "<think>\n{}\n</think>\n{}",
    "granite3.3": "<think>{}</think>\n\n<response>{}</response>",
    "magistral": "[THINK]{}[/THINK]{}",
    "gpt-oss": "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
}
"""By template: what its model writes, with reasoning and answer."""


def model(name: str) -> LLM:
    return reasoning_model() if name == "qwen3" else make_llm(name, cache=LARGE_CACHE)


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", FAMILIES)
def test_reasoning_is_split_off_in_the_tags_of_each_family(name: str) -> None:
    llm = model(name)
    with scripted_answers(llm, FAMILIES[name].format(THOUGHT, ANSWER)):
        *pieces, last = llm.stream("?", sampling=TOKENS)
    chunks = [*pieces, last]
    assert "".join(chunk.reasoning for chunk in chunks) == THOUGHT
    assert "".join(chunk.text for chunk in chunks) == ANSWER
    assert last.usage is not None
    assert 0 < last.usage.reasoning_tokens < last.usage.completion_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_without_reasoning_is_whole(name: str) -> None:
    llm = model(name)
    wrapped = f"<response>{ANSWER}</response>" if name == "granite3.3" else ANSWER
    wrapped = f"</think>{wrapped}" if name == "deepseek-r1" else wrapped
    wrapped = f"<|channel|>final<|message|>{wrapped}" if name == "gpt-oss" else wrapped
    with scripted_answers(llm, wrapped):
        result = llm.chat("?", sampling=TOKENS)
    assert (result.text, result.reasoning) == (ANSWER, "")


@pytest.mark.parametrize("name", FAMILIES)
def test_schemas_and_calls_begin_behind_the_reasoning(name: str) -> None:
    llm = model(name)
    tags = reasoning_tags(source(name))
    assert tags is not None
    gap = "<|start|>assistant" if name == "gpt-oss" else "\n\n"
    thought = f"{'' if name == 'deepseek-r1' else tags.open}{THOUGHT}{tags.close}{gap}"
    with scripted_answers(llm, thought + tags.answer_open + JSON):
        result = llm.chat("?", response_format=FORMAT, sampling=TOKENS)
    assert (json.loads(result.text), result.reasoning) == ({"x": True}, THOUGHT)
    call = ' to=functions.weather<|channel|>commentary json<|message|>{"place": "Zürich"}'
    with scripted_answers(llm, thought + (call if name == "gpt-oss" else tags.answer_open + CALL)):
        *_, last = llm.stream("?", tools=TOOLS, sampling=TOKENS)
    assert name_and_arguments(last.tool_calls) == [WEATHER]
    assert last.usage is not None
    assert last.usage.reasoning_tokens


def test_the_mode_is_read_off_the_prompt_of_each_request() -> None:
    smollm3, r1 = reasoning_tags(source("smollm3")), reasoning_tags(source("deepseek-r1"))
    assert reasoning_mode(smollm3, "<|im_start|>assistant\n<think>\n\n</think>\n") == "off"
    assert reasoning_mode(r1, "<|Assistant|><think>\n") == "open"
    assert reasoning_mode(r1, "<|output_end|>") == "optional"
    llm = model("smollm3")
    for system, reasoning in (("/no_think", ""), ("/think", THOUGHT)):
        messages = [{"role": "system", "content": system}, *dialogue("?")]
        with scripted_answers(llm, f"<think>{THOUGHT}</think>{ANSWER}" if reasoning else ANSWER):
            assert llm.chat(messages, sampling=TOKENS).reasoning == reasoning


@pytest.mark.parametrize(
    ("name", "effort", "args"),
    [
        ("qwen3", None, {}),
        ("qwen3", "none", {"enable_thinking": False}),
        ("qwen3", "high", {"enable_thinking": True}),
        ("granite3.3", "low", {"thinking": True}),
        ("granite3.3", "minimal", {"thinking": False}),
        ("magistral", "high", {}),
        ("smollm2", "high", {}),
    ],
)
def test_an_effort_sets_the_variables_that_a_template_has(name: str, effort: str | None, args: dict[str, Any]) -> None:
    assert effort_args(source(name), effort) == args


def test_an_effort_between_those_of_a_template_is_the_nearest() -> None:
    levels = '{%- if reasoning_effort is not defined -%}{%- set reasoning_effort = "medium" -%}{%- endif -%}'
    assert effort_args(levels, "xhigh") == {"reasoning_effort": "high"}
    assert effort_args(levels, "none") == {"reasoning_effort": "low"}
    assert effort_args(levels + '{{ "none" }}', "none") == {"reasoning_effort": "none"}


def test_reasoning_is_switched_off_and_on_within_a_conversation() -> None:
    llm = reasoning_model()
    messages = dialogue("Hello")
    script = (f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}", ANSWER, f"<think>\nHm.\n</think>\n\n{ANSWER}")
    with scripted_answers(llm, *script):
        for effort, reasoning in (("high", THOUGHT), ("none", ""), (None, "Hm.")):
            result = llm.chat(messages, reasoning_effort=effort, sampling=TOKENS, session="it")
            assert (result.text, result.reasoning) == (ANSWER, reasoning)
            assert not result.usage.reuse.startswith("reread")
            messages = [*messages, *dialogue("", result.text)[1:], *dialogue("And?")]
    assert llm.tokenizer.decode(llm.session("it").tokens).count("<think>\n\n</think>") == 1


def test_the_same_question_with_another_switch_is_another_prompt() -> None:
    llm = reasoning_model()
    with scripted_answers(llm, ANSWER):
        first = llm.chat("Hello", sampling=TOKENS)
        second = llm.chat("Hello", template_args={"enable_thinking": False}, sampling=TOKENS)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert second.reasoning == ""


def test_variables_that_change_the_system_message_make_another_conversation() -> None:
    llm = model("smollm3")
    script = (f"<think>{THOUGHT}</think>{ANSWER}", ANSWER)
    with scripted_answers(llm, *script):
        first = llm.chat("Hello", sampling=TOKENS)
        further = dialogue("Hello", first.text, "And?")
        second = llm.chat(further, template_args={"enable_thinking": False}, sampling=TOKENS)
    assert second.usage.cached_tokens == 0


def test_batches_take_the_same_options() -> None:
    llm = reasoning_model()
    with scripted_answers(llm, ANSWER):
        results = llm.batch(["Hello", "Hi"], reasoning_effort="none", sampling=TOKENS)
    assert [result.text for result in results] == [ANSWER, ANSWER]


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reasoning_effort must be one of none, .*, max"):
        reasoning_model().chat("Hello", reasoning_effort="much")


def test_an_answer_that_ends_within_its_reasoning_says_so_and_the_next_turn_reads_its_end() -> None:
    llm = reasoning_model(QWEN3.replace("said.thought) -%}", "said.thought or True) -%}"))
    warned = pytest.warns(UserWarning, match="ended within its reasoning .* Raise max_tokens")
    with scripted_answers(llm, f"<think>\n{THOUGHT * 3}\n</think>\n\n{ANSWER}"), warned:
        first = llm.chat("Hello", sampling=SamplingParams(max_tokens=20), session="it")
    assert (first.text, first.finish_reason) == ("", "length")
    assert first.reasoning
    with scripted_answers(llm, ANSWER):
        second = llm.chat(dialogue("Hello", "", "And?"), sampling=TOKENS, session="it")
    assert second.text == ANSWER
    assert second.usage.cached_tokens
    text = llm.tokenizer.decode(llm.session("it").tokens)
    assert text.count("<think>") == text.count("</think>")


@pytest.mark.parametrize(
    "head",
    [" to=functions.weather<|channel|>commentary json", "<|channel|>commentary to=functions.weather <|constrain|>json"],
)
def test_a_turn_of_gpt_oss_with_a_call_keeps_its_analysis_and_the_next_one_leaves_it_out(head: str) -> None:
    llm = make_llm("gpt-oss", cache=LARGE_CACHE)
    messages, long = dialogue("Is it warm?"), THOUGHT * 7
    analysis = f"<|channel|>analysis<|message|>{long}<|end|><|start|>assistant"
    final = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
    script = (f'{analysis}{head}<|message|>{{"place": "Zürich"}}', f"{final}It is warm.", f"{final}You are welcome.")
    with scripted_answers(llm, *script):
        called = llm.chat(messages, tools=TOOLS, sampling=TOKENS, session="it")
        assert (called.reasoning, name_and_arguments(called.tool_calls)) == (long, [WEATHER])
        messages = with_results(messages, called)
        answered = llm.chat(messages, tool_choice="none", tools=TOOLS, sampling=TOKENS, session="it")
        assert (answered.text, answered.usage.reuse) == ("It is warm.", "continued")
        assert THOUGHT in llm.tokenizer.decode(llm.session("it").tokens)
        messages = [*messages, {"role": "assistant", "content": answered.text}, *dialogue("Thanks")]
        last = llm.chat(messages, tool_choice="none", tools=TOOLS, sampling=TOKENS, session="it")
    assert (last.text, last.usage.reuse) == ("You are welcome.", "restored")
    assert THOUGHT not in llm.tokenizer.decode(llm.session("it").tokens)


@given(cuts=st.lists(st.integers(0, 200)))
@settings(deadline=None, max_examples=30)
def test_channels_are_separated_wherever_pieces_end(cuts: list[int]) -> None:
    text = FAMILIES["gpt-oss"].format(THOUGHT, ANSWER) + "<|return|>"
    places = sorted({0, len(text), *(cut % len(text) for cut in cuts)})
    parser = HarmonyParser()
    pieces = [*(parser.push(text[a:b]) for a, b in itertools.pairwise(places)), parser.finish()]
    assert ("".join(each.reasoning for each in pieces), "".join(each.text for each in pieces)) == (THOUGHT, ANSWER)
