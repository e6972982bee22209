"""With `tool_choice="none"` no answer holds a call, however much the model wants to write one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.tools import ALL_TOOLS, CALL
from zsmerge_llm import LLM
from zsmerge_llm.language.tool_calls import MARKERS

UNKNOWN = CALL.replace("weather", "rain")
CALLS = {
    "Hermes": f"<tool_call>\n{CALL}\n</tool_call>",
    "Mistral": f'[TOOL_CALLS] [{CALL[:-1]}, "id": "abcdefghi"}}]',
    "Llama 3": f"<|python_tag|>{CALL.replace('arguments', 'parameters')}",
    "bare": CALL,
    "fenced": f"```json\n{json.dumps(json.loads(CALL), indent=2)}\n```",
    "a list": f"[{CALL}]",
    "OpenAI": f'{{"type": "function", "function": {CALL}}}',
    "Python": CALL.replace('"', "'"),
    "turned round": '{"arguments": {"place": "Bern"}, "name": "weather"}',
    "under another key": '{"function": "weather", "place": "Bern"}',
    "of a tool that is not there": UNKNOWN,
    "Qwen Coder": "<function=weather>\n<parameter=place>\nBern\n</parameter>\n</function>",
}
NAMES_A_TOOL = re.compile(r"""["'](name|function)["']\s*:\s*["'](weather|add|now)["']""")
NAMES_ARGUMENTS = re.compile(r"""["']name["']\s*:\s*["'][^"']*["']\s*,\s*["'](arguments|parameters)["']\s*:""")


@contextmanager
def insisting_on(llm: LLM, text: str) -> Iterator[None]:
    """Let the model write a text, but for the tokens of it that the grammar does not allow."""

    class Insists:
        greedy = False

        def __init__(self, *_: Any) -> None:
            self.left = [*llm.tokenizer.encode(text, add_special_tokens=False), llm.tokenizer.eos_token_id]

        def __call__(self, logits: torch.Tensor) -> torch.Tensor:
            while len(self.left) > 1 and logits[self.left[0]] == -torch.inf:
                self.left.pop(0)
            return torch.tensor(self.left[0]) if logits[self.left[0]] > -torch.inf else logits.argmax()

        def accept(self, token: int) -> None:
            if self.left[:1] == [token]:
                self.left.pop(0)

    with mock.patch("zsmerge_llm.engine.engine.Sampler", Insists):
        yield


def is_free_of_calls(text: str) -> bool:
    marked = any(marker in text for marker in (*(each[:-1] for each in MARKERS), "<function="))
    return not (marked or NAMES_A_TOOL.search(text) or NAMES_ARGUMENTS.search(text))


@pytest.mark.parametrize("name", ["qwen2.5", "mistral-nemo", "llama3", "gemma2"])
def test_no_family_s_call_comes_back_as_text(name: str) -> None:
    llm = make_llm(name, cache=LARGE_CACHE)
    for at, call in enumerate(CALLS.values()):
        before = ("", "Sure. ", "Sure:\n")[at % 3]
        assert not is_free_of_calls(call)
        with insisting_on(llm, before + call):
            chunks = list(llm.stream("Is it warm?", tools=ALL_TOOLS, tool_choice="none"))
            (together,) = llm.batch(["Is it warm?"], tools=ALL_TOOLS, tool_choice="none")
        text = "".join(chunk.text for chunk in chunks)
        assert text.startswith(before)
        assert is_free_of_calls(text), text
        assert not any(chunk.tool_calls or chunk.invalid_tool_calls or chunk.tool_call_deltas for chunk in chunks)
        assert (together.text, together.tool_calls) == (text, [])


def test_a_json_object_of_any_form_is_no_call_either() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    with insisting_on(llm, CALL):
        result = llm.chat("?", tools=ALL_TOOLS, tool_choice="none", response_format={"type": "json_object"})
    assert json.loads(result.text)["name"] == "weather"
    assert not {"arguments", "parameters"} & json.loads(result.text).keys()
    with insisting_on(llm, '{"name": "Ann", "arms": 2}'):
        result = llm.chat("?", tools=ALL_TOOLS, tool_choice="none", response_format={"type": "json_object"})
    assert json.loads(result.text) == {"name": "Ann", "arms": 2}


def test_other_json_and_code_stay_as_they_are() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    text = (
        'So:\n```json\n{"name": "weathered", "tool": "hammer", "parameters": [1]}\n```\n<tool>\n#include <functional>'
    )
    with insisting_on(llm, text):
        assert llm.chat("?", tools=ALL_TOOLS, tool_choice="none").text == text
