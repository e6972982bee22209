"""Tokens of an answer are parsed into reasoning, text and tool calls, and its cost is counted."""

from __future__ import annotations

import copy
from threading import Event
from typing import Any

import pytest

from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.scripted_model import scripted_answers
from tests.support.templates import byte_level, template
from tests.support.tools import ALL_TOOLS, CALL, WEATHER, name_and_arguments, question_and_result
from zsmerge_llm import SamplingParams
from zsmerge_llm.generation.answer import AnswerParser
from zsmerge_llm.language.output_format import OutputFormat


def parse(text: str, output_format: OutputFormat, stop: tuple[str, ...] = (), tokenizer: Any = None) -> Any:
    """Return reasoning, text and calls of an answer that is pushed token by token, and whether it was stopped."""
    tokenizer = tokenizer or byte_level()
    parser = AnswerParser(tokenizer, output_format, stop)
    pieces = []
    for token in tokenizer.encode(text, add_special_tokens=False):
        pieces.append(parser.push(token))
        if parser.stopped:
            break
    rest, parsed = parser.finish()
    reasoning, texts = zip(*pieces, rest, strict=True)
    return "".join(reasoning), "".join(texts), name_and_arguments(parsed.calls), parser.stopped


def test_an_answer_has_reasoning_text_and_calls() -> None:
    output_format = OutputFormat(reasoning="optional", tool_names=("weather",))
    answer = f"<think>\nIs it warm?\n</think>\n\nI look.\n{CALL}"
    assert parse(answer, output_format) == ("Is it warm?", "I look.", [WEATHER], False)
    open_format = OutputFormat(reasoning="open", tool_names=("weather",))
    assert parse(answer.removeprefix("<think>"), open_format) == ("Is it warm?", "I look.", [WEATHER], False)
    assert parse("Warm.", OutputFormat()) == ("", "Warm.", [], False)


def test_a_stop_string_ends_the_text_but_not_the_reasoning() -> None:
    output_format = OutputFormat(reasoning="optional")
    assert parse("<think>a stop b</think>\n\nyes stop no", output_format, (" stop",)) == ("a stop b", "yes", [], True)
    # the spaces between reasoning and text are part of neither, also where a stop string matches them
    assert parse("<think>a</think>\n\nyes\n\nno", output_format, ("\n\n",)) == ("a", "yes", [], True)
    # a stop string may complete in the token that decides that there is no reasoning
    assert parse("<thin stop no", output_format, (" stop",)) == ("", "<thin", [], True)


def test_reasoning_tokens_are_counted() -> None:
    tokenizer = copy.deepcopy(template("qwen3").tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    parser = AnswerParser(tokenizer, OutputFormat(reasoning="optional"))
    ids = tokenizer.encode("<think>abc</think>\n\nyes", add_special_tokens=False)
    for token in ids:
        parser.push(token)
    assert parser.reasoning_tokens == ids.index(tokenizer.convert_tokens_to_ids("</think>"))


@pytest.mark.parametrize("stop_after", [0, 2])
def test_a_cancelled_batch_returns_what_was_generated(stop_after: int) -> None:
    llm, cancel = make_llm(cache=LARGE_CACHE), Event()
    decode = llm.engine.decode

    def cancelling(*args: Any, **kwargs: Any) -> Any:
        for count, tokens in enumerate(decode(*args, **kwargs)):
            yield tokens
            if count + 1 == stop_after:
                cancel.set()

    if not stop_after:
        cancel.set()
    llm.engine.decode = cancelling  # type: ignore[method-assign]
    results = llm.batch(["Hello", "Good day"], cancel=cancel, sampling=SamplingParams(ignore_eos=True))
    assert [(result.finish_reason, result.usage.completion_tokens) for result in results] == [
        ("cancelled", stop_after)
    ] * 2


def test_an_answer_cancelled_in_its_second_attempt_holds_only_that_attempt() -> None:
    llm, cancel = make_llm("qwen2.5", cache=LARGE_CACHE), Event()
    with scripted_answers(llm, CALL, "It is 18 degrees."):
        stream = llm.stream(question_and_result(), tools=ALL_TOOLS, cancel=cancel)
        first = next(stream)
        cancel.set()
        last = list(stream)[-1]
    assert "It is 18 degrees.".startswith(first.text + last.text)
    assert (last.finish_reason, last.tool_calls) == ("cancelled", [])
