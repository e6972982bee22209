"""Arguments of a wrong type are refused in the call that has them, before anything is read, and harm nobody else."""

from __future__ import annotations

from dataclasses import replace
from threading import Event
from typing import Any

import pytest

from tests.support.chat import LARGE_CACHE, SHORT, make_llm
from zsmerge_llm import LLM, CacheConfig, Grammar, SamplingParams
from zsmerge_llm.errors import ConfigError, InputError, SessionNotFoundError, ZSMergeError
from zsmerge_llm.language.json_values import MAX_SCHEMA, MAX_TOOLS
from zsmerge_llm.testing.tiny_model import tiny_model


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm(cache=LARGE_CACHE)


def deep(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = {"a": value}
    return value


def tool(parameters: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


WRONG = [
    *({"session": name} for name in (7, 7.0, b"ann", ["ann"], {"a": 1}, True, object())),
    *({"probe": probe} for probe in (7, ["a"])),
    *({"sampling": sampling} for sampling in ({"max_tokens": 4}, 7, "greedy")),
    *({"grammar": grammar} for grammar in ("a|b", 7)),
    *({"cancel": cancel} for cancel in (True, "now")),
    {"progress": "yes"},
    *({"timeout": seconds} for seconds in (float("nan"), float("inf"), 10**400, "5", 0, -1, True)),
    *({"priority": priority} for priority in ("high", 1.5, None)),
    *({"tools": tools} for tools in (7, "f", [7], [{}], tool({1, 2}), tool(object()), tool({"a": float("nan")}))),
    *(
        {"tools": tool(parameters)}
        for parameters in (deep(5000), deep(200), {"\ud800": 1}, {(1, 2): 3}, {"n": 10**5000})
    ),
    {"tools": tool({"description": "x" * MAX_TOOLS})},
    *({"response_format": form} for form in (7, {"type": 7}, {"type": "json_schema", "json_schema": {"schema": 7}})),
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"title": "x" * MAX_SCHEMA}}}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": [{1}]}}}},
    *({"tool_choice": choice} for choice in (7, [], {"function": {"name": [1]}}, "f")),
]


@pytest.mark.parametrize("options", WRONG, ids=lambda each: next(iter(each)))
def test_a_wrong_argument_of_a_chat_is_an_input_error_before_anything_is_read(
    llm: LLM, options: dict[str, Any]
) -> None:
    known = len(llm.store)
    with pytest.raises(ZSMergeError) as caught:
        llm.chat("Hello", **{"sampling": SHORT, **options})

    assert isinstance(caught.value, (InputError, ConfigError))
    assert len(llm.store) == known


def test_a_session_that_is_no_name_is_refused_alone_and_others_answer_as_before(llm: LLM) -> None:
    assert llm.chat("Hello", session="ann", sampling=SHORT).usage.reuse
    for name in (7, 4.2, b"x", object()):
        with pytest.raises(InputError, match="session must be"):
            llm.chat("Hello", session=name, sampling=SHORT)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="name must be text"):
            llm.read_document(text="A text.", name=name)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="must be text"):
            llm.session("ann").fork(name)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="is text"):
            llm.session(name)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="must be a Session"):
            llm.add_session(name)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="name must be text"):
            llm.add_session(replace(llm.session("ann"), name=name))
    assert llm.chat("Hello", session="bob", sampling=SHORT).text is not None
    assert llm.chat("Hello", session="ann", sampling=SHORT).usage.reuse == "restored"


@pytest.mark.parametrize("document", [7, b"text", ["text"], None])
def test_a_document_that_is_no_text_is_an_input_error(llm: LLM, document: Any) -> None:
    for arguments in ({"document": document}, {"text": document}):
        with pytest.raises(InputError):
            llm.read_document(**arguments)
    with pytest.raises(InputError, match="probe"):
        llm.read_document(text="A text.", probe=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("entries", ["Hello", 7, {"role": "user"}, None])
def test_a_batch_that_is_no_list_is_an_input_error(llm: LLM, entries: Any) -> None:
    with pytest.raises(InputError, match="must be a list"):
        llm.batch(entries, sampling=SHORT)
    with pytest.raises(InputError, match="must be a list"):
        llm.batch_complete(entries, sampling=SHORT)


@pytest.mark.parametrize("text", ["a\ud800b", 7, b"text", None])
def test_text_that_is_no_unicode_or_no_text_is_an_input_error(llm: LLM, text: Any) -> None:
    for call in (llm.chat, llm.complete, llm.count_tokens, llm.count_prompt_tokens):
        with pytest.raises(InputError):
            call(text)
    with pytest.raises(InputError):
        llm.chat([{"role": "user", "content": "a"}, {"role": text, "content": "b"}])


@pytest.mark.parametrize(
    "settings",
    [
        *({"stop": stop} for stop in (7, b"stop", [b"stop"], [7], [""], object())),
        *({"seed": seed} for seed in (-1, 2**64, 10**5000, 1.0, "1")),
        *({"max_tokens": most} for most in (0, "9", 10**5000 * -1)),
        *({"temperature": value} for value in (float("nan"), 10**400, "hot", -1)),
        {"top_k": -1},
    ],
    ids=lambda each: next(iter(each)),
)
def test_sampling_settings_out_of_range_are_config_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"slots": 10**18}, {"slots": 10**5000}, {"stage": 10**12}, {"layer_budgets": (10**400,)}, {"pool_kernel": 10**30}],
    ids=["slots", "digits", "stage", "budgets", "pool"],
)
def test_sizes_of_a_cache_that_no_machine_holds_are_config_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CacheConfig(**settings)


def test_the_largest_seed_samples(llm: LLM) -> None:
    params = SamplingParams(max_tokens=2, temperature=1.0, seed=2**64 - 1, top_k=2**62)
    assert llm.chat("Hello", sampling=params, cancel=Event(), timeout=1e300).finish_reason == "length"


@pytest.mark.parametrize("make", [lambda: Grammar.regex("("), lambda: Grammar.regex(7), lambda: Grammar.lark(7)])
def test_a_grammar_that_is_none_is_an_input_error(llm: LLM, make: Any) -> None:
    with pytest.raises(InputError):
        llm.chat("Hello", grammar=make(), sampling=SHORT)


def test_an_unknown_session_names_no_other(llm: LLM) -> None:
    llm.chat("Hello", session="secret plan", sampling=SHORT)
    with pytest.raises(SessionNotFoundError) as caught:
        llm.session("another")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        *({"chunk": chunk} for chunk in (0, "x", 1.5, 2**40)),
        *({"max_input_tokens": limit} for limit in (0, "x", 1.5)),
        *({"chat_template": source} for source in (7, b"x", {})),
        *({"template_args": args} for args in (7, "x", [("a", 1)], {1: 2})),
        *({"device": device} for device in (7, 10**5000, b"cpu")),
    ],
    ids=lambda each: next(iter(each)),
)
def test_settings_of_a_model_that_are_of_a_wrong_type_are_config_errors(settings: dict[str, Any]) -> None:
    model, tokenizer = tiny_model()
    with pytest.raises(ConfigError), LLM(model, tokenizer=tokenizer, **settings) as llm:
        llm.chat("Hello", sampling=SHORT)
