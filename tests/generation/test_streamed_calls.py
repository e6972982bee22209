"""Calls are streamed as they are written, and add up to those of the whole answer; discarded ones are never shown."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.scripted_model import scripted_answers
from tests.support.templates import SPECIAL_TOKENS
from tests.support.tools import ALL_TOOLS, CALL, SAMPLED, question_and_result
from zsmerge_llm import Chunk, SamplingParams
from zsmerge_llm.language.tool_call_stream import merge_deltas

TOKENS = SamplingParams(max_tokens=150)
ELSEWHERE = CALL.replace("Zürich", "a small town behind the hills of Bern")
FORMS = {
    "qwen2.5": f"<tool_call>\n{ELSEWHERE}\n</tool_call>",
    "smollm2": f"```json\n{ELSEWHERE}\n```",
    "mistral-v0.3": f"[TOOL_CALLS] [{ELSEWHERE}]",
    "llama3": ELSEWHERE.replace("arguments", "parameters"),
}


def check(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Check that the pieces of calls add up to the calls of the last chunk; return the chunks that have some."""
    deltas = [delta for chunk in chunks for delta in chunk.tool_call_deltas]
    added = [(delta.index, delta.id, delta.name, delta.arguments) for delta in merge_deltas(deltas)]
    calls = [(at, call["id"], call["function"]) for at, call in enumerate(chunks[-1].tool_calls)]
    assert added == [(at, name, function["name"], function["arguments"]) for at, name, function in calls]
    for chunk in chunks:
        assert len({delta.index for delta in chunk.tool_call_deltas}) == len(chunk.tool_call_deltas)
        assert not any(mark in chunk.text for mark in ("<tool_call>", "[TOOL_CALLS]", "```", '"name"'))
    return [chunk for chunk in chunks if chunk.tool_call_deltas]


@pytest.mark.parametrize("name", [*FORMS])
def test_a_call_is_streamed_in_every_familys_form(name: str) -> None:
    llm = make_llm(name, cache=LARGE_CACHE)
    with scripted_answers(llm, FORMS[name]):
        chunks = list(llm.stream("Hello", tools=ALL_TOOLS, sampling=TOKENS))
    pieces = check(chunks)
    assert len(pieces) > 5
    assert pieces[0].tool_call_deltas[0].name == "weather"
    assert json.loads(chunks[-1].tool_calls[0]["function"]["arguments"]) == json.loads(ELSEWHERE)["arguments"]


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS])
def test_whatever_a_model_calls_its_pieces_add_up(name: str) -> None:
    llm = make_llm(name)
    for seed in range(3):
        chunks = list(llm.stream("Hello", tools=ALL_TOOLS, tool_choice="required", sampling=SAMPLED.replace(seed=seed)))
        check(chunks)
        assert chunks[-1].tool_calls


REPEATED = {
    "qwen2.5": "\n".join([f"<tool_call>\n{call}\n</tool_call>" for call in (ELSEWHERE, CALL)] * 3),
    "mistral-v0.3": f"[TOOL_CALLS] [{', '.join([ELSEWHERE, CALL] * 3)}]",
}


@pytest.mark.parametrize("name", [*REPEATED])
def test_a_call_that_repeats_another_one_ends_the_answer_and_is_never_shown(name: str) -> None:
    llm = make_llm(name, cache=LARGE_CACHE)
    wanted = [json.loads(call)["arguments"] for call in (ELSEWHERE, CALL)]
    for stop in ((), ("###",)):
        sampling, question = SamplingParams(max_tokens=600, stop=stop), f"Hello {stop}"
        with scripted_answers(llm, REPEATED[name]):
            chunks = list(llm.stream(question, tools=ALL_TOOLS, sampling=sampling))
        check(chunks)
        last = chunks[-1]
        assert [json.loads(call["function"]["arguments"]) for call in last.tool_calls] == wanted
        assert (last.finish_reason, last.invalid_tool_calls) == ("tool_calls", [])
        answer = {"role": "assistant", "content": "", "tool_calls": last.tool_calls}
        results = [{"role": "tool", "tool_call_id": call["id"], "content": "rain"} for call in last.tool_calls]
        messages = [{"role": "user", "content": question}, answer, *results]
        assert llm.chat(messages, tools=ALL_TOOLS, sampling=TOKENS).usage.reuse == "continued"


def test_parallel_calls_and_the_text_before_them_are_streamed_in_order() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    calls = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in (CALL, ELSEWHERE))
    with scripted_answers(llm, f"Let me see.\n{calls}"):
        chunks = list(llm.stream("Hello", tools=ALL_TOOLS, sampling=TOKENS))
    pieces = check(chunks)
    assert [piece.tool_call_deltas[0].index for piece in pieces] == sorted(
        piece.tool_call_deltas[0].index for piece in pieces
    )
    assert len(chunks[-1].tool_calls) == 2
    assert "".join(chunk.text for chunk in chunks) == "Let me see."
    first_call = next(at for at, chunk in enumerate(chunks) if chunk.tool_call_deltas)
    assert not any(chunk.text for chunk in chunks[first_call:])


def test_a_repeated_call_is_not_shown_and_a_new_one_is() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, CALL, "It is 18 degrees."):
        chunks = list(llm.stream(question_and_result(), tools=ALL_TOOLS, sampling=TOKENS))
    assert check(chunks) == []
    with scripted_answers(llm, ELSEWHERE):
        assert len(check(list(llm.stream(question_and_result(), tools=ALL_TOOLS, sampling=TOKENS)))) > 3
    add = '{"name": "add", "arguments": {"a": 1234567, "größe": "groß"}}'
    with scripted_answers(llm, add):
        assert len(check(list(llm.stream(question_and_result(), tools=ALL_TOOLS, sampling=TOKENS)))) > 3


def test_a_call_that_may_be_cut_is_passed_on_whole_or_not_at_all() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    call = f"<tool_call>\n{ELSEWHERE}\n</tool_call>"
    with scripted_answers(llm, call):
        stopped = list(llm.stream("Hello", tools=ALL_TOOLS, sampling=TOKENS.replace(stop=("hills",))))
        whole = list(llm.stream("Hello", tools=ALL_TOOLS, sampling=TOKENS.replace(stop=("fish",))))
    assert check(stopped) == []
    assert stopped[-1].invalid_tool_calls
    assert len(check(whole)) == 1
    with scripted_answers(llm, call):
        short = list(
            llm.stream("Hello", tools=ALL_TOOLS, tool_choice="required", sampling=TOKENS.replace(max_tokens=4))
        )
    assert check(short) == []
