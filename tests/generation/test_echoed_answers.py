"""An answer that repeats what was added to the prompt gives way to another; streams never show it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chat import LARGE_CACHE, dialogue, make_llm
from tests.support.scripted_model import scripted_answers
from tests.support.tools import ALL_TOOLS, CALL, WEATHER, name_and_arguments, question_and_result
from zsmerge_llm import CacheConfig, SamplingParams
from zsmerge_llm.language.output_format import FIRST_RESULT_INSTRUCTION, LATER_RESULT_INSTRUCTION
from zsmerge_llm.retrieval.passage_search import INTRODUCTION

TOKENS = SamplingParams(max_tokens=120)
ANSWER = "It is 18 degrees."
ECHOES = (FIRST_RESULT_INSTRUCTION, f"{FIRST_RESULT_INSTRUCTION} {ANSWER}", f"**{LATER_RESULT_INSTRUCTION.lower()}**")


@pytest.mark.parametrize("echo", ECHOES)
def test_an_answer_that_repeats_the_instruction_is_generated_again_unseen(echo: str) -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, echo, ANSWER):
        *pieces, last = llm.stream(question_and_result(), tools=ALL_TOOLS, session="it", sampling=TOKENS)
    assert "".join(piece.text for piece in pieces) + last.text == ANSWER
    assert (last.finish_reason, last.tool_calls) == ("stop", [])
    tokens = llm.session("it").tokens
    assert llm.tokenizer.decode(tokens[last.usage.prompt_tokens :]) == ANSWER
    further = [*question_and_result(), {"role": "assistant", "content": ANSWER}, *dialogue("Thanks")]
    assert llm.chat(further, tools=ALL_TOOLS, sampling=SamplingParams(max_tokens=2)).usage.reuse == "continued"


def test_a_batch_generates_such_answers_again() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, FIRST_RESULT_INSTRUCTION, "Warm.", ANSWER):
        results = llm.batch([question_and_result(), question_and_result()], tools=ALL_TOOLS, sampling=TOKENS)
    assert [result.text for result in results] == [ANSWER, "Warm."]


def test_the_next_attempt_begins_with_another_word_and_may_make_a_call() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with (
        scripted_answers(llm, FIRST_RESULT_INSTRUCTION, FIRST_RESULT_INSTRUCTION),
        pytest.raises(AssertionError, match="the grammar does not allow this answer"),
    ):
        llm.chat(question_and_result(), tools=ALL_TOOLS, sampling=TOKENS)
    elsewhere = CALL.replace("Zürich", "Bern")
    with scripted_answers(llm, FIRST_RESULT_INSTRUCTION, elsewhere):
        result = llm.chat(question_and_result(), tools=ALL_TOOLS, sampling=TOKENS)
    assert name_and_arguments(result.tool_calls) == [("weather", {"place": "Bern"})]


def test_a_repeated_call_and_then_a_repeated_instruction_end_in_an_answer() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    for first, second in ((CALL, FIRST_RESULT_INSTRUCTION), (FIRST_RESULT_INSTRUCTION, CALL)):
        with scripted_answers(llm, first, second, ANSWER):
            result = llm.chat(question_and_result(), tools=ALL_TOOLS, sampling=TOKENS)
        assert (result.text, result.tool_calls) == (ANSWER, [])


def test_an_answer_ends_before_an_instruction_that_it_goes_on_with() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, f"{ANSWER}\n\n{FIRST_RESULT_INSTRUCTION}"):
        result = llm.chat(question_and_result(), tools=ALL_TOOLS, sampling=TOKENS)
    assert (result.text, result.finish_reason) == (ANSWER, "stop")


def test_a_quotation_of_the_caller_stays() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    messages = question_and_result()
    messages[0]["content"] = f"Repeat after me: {FIRST_RESULT_INSTRUCTION}"
    with scripted_answers(llm, FIRST_RESULT_INSTRUCTION):
        assert llm.chat(messages, tools=ALL_TOOLS, sampling=TOKENS).text == FIRST_RESULT_INSTRUCTION
    with scripted_answers(llm, FIRST_RESULT_INSTRUCTION):  # no tool result, so nothing was added
        assert llm.chat("Hello", tools=ALL_TOOLS, sampling=TOKENS).text == FIRST_RESULT_INSTRUCTION


def test_arguments_of_calls_may_hold_the_words() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    call = CALL.replace("Zürich", FIRST_RESULT_INSTRUCTION)
    with scripted_answers(llm, call):
        ((name, arguments),) = name_and_arguments(
            llm.chat(question_and_result(), tools=ALL_TOOLS, sampling=TOKENS).tool_calls
        )
    assert (name, arguments["place"]) == (WEATHER[0], FIRST_RESULT_INSTRUCTION)


def test_the_explanation_of_tools_and_the_introductions_of_texts_are_no_answers() -> None:
    explained = make_llm("smollm2", cache=LARGE_CACHE)
    with scripted_answers(explained, "To call one, answer with its name and arguments as JSON.", ANSWER):
        assert explained.chat("Hello", tools=ALL_TOOLS, sampling=TOKENS).text == ANSWER

    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    document = llm.read_document(text="The captain is Eve. " * 20)
    with scripted_answers(llm, "Answer from this document.\n\nThe captain", "Eve."):
        assert llm.chat("Who is it?", session=document, sampling=TOKENS).text == "Eve."


def test_the_introduction_of_repeated_passages_is_no_answer() -> None:
    llm = make_llm("qwen2.5", cache=CacheConfig(slots=512))
    facts = [f"The wooden boat number {at} belongs to the fisherman Anselm of harbour {at}. " * 3 for at in range(12)]
    messages: list[dict[str, Any]] = []
    for fact in facts:
        messages += [{"role": "user", "content": fact}, {"role": "assistant", "content": "Noted."}]
    messages += dialogue("To whom belongs the wooden boat number 2?")
    with scripted_answers(llm, f"{INTRODUCTION}\n\n{facts[2]}", "To Anselm."):
        result = llm.chat(messages, sampling=TOKENS)
    assert result.usage.retrieved_tokens > 0
    assert result.text == "To Anselm."
    sentence = facts[2].partition(".")[0] + "."
    with scripted_answers(llm, sentence):  # a quotation
        assert llm.chat(messages, sampling=TOKENS).text == sentence
