"""Answers from steps in fixed memory: stop strings, grammars, tools, sessions, forks and cancelling as without them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from threading import Event, Thread
from typing import Any

import pytest

from tests.support.chat import LARGE_CACHE, SMALL_CACHE, make_llm
from tests.support.static_backend import StaticBackend
from tests.support.tools import TOOLS
from zsmerge_llm import LLM, CacheConfig, Grammar, SamplingParams
from zsmerge_llm.engine import engine as engine_module
from zsmerge_llm.gpu.backend import GPUBackend

SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "place",
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 8}, "big": {"type": "boolean"}},
            "required": ["name", "big"],
        },
    },
}
SHORT = SamplingParams(max_tokens=30)


class _Static(StaticBackend):
    """Takes the place of the CPU's backend."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    @staticmethod
    def serves(model: Any) -> bool:
        return True


@pytest.fixture
def llms(monkeypatch: pytest.MonkeyPatch) -> tuple[LLM, LLM]:
    """The same model twice: decoding in fixed memory, and in each cache's own."""
    return _both(monkeypatch, SMALL_CACHE)


@pytest.fixture
def roomy_llms(monkeypatch: pytest.MonkeyPatch) -> tuple[LLM, LLM]:
    """The same, with caches that never compress: several tokens that a grammar forces are read in other pieces."""
    return _both(monkeypatch, LARGE_CACHE)


def _both(monkeypatch: pytest.MonkeyPatch, cache: CacheConfig) -> tuple[LLM, LLM]:
    plain = make_llm(compile=False, cache=cache)
    plain.count_tokens("load it")
    monkeypatch.setattr(engine_module, "CPUBackend", _Static)
    static = make_llm(compile=False, cache=cache)
    assert isinstance(static.engine.backend, StaticBackend)
    return static, plain


def test_a_chat_over_several_turns_is_the_same(llms: tuple[LLM, LLM]) -> None:
    def chat(llm: LLM) -> list[Any]:
        messages: list[dict[str, Any]] = []
        found = []
        for turn in range(5):
            messages.append({"role": "user", "content": f"Tell me about island number {turn}, and about its keeper."})
            result = llm.chat(messages, sampling=SHORT)
            messages.append({"role": "assistant", "content": result.text})
            found.append(
                (result.text, result.finish_reason, result.usage.completion_tokens, result.usage.cached_tokens)
            )
        return found

    assert chat(llms[0]) == chat(llms[1])


@pytest.mark.parametrize(
    "options",
    [
        {"response_format": SCHEMA},
        {"grammar": Grammar.regex("(yes|no|perhaps), [a-z]{3,9}")},
        {"tools": TOOLS, "tool_choice": "required"},
        {"sampling": SHORT.replace(temperature=0.8, seed=3, top_p=0.9, repetition_penalty=1.2)},
        {"response_format": SCHEMA, "sampling": SamplingParams(max_tokens=60, repetition_penalty=1.3)},
    ],
    ids=["schema", "grammar", "tools", "sampling", "schema-and-penalty"],
)
def test_constrained_and_sampled_answers_are_the_same(roomy_llms: tuple[LLM, LLM], options: dict[str, Any]) -> None:
    wanted = {"sampling": SamplingParams(max_tokens=60), **options}
    one, other = (llm.chat("What is the weather on the island of Skye?", **wanted) for llm in roomy_llms)
    assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    assert [call["function"] for call in one.tool_calls] == [call["function"] for call in other.tool_calls]


def test_a_stop_string_ends_the_answer_and_its_session_goes_on(llms: tuple[LLM, LLM]) -> None:
    whole = llms[1].complete("The island", sampling=SHORT).text
    stop = whole[len(whole) // 2 :][:3]

    def ask(llm: LLM) -> list[Any]:
        first = llm.chat("Name an island.", sampling=SHORT.replace(stop=(stop,)), session="a")
        said = {"role": "assistant", "content": first.text}
        messages = [{"role": "user", "content": "Name an island."}, said, {"role": "user", "content": "And another."}]
        second = llm.chat(messages, sampling=SHORT, session="a")
        return [first.text, first.finish_reason, second.text, second.usage.cached_tokens]

    assert ask(llms[0]) == ask(llms[1])


def test_an_answer_that_is_cancelled_or_closed_leaves_a_session_that_goes_on(llms: tuple[LLM, LLM]) -> None:
    def ask(llm: LLM) -> list[Any]:
        cancel = Event()
        for index, _ in enumerate(llm.stream("Name an island.", sampling=SHORT, session="a", cancel=cancel)):
            if index == 2:
                cancel.set()
        stream = llm.stream("Name a lighthouse.", sampling=SHORT, session="b")
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        return [llm.chat("Name an island.", sampling=SHORT).text, llm.chat("Name a lighthouse.", sampling=SHORT).text]

    assert ask(llms[0]) == ask(llms[1])


def test_a_forked_session_is_independent(llms: tuple[LLM, LLM]) -> None:
    def ask(llm: LLM) -> list[str]:
        first = llm.chat("Name an island.", sampling=SHORT, session="a")
        fork = llm.add_session(llm.session("a").fork("b"))
        messages = [{"role": "user", "content": "Name an island."}, {"role": "assistant", "content": first.text}]
        questions = ({"role": "user", "content": text} for text in ("Who lives there?", "How large is it?"))
        names = ("a", fork.name)
        return [llm.chat([*messages, each], sampling=SHORT, session=name).text
                for name, each in zip(names, questions, strict=True)]  # fmt: skip

    assert ask(llms[0]) == ask(llms[1])


def test_batches_and_threads_get_the_same_answers(llms: tuple[LLM, LLM]) -> None:
    questions = [f"Tell me of island {number} and {'its keeper ' * number}." for number in range(6)]
    expected = [llms[1].chat(question, sampling=SHORT).text for question in questions]
    assert [result.text for result in llms[0].batch(questions, sampling=SHORT)] == expected
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        found[index] = llms[0].chat(questions[index], sampling=SHORT, session=str(index)).text

    threads = [Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [found[index] for index in range(6)] == expected


def test_warming_up_captures_the_step_of_one_conversation(llms: tuple[LLM, LLM]) -> None:
    backend = llms[0].engine.backend
    assert isinstance(backend, StaticBackend)
    llms[0].engine.warm_up()
    captured = backend.captured
    assert captured
    llms[0].chat("Hi", sampling=SHORT.replace(max_tokens=3, lookup=False))
    assert backend.captured == captured


class _GPUOnHost(GPUBackend):
    """The GPU's backend where there is none: steps run instead of being repeated as graphs."""

    @staticmethod
    def serves(model: Any) -> bool:
        return True

    def capture(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        warm_up()
        return run


@pytest.mark.slow
def test_a_real_model_answers_the_same_through_the_gpus_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(llm: LLM) -> list[Any]:
        text = (files("zsmerge_llm") / "data" / "marigold.txt").read_text(encoding="utf-8")[:6000]
        document = llm.read_document(text=text)
        found: list[Any] = [llm.chat("Who is the captain?", session=document, sampling=SHORT).text]
        messages: list[dict[str, Any]] = []
        for question in ("Name a fish.", "And a bird.", "Which of them can fly?"):
            messages.append({"role": "user", "content": question})
            result = llm.chat(messages, sampling=SHORT)
            messages.append({"role": "assistant", "content": result.text})
            found.append((result.text, result.usage.cached_tokens))
        return [*found, *(each.text for each in llm.batch(["Count to five.", "Say hello."], sampling=SHORT))]

    settings: dict[str, Any] = {"dtype": "float32", "cache": CacheConfig(slots=256), "compile": False, "chunk": 512}
    expected = answers(LLM("smollm2", **settings))
    monkeypatch.setattr(engine_module, "CPUBackend", _GPUOnHost)
    static = LLM("smollm2", **settings)
    assert answers(static) == expected
    assert static.explain().decode_step == "captured"
