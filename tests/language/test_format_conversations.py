"""Conversations with tools and response formats continue without reading anything twice."""

from __future__ import annotations

import json

import pytest
import torch

from tests.support.chat import LARGE_CACHE, Chat, dialogue, make_llm
from tests.support.templates import SPECIAL_TOKENS
from tests.support.tools import (
    ALL_TOOLS,
    FORMAT,
    SAMPLED,
    with_results,
)
from zsmerge_llm.language.output_format import JSON_INSTRUCTION


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS])
def test_a_conversation_with_tool_calls_continues_without_reading_anything_twice(name: str) -> None:
    llm = make_llm(name, cache=LARGE_CACHE)
    messages = dialogue("Hello")
    first = llm.chat(messages, tools=ALL_TOOLS, tool_choice="required", sampling=SAMPLED, session="it")
    assistant_message = llm.session("it").tokens
    messages = with_results(messages, first)
    second = llm.chat(messages, tools=ALL_TOOLS, tool_choice="none", sampling=SAMPLED.replace(max_tokens=4))
    tokens = llm.session("it").tokens
    assert second.usage.reuse == "continued"
    assert tokens[: len(assistant_message)] == assistant_message  # what was generated is never made into tokens again
    assert second.usage.cached_tokens <= len(assistant_message)
    text = llm.tokenizer.decode(tokens)
    assert text.count("18 degrees") == len(first.tool_calls)
    held = llm.session("it").cache
    fresh = llm.engine.read(llm.engine.new_cache(), tokens[: held.seen])
    torch.testing.assert_close(held.logits[0].float(), fresh, rtol=1e-3, atol=1e-3)


def test_a_response_format_is_part_of_the_prompt_unless_the_messages_state_it() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    llm.chat("Hello", response_format=FORMAT, sampling=SAMPLED, session="it")
    text = llm.tokenizer.decode(llm.session("it").tokens)
    assert json.dumps(FORMAT["json_schema"]["schema"]) in text
    told = f"Hello {json.dumps(FORMAT['json_schema']['schema'])}"
    llm.chat(told, response_format=FORMAT, sampling=SAMPLED, session="told")
    assert llm.tokenizer.decode(llm.session("told").tokens).count('"boolean"') == 1
    llm.chat("Give me JSON.", response_format={"type": "json_object"}, sampling=SAMPLED, session="mode")
    assert JSON_INSTRUCTION not in llm.tokenizer.decode(llm.session("mode").tokens)


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_the_title_of_a_schema_is_not_shown_and_a_schema_with_it_is_not_shown_once_more(ensure_ascii: bool) -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    schema = {"title": "Bahnh\u00f6fe", **FORMAT["json_schema"]["schema"]}
    titled = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    llm.chat("Hello", response_format=titled, sampling=SAMPLED, session="it")
    text = llm.tokenizer.decode(llm.session("it").tokens)
    assert json.dumps(FORMAT["json_schema"]["schema"]) in text
    assert "Bahnh" not in text
    told = f"Hello {json.dumps(schema, ensure_ascii=ensure_ascii)}"
    llm.chat(told, response_format=titled, sampling=SAMPLED, session="told")
    assert llm.tokenizer.decode(llm.session("told").tokens).count('"boolean"') == 1


def test_a_conversation_continues_with_and_without_a_response_format() -> None:
    chat = Chat(make_llm("qwen2.5", cache=LARGE_CACHE), "it")
    chat.ask("One")
    for wanted in (FORMAT, None, {"type": "json_object"}, FORMAT):
        before = chat.llm.session("it").tokens
        result = chat.ask("And", response_format=wanted, sampling=SAMPLED)
        assert result.usage.reuse == "continued"
        assert chat.llm.session("it").tokens[: len(before)] == before
    assert len(chat.llm.store) == 1


def test_the_same_question_with_another_response_format_is_another_prompt() -> None:
    chat = Chat(make_llm("qwen2.5", cache=LARGE_CACHE), "it", dialogue("One", "Two", "Three"))
    plain = chat.llm.chat(chat.messages, sampling=SAMPLED, session="it")
    formed = chat.llm.chat(chat.messages, sampling=SAMPLED, session="it", response_format=FORMAT)
    assert formed.usage.prompt_tokens > plain.usage.prompt_tokens
    assert formed.usage.cached_tokens < plain.usage.prompt_tokens
    again = chat.llm.chat(chat.messages, sampling=SAMPLED, session="it", response_format=FORMAT)
    assert again.usage.reuse == "restored"
    assert again.usage.cached_tokens == again.usage.prompt_tokens == formed.usage.prompt_tokens
    assert again.text == formed.text
