"""Any input is answered or refused by an error of ours: messages, tools, schemas, sampling, templates, integrations.

Each area takes a hundred inputs by default, and 500 to 2,000 in the slow suite; `pytest -rP` shows the outcomes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz import inputs
from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.templates import TOOLS, template
from zsmerge_llm import LLM, CacheConfig, Grammar, SamplingParams
from zsmerge_llm.engine.sampler import Sampler
from zsmerge_llm.errors import InputError, ZSMergeError
from zsmerge_llm.generation.options import ChatOptions, RequestOptions
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.language.grammar import GrammarCompiler
from zsmerge_llm.language.messages import MessageHistory, normalize_messages
from zsmerge_llm.language.output_format import OutputFormats
from zsmerge_llm.language.tool_calls import ToolCallParser, parse_tool_calls

NAMES = ("smollm2", "qwen3", "mistral-nemo", "llama3")
ONE_TOKEN = SamplingParams(max_tokens=1)


@cache
def formats(name: str = "qwen3") -> OutputFormats:
    form = template(name)
    return OutputFormats(form, GrammarCompiler(form.tokenizer, len(form.tokenizer), [form.tokenizer.eos_token_id]))


@cache
def tiny() -> LLM:
    return make_llm(cache=LARGE_CACHE, compile=False)


def read_messages(value: Any) -> None:
    """Check, digest, render and encode messages with several templates, and count them as parts."""
    history = MessageHistory().normalize(value)
    assert history.normalize(value).messages == history.messages
    for name in NAMES:
        form = template(name)
        form.digests(history.messages)
        form.count(history.messages)
        with contextlib.suppress(InputError):
            ids = form.encode(form.render(history.messages))
            assert "<|im_end|>" in form.tokenizer.decode(ids) or name != "smollm2"


def read_format(value: tuple[Any, Any, Any]) -> None:
    """Check tools, choice and response format, render them, and compile their grammar."""
    tools, choice, response_format = value
    given_options = {"tools": tools, "tool_choice": choice, "response_format": response_format}
    options = RequestOptions.parse(ChatOptions, given_options)
    messages = normalize_messages("Hello")
    output_format = options.output_format(formats(), messages)
    for name in NAMES:
        template(name).count(output_format.with_instruction(messages), options.tools)
    output_format.constraint(SamplingParams(max_tokens=20))


def parse_calls(value: str) -> None:
    """Parse an answer whole and as a stream: both agree, and no text is made up."""
    parsed = parse_tool_calls(value, ["weather"])
    parser = ToolCallParser(["weather"])
    streamed = "".join(parser.push(letter) for letter in value)
    held, again = parser.finish()
    assert streamed + held == again.content
    assert [each["function"] for each in again.calls] == [each["function"] for each in parsed.calls]


def sample(value: dict[str, Any]) -> None:
    params = SamplingParams(**value)
    logits = torch.linspace(-3, 3, 97)
    for token in (int(Sampler(params, [1, 2, 3], "cpu")(logits)) for _ in range(2)):
        assert 0 <= token < 97


def configure(value: tuple[dict[str, Any], dict[str, Any]]) -> None:
    CacheConfig.from_dict(value[0])
    LLM("smollm2", **value[1])


def render(source: str) -> None:
    messages = normalize_messages([{"role": "user", "content": "Hello"}])
    with mock.patch("zsmerge_llm.language.chat_template.MAX_RENDER_SECONDS", 0.3):
        ChatTemplate(template("smollm2").tokenizer, source).render(messages, TOOLS)


def chat(value: dict[str, Any]) -> None:
    """Send a request; then one that is right is answered as before."""
    options = {"sampling": ONE_TOKEN, **value}
    text, wrong = options.pop("messages"), options.pop("wrong", None)
    options.update([wrong] if wrong else [])
    try:
        tiny().chat(text, **options)
    finally:
        assert tiny().chat("Hello", session="ann", sampling=ONE_TOKEN).usage.reuse in ("new", "restored")


def complete(value: tuple[Any, Any]) -> None:
    prompt, grammar = value
    tiny().complete(prompt, grammar=None if grammar is None else Grammar.lark(grammar), sampling=ONE_TOKEN)


def langchain(value: tuple[Any, Any]) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_zsmerge._messages import to_messages

    kind, content = value
    made = {
        "human": lambda: HumanMessage(content),
        "system": lambda: SystemMessage(content),
        "ai": lambda: AIMessage(content, tool_calls=[{"name": "f", "args": {"a": content}, "id": "1"}]),
        "raw": lambda: AIMessage("", additional_kwargs={"tool_calls": content, "reasoning_content": content}),
        "tool": lambda: ToolMessage(content, tool_call_id=str(kind)),
    }[kind]
    try:
        messages = [made()]
    except Exception:  # LangChain refuses it itself
        return
    normalize_messages(to_messages(messages), partial=True)


def llama_index(value: tuple[Any, Any, Any]) -> None:
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.llms.zsmerge._messages import to_messages
    from llama_index.llms.zsmerge._tools import to_tool_choice

    role, content, extra = value
    try:
        messages = [ChatMessage(role=role, content=content, additional_kwargs=extra)]
    except Exception:  # LlamaIndex refuses it itself
        return
    normalize_messages(to_messages(messages), partial=True)
    to_tool_choice(extra)


option = st.fixed_dictionaries(
    {"messages": st.one_of(st.just("Hello"), inputs.messages)},
    optional={
        "session": st.none() | inputs.text,
        "probe": st.none() | inputs.text,
        "timeout": st.floats(10, 1e9),
        "priority": st.integers(),
        "tool_choice": inputs.tool_choice,
        "wrong": st.tuples(st.sampled_from([*ChatOptions.__annotations__]), inputs.anything),
        "tools": inputs.tools,
        "response_format": inputs.response_format,
    },
)
sampling = inputs.dicts(
    {},
    {
        "max_tokens": st.none() | st.integers(0, 2**70),
        "temperature": st.floats(0, 100),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(0, 2**62),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 100),
        "seed": st.none() | st.integers(0, 2**65),
        "stop": inputs.text | st.lists(inputs.text, max_size=3),
        "ignore_eos": st.booleans(),
    },
)
config = st.dictionaries(st.sampled_from([*CacheConfig.__dataclass_fields__, "odd"]), inputs.numbers, max_size=2)
loading = st.dictionaries(
    st.sampled_from(
        [
            "cache",
            "dtype",
            "device",
            "quantization",
            "compile",
            "chunk",
            "retrieval_tokens",
            "session_memory",
            "max_input_tokens",
            "chat_template",
            "template_args",
            "gpu_session_memory",
            "scheduling",
        ]
    ),
    inputs.numbers,
    max_size=2,
)
Check = tuple[Any, Callable[[Any], None], int]
AREAS: dict[str, Check] = {
    "messages": (inputs.messages, read_messages, 1500),
    "formats": (st.tuples(inputs.tools, inputs.tool_choice, inputs.response_format), read_format, 1500),
    "tool-call text": (
        st.lists(st.sampled_from(inputs.MARKERS + inputs.WORDS) | inputs.text).map("".join),
        parse_calls,
        2000,
    ),
    "sampling": (sampling, sample, 2000),
    "settings": (st.tuples(config | inputs.anything, loading), configure, 2000),
    "templates": (inputs.template, render, 1000),
    "chats": (option, chat, 500),
    "completions": (st.tuples(inputs.anything | inputs.text, st.none() | inputs.text), complete, 500),
    "LangChain": (
        st.tuples(st.sampled_from(["human", "system", "ai", "raw", "tool"]), inputs.anything),
        langchain,
        1000,
    ),
    "LlamaIndex": (
        st.tuples(
            st.sampled_from(["user", "assistant", "tool", "system"]),
            inputs.anything,
            st.dictionaries(st.sampled_from(["tool_calls", "tool_call_id", "name", "function"]), inputs.anything),
        ),
        llama_index,
        1000,
    ),
}
"""By area: inputs, what is done with one, and how many the slow suite tries."""


def fuzz(area: str, count: int, seeded: bool) -> Counter[str]:
    """Try inputs of an area; print and return the outcomes. Fails at the first that ends in another error than ours."""
    strategy, check, _ = AREAS[area]
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=seeded, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(value: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(value)
        except ZSMergeError as error:
            str(error).encode()
            outcomes[type(error).__name__] += 1
        else:
            outcomes["answered"] += 1

    run()
    print(f"{area}: {outcomes.total()} inputs, {dict(outcomes)}, other types 0")
    return outcomes


@pytest.mark.parametrize("area", AREAS)
def test_any_input_is_answered_or_refused_by_an_error_of_ours(area: str) -> None:
    fuzz(area, 100, seeded=True)


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_any_of_many_inputs_is_answered_or_refused_by_an_error_of_ours(area: str) -> None:
    fuzz(area, AREAS[area][2], seeded=False)
