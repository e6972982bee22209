"""Reasoning is separated from the answer, and grammars apply to what follows it."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat import LARGE_CACHE, dialogue
from tests.support.templates import FOLDER, TOOLS, template
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.language.grammar import Constraint
from zsmerge_llm.language.messages import normalize_messages
from zsmerge_llm.language.reasoning import ReasoningParser
from zsmerge_llm.language.reasoning_tags import reasoning_mode, reasoning_tags

SCHEMA = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
SAMPLED = SamplingParams(max_tokens=120, temperature=1.0, seed=5)
QWEN3 = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")
BEGUN = QWEN3 + '{%- if add_generation_prompt -%}{{- "<think>\\n" -}}{%- endif -%}'
"""As DeepSeek-R1's: the prompt opens the reasoning."""


def reasoning_model(text: str = QWEN3, **settings: Any) -> LLM:
    """A tiny random model with Qwen3's template and its reasoning tokens."""
    tokenizer = copy.deepcopy(template("qwen3").tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    model = tiny_model(vocab=len(tokenizer))
    model.config.max_position_embeddings = 1_000_000
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return LLM(model, tokenizer=tokenizer, chat_template=text, cache=LARGE_CACHE, **settings)


def constraint(llm: LLM, max_tokens: int | None = 100, **wanted: Any) -> Constraint:
    messages, runtime = normalize_messages("?"), llm._load()
    form = runtime.output_formats.chat(messages, **wanted).behind(runtime.template.render(messages))
    made = form.constraint(SamplingParams(max_tokens=max_tokens))
    assert made is not None
    return made


def written(llm: LLM, limit: Constraint, thought: str, tokens: int = 100) -> str:
    """The answer of a model that reasons like this and then prefers random tokens."""
    ids: list[int] = []
    for token in llm._load().template.encode(thought):
        ids.append(limit.accept(token))
        if "</think>" in llm.tokenizer.decode(ids):
            break
    generator = torch.Generator().manual_seed(1)
    while not limit.done and len(ids) < tokens:
        ids += limit.forced()
        if not limit.done and len(ids) < tokens:
            scores = limit.mask(torch.rand(len(llm.tokenizer), generator=generator))
            ids.append(limit.accept(int(scores.argmax())))
    return str(llm.tokenizer.decode(ids))


def parsed(text: str, cuts: list[int], begun: bool) -> tuple[str, str]:
    stream = ReasoningParser(begun)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    parts = [stream.push(text[a:b]) for a, b in itertools.pairwise(places)] + [stream.finish()]
    return "".join(thought for thought, _ in parts), "".join(said for _, said in parts)


@pytest.mark.parametrize(
    ("text", "begun", "thought", "answer"),
    [
        ("<think>\nTwo and two.\n\nFour.\n</think>\n\nIt is 4.\n", False, "Two and two.\n\nFour.", "It is 4.\n"),
        ("<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("Hm.\n</think>\n\nYes", True, "Hm.", "Yes"),
        ("<think>I wonder", False, "I wonder", ""),
        ("I wonder </thi", True, "I wonder </thi", ""),
        ("  No thought, <think> is a word.", False, "", "  No thought, <think> is a word."),
        ("<thin", False, "", "<thin"),
        ("<think>a</think><think>b</think>", False, "a", "<think>b</think>"),
        ("", False, "", ""),
    ],
)
@given(cuts=st.lists(st.integers(0, 60)))
@settings(deadline=None, max_examples=20)
def test_reasoning_and_text_are_separated_wherever_pieces_end(
    text: str, begun: bool, thought: str, answer: str, cuts: list[int]
) -> None:
    assert parsed(text, cuts, begun) == (thought, answer)


def test_the_reasoning_mode_is_known_from_the_chat_template() -> None:
    tags = reasoning_tags(QWEN3)
    assert reasoning_mode(tags, "<|im_start|>assistant\n") == "optional"
    assert reasoning_mode(tags, "<|im_start|>assistant\n<think>\n\n</think>\n\n") == "off"
    assert reasoning_mode(tags, "<|im_start|>assistant\n<think>\n") == "open"
    assert reasoning_mode(reasoning_tags("no such thing"), "<|im_start|>assistant\n") == "off"


def test_a_format_applies_to_what_follows_the_reasoning() -> None:
    llm = reasoning_model()
    for thought in ("<think>\nA {thought}, <|im_start|> and all.</think>", ""):
        text = written(llm, constraint(llm, response_format=FORMAT), thought)
        assert json.loads(text.partition("</think>\n\n")[2] or text) in ({"x": True}, {"x": False})
    calls = written(llm, constraint(llm, tools=TOOLS, tool_choice="required"), "<think>Call it.</think>")
    assert calls.partition("</think>\n\n")[2].startswith("<tool_call>")


def test_reasoning_that_exceeds_its_budget_is_closed_so_that_the_answer_is_complete() -> None:
    llm = reasoning_model()
    limit = constraint(llm, max_tokens=80, response_format=FORMAT)
    text = written(llm, limit, "<think>" + "again and " * 40, tokens=80)
    assert set(json.loads(text.partition("</think>\n\n")[2])) == {"x"}
    assert limit.complete


def test_reasoning_cannot_begin_with_a_small_budget() -> None:
    llm = reasoning_model()
    limit = constraint(llm, max_tokens=40, response_format=FORMAT)
    opened = llm._load().template.encode("<think>")
    scores = limit.mask(torch.zeros(len(llm.tokenizer)))
    assert scores[opened].tolist() == [float("-inf")]


def test_the_answer_cannot_end_within_the_reasoning() -> None:
    llm = reasoning_model(BEGUN)
    limit = constraint(llm, response_format=FORMAT)
    scores = limit.mask(torch.zeros(len(llm.tokenizer)))
    assert scores[llm.tokenizer.eos_token_id] == float("-inf")
    assert not limit.complete
    assert not limit.done


@pytest.mark.parametrize("wanted", [{"response_format": FORMAT}, {"tools": TOOLS, "tool_choice": "required"}, {}])
def test_an_answer_that_begins_within_the_reasoning_has_reasoning_and_text(wanted: dict[str, Any]) -> None:
    llm = reasoning_model(BEGUN)
    *pieces, last = llm.stream("Hello", sampling=SAMPLED, **wanted)
    chunks = [*pieces, last]
    thought, text = "".join(chunk.reasoning for chunk in chunks), "".join(chunk.text for chunk in chunks)
    assert last.usage is not None
    assert thought
    assert "think>" not in thought + text
    assert 0 < last.usage.reasoning_tokens <= last.usage.completion_tokens
    result = llm.chat("Hello", sampling=SAMPLED, **wanted)
    assert (result.text, result.reasoning) == (text, thought)
    if "response_format" in wanted:
        assert set(json.loads(text)) == {"x"}
    elif wanted:
        assert last.tool_calls


def test_a_batch_separates_reasoning_too() -> None:
    llm = reasoning_model(BEGUN)
    for result in llm.batch(["Hello", "Good day to you"], response_format=FORMAT, sampling=SAMPLED):
        assert result.reasoning
        assert set(json.loads(result.text)) == {"x"}


def test_stop_strings_do_not_apply_to_the_reasoning() -> None:
    llm = reasoning_model(BEGUN)
    result = llm.chat("Hello", response_format=FORMAT, sampling=SAMPLED.replace(stop=("e", "a", "o", "}")))
    assert result.reasoning
    assert result.text.startswith('{"x')
    assert result.finish_reason == "stop"


def test_a_conversation_continues_whether_or_not_its_reasoning_is_sent_back() -> None:
    for key in ("", "reasoning_content"):
        llm = reasoning_model(BEGUN)
        messages = dialogue("Hello")
        first = llm.chat(messages, response_format=FORMAT, sampling=SAMPLED)
        reply = {"role": "assistant", "content": first.text, **({key: first.reasoning} if key else {})}
        second = llm.chat([*messages, reply, *dialogue("And now?")], sampling=SAMPLED.replace(max_tokens=4))
        assert second.usage.reuse == "continued"
        assert second.usage.cached_tokens > first.usage.prompt_tokens
