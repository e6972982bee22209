"""Reasoning is streamed before it is known that its answer is discarded: the next attempt begins with it."""

from __future__ import annotations

import pytest

from tests.language.test_reasoning import BEGUN, QWEN3, reasoning_model
from tests.support.chat import dialogue
from tests.support.scripted_model import scripted_answers
from tests.support.tools import ALL_TOOLS, CALL, question_and_result
from zsmerge_llm import SamplingParams
from zsmerge_llm.language.output_format import FIRST_RESULT_INSTRUCTION

THOUGHT, ANSWER = "18 degrees, that is warm.", "It is 18 degrees."
TOKENS = SamplingParams(max_tokens=400)


@pytest.mark.parametrize("discarded", [CALL, FIRST_RESULT_INSTRUCTION])
@pytest.mark.parametrize("template", [QWEN3, BEGUN], ids=["optional", "open"])
def test_reasoning_of_a_discarded_answer_is_that_of_the_next_one(template: str, discarded: str) -> None:
    llm = reasoning_model(template)
    thought = f"{'' if template is BEGUN else '<think>'}\n{THOUGHT}\n</think>\n\n"
    with scripted_answers(llm, thought + discarded, thought + ANSWER):
        chunks = list(llm.stream(question_and_result(), tools=ALL_TOOLS, sampling=TOKENS, session="it"))
    assert "".join(chunk.reasoning for chunk in chunks) == THOUGHT
    assert "".join(chunk.text for chunk in chunks) == ANSWER
    usage = chunks[-1].usage
    assert usage is not None
    assert 0 < usage.reasoning_tokens < usage.completion_tokens
    said = llm.tokenizer.decode(llm.session("it").tokens[usage.prompt_tokens :])
    assert said == thought + ANSWER
    further = [*question_and_result(), {"role": "assistant", "content": ANSWER}, *dialogue("Thanks")]
    again = llm.chat(further, tools=ALL_TOOLS, sampling=SamplingParams(max_tokens=2))
    assert again.usage.reuse == "continued"


def test_in_a_batch_it_is_too() -> None:
    llm = reasoning_model()
    thought = f"<think>\n{THOUGHT}\n</think>\n\n"
    answers = (thought + CALL, thought + "Warm.", thought + ANSWER)
    with scripted_answers(llm, *answers):
        results = llm.batch([question_and_result(), question_and_result()], tools=ALL_TOOLS, sampling=TOKENS)
    assert [(result.text, result.reasoning) for result in results] == [(ANSWER, THOUGHT), ("Warm.", THOUGHT)]
