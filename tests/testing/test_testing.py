"""The test doubles behave like what they stand for, and cost nothing to import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from threading import Event

import pytest

from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.testing import FakeLLM, FakeRequest, scripted_answer, tiny_llm

METHODS = ("chat", "stream", "complete", "stream_complete", "batch_complete", "read_document", "count_prompt_tokens")


@pytest.mark.parametrize("method", METHODS)
def test_the_fake_takes_the_arguments_of_the_real_methods(method: str) -> None:
    real = inspect.signature(getattr(LLM, method)).parameters
    fake = inspect.signature(getattr(FakeLLM, method)).parameters
    assert list(real)[1] == list(fake)[1]
    named = {name for name, parameter in fake.items() if parameter.kind is not parameter.VAR_KEYWORD}
    assert named <= set(real)
    if len(named) < len(real):
        assert set(real) - {"self", "messages", "prompt", "progress"} <= set(FakeRequest.__dataclass_fields__)


def test_answers_come_in_order_and_the_last_one_repeats() -> None:
    llm = FakeLLM("First.", "And second.")
    assert [llm.chat("Hi").text for _ in range(3)] == ["First.", "And second.", "And second."]
    assert [chunk.text for chunk in llm.stream("Hi")] == ["And ", "second.", ""]
    assert [request.method for request in llm.requests] == ["chat"] * 4


def test_a_scripted_answer_has_tool_calls_and_reasoning() -> None:
    llm = FakeLLM(scripted_answer("", {"name": "add", "arguments": "{}"}, reasoning="A sum."))
    result = llm.chat("1 + 2?", tools=[])
    assert (result.finish_reason, result.reasoning) == ("tool_calls", "A sum.")
    assert [call["function"]["name"] for call in result.tool_calls] == ["add"]


def test_cancelling_and_the_token_limit_end_an_answer() -> None:
    llm, cancel = FakeLLM("one two three four"), Event()
    assert llm.complete("Count.", sampling=SamplingParams(max_tokens=2)).text == "one two "
    stream = llm.stream_complete("Count.", cancel=cancel)
    next(stream)
    cancel.set()
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    assert (llm.decoded_words, llm.closed_streams) == (3, 2)


def test_an_unknown_keyword_and_a_scripted_error_are_raised() -> None:
    with pytest.raises(TypeError):
        list(FakeLLM().stream("Hi", temperature=1))
    with pytest.raises(RuntimeError, match="out of memory"):
        FakeLLM(error=RuntimeError("out of memory")).chat("Hi")


def test_a_document_is_read_once_per_text() -> None:
    llm = FakeLLM()
    assert llm.read_document("A log.", name="log").name == llm.read_document(text="A log.", name="log").name == "log"
    assert llm.documents_read == 1


def test_the_tiny_model_answers_the_same_at_every_run() -> None:
    answers = {
        tiny_llm(cache=CacheConfig(slots=512)).chat("Hi", sampling=SamplingParams(max_tokens=8)).text for _ in "ab"
    }
    assert len(answers) == 1


def test_importing_the_test_doubles_loads_nothing_heavy() -> None:
    code = "import sys, zsmerge_llm.testing; print({'torch', 'transformers', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
