"""`retry_invalid`: an answer that breaks its schema is asked for once more, and nothing of it is passed on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chat import LARGE_CACHE, dialogue, make_llm
from tests.support.scripted_model import scripted_answers
from zsmerge_llm import Chunk

UNIQUE = {"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "maxItems": 2}
FORMAT = {"type": "json_schema", "json_schema": {"name": "it", "schema": UNIQUE}}
PICK = {
    "type": "function",
    "function": {
        "name": "pick",
        "description": "Picks.",
        "parameters": {"type": "object", "properties": {"these": UNIQUE}, "required": ["these"]},
    },
}
WRONG, RIGHT = "[true, true]", "[true, false]"


def call(these: str) -> str:
    return f'<tool_call>\n{{"name": "pick", "arguments": {{"these": {these}}}}}\n</tool_call>'


def answered(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}, *dialogue("And now?")]


def text_of(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_the_model_is_shown_its_error_and_only_its_second_answer_is_passed_on() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, WRONG, RIGHT):
        chunks = list(llm.stream("Pick two.", response_format=FORMAT, retry_invalid=True, session="it"))
    assert text_of(chunks) == RIGHT
    assert (chunks[-1].format_error, chunks[-1].finish_reason) == ("", "stop")
    read = llm.tokenizer.decode(llm.session("it").tokens)
    assert WRONG in read
    assert "has non-unique elements\nAnswer again" in read


def test_the_conversation_goes_on_with_the_second_answer() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, "Hello.", WRONG, RIGHT, "Thanks."):
        llm.chat("Hello, I am Ada.", session="it")
        messages = dialogue("Hello, I am Ada.", "Hello.", "Pick two.")
        result = llm.chat(messages, response_format=FORMAT, retry_invalid=True, session="it")
        usage = llm.chat([*messages, *answered(result.text)], session="it").usage
    assert (result.text, usage.reuse) == (RIGHT, "restored")
    assert usage.cached_tokens > 0


@pytest.mark.parametrize(("answers", "wanted"), [((RIGHT, WRONG), RIGHT), ((WRONG, WRONG), WRONG)])
def test_a_valid_answer_is_asked_for_once_and_an_invalid_one_twice_at_most(
    answers: tuple[str, ...], wanted: str
) -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with scripted_answers(llm, *answers, "[]"):
        result = llm.chat("Pick two.", response_format=FORMAT, retry_invalid=True)
    assert result.text == wanted
    assert ("non-unique" in result.format_error) == (wanted == WRONG)


def test_arguments_of_a_call_are_corrected_after_its_error_as_its_result() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    options: dict[str, Any] = {"tools": [PICK], "tool_choice": "required", "retry_invalid": True}
    with scripted_answers(llm, call(WRONG), call(RIGHT)):
        chunks = list(llm.stream("Pick two.", session="it", **options))
    arguments = "".join(delta.arguments for chunk in chunks for delta in chunk.tool_call_deltas)
    assert arguments == chunks[-1].tool_calls[0]["function"]["arguments"] == '{"these": [true, false]}'
    assert "<tool_response>\nCall of pick" in llm.tokenizer.decode(llm.session("it").tokens)


def test_wrong_requests_are_refused_at_once() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with pytest.raises(ValueError, match="response_format must be"):
        llm.stream("Pick two.", response_format={"type": "xml"}, retry_invalid=True)
