"""How much a model reasons is said in the words of each interface, and reaches the chat template."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("langchain_zsmerge")
pytest.importorskip("llama_index.llms.zsmerge")

from langchain_zsmerge import ChatZSMerge
from llama_index.core.llms import ChatMessage
from llama_index.llms.zsmerge import ZSMergeLLM

from tests.language.test_reasoning import reasoning_model
from zsmerge_llm import SamplingParams
from zsmerge_llm.server.anthropic_messages import MessagesBody
from zsmerge_llm.server.anthropic_messages import parse as parse_messages
from zsmerge_llm.server.openai_chat import ChatCompletionBody
from zsmerge_llm.server.openai_chat import parse as parse_chat
from zsmerge_llm.server.requests import Context
from zsmerge_llm.server.settings import ServerSettings

OFF = {"enable_thinking": False}


def test_langchain_and_llamaindex_pass_them_on() -> None:
    llm = reasoning_model()
    few = SamplingParams(max_tokens=2)
    lengths = {llm.chat("Hello", sampling=few, **how).usage.prompt_tokens for how in ({}, {"template_args": OFF})}
    assert len(lengths) == 2
    chat = ChatZSMerge(llm=llm, max_tokens=2)
    quiet = ChatZSMerge(llm=llm, max_tokens=2, reasoning_effort="none")
    answers = [chat.invoke("Hello"), chat.invoke("Hello", template_args=OFF), quiet.invoke("Hello")]
    used = [answer.usage_metadata["input_tokens"] for answer in answers if answer.usage_metadata]
    assert used == [min(lengths), max(lengths), max(lengths)]
    assert quiet.invoke("Hello", reasoning_effort="high").usage_metadata["input_tokens"] == min(lengths)
    index = ZSMergeLLM(llm=llm, max_tokens=2)
    message = [ChatMessage(role="user", content="Hello")]
    for how, expected in (({}, min(lengths)), ({"reasoning_effort": "none"}, max(lengths))):
        assert index.chat(message, **how).additional_kwargs["prompt_tokens"] == expected


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, None),
        ({"thinking": {"type": "disabled"}}, "none"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "medium"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "max"),
    ],
)
def test_anthropics_fields_are_an_effort(fields: dict[str, Any], effort: str | None) -> None:
    llm = reasoning_model()
    llm.model = "tiny"
    body = MessagesBody(model="tiny", max_tokens=9, messages=[{"role": "user", "content": "Hello"}], **fields)
    options = parse_messages(body, Context(llm, ServerSettings(), None), None).options
    assert options.get("reasoning_effort") == effort


def test_openais_fields_and_template_variables_are_passed_on() -> None:
    llm = reasoning_model()
    llm.model = "tiny"
    question = [{"role": "user", "content": "Hello"}]
    body = ChatCompletionBody(model="tiny", messages=question, reasoning_effort="low", chat_template_kwargs=OFF)
    options = parse_chat(body, Context(llm, ServerSettings(), None), None).options
    assert (options["reasoning_effort"], options["template_args"]) == ("low", OFF)
