"""Reasoning models: the thought is kept apart from the answer, and forms hold for what comes behind it."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.talk import ROOMY, said
from tests.support.templates import FOLDER, TOOLS, template
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.language.grammar import Constraint
from zsmerge_llm.language.messages import normalize_messages
from zsmerge_llm.language.reasoning import ReasoningParser, reasoning_mode

SCHEMA = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
WARM = SamplingParams(max_tokens=120, temperature=1.0, seed=5)
QWEN3 = (FOLDER / "qwen3.jinja").read_text(encoding="utf-8")
BEGUN = QWEN3 + '{%- if add_generation_prompt -%}{{- "<think>\\n" -}}{%- endif -%}'
"""As DeepSeek-R1's: the prompt opens the thought."""


def thinker(text: str = QWEN3, **settings: Any) -> LLM:
    """A tiny random model with Qwen3's template and its tokens for thoughts."""
    tokenizer = copy.deepcopy(template("qwen3").tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    model = tiny_model(vocab=len(tokenizer))
    model.config.max_position_embeddings = 1_000_000
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return LLM(model, tokenizer=tokenizer, chat_template=text, cache=ROOMY, **settings)


def constraint(llm: LLM, max_tokens: int | None = 100, **wanted: Any) -> Constraint:
    form = llm._load().output_formats.chat(normalize_messages("?"), **wanted)
    made = form.constraint(SamplingParams(max_tokens=max_tokens))
    assert made is not None
    return made


def written(llm: LLM, limit: Constraint, thought: str, tokens: int = 100) -> str:
    """What comes of a model that thinks this and would then say anything."""
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


def taken_apart(text: str, cuts: list[int], begun: bool) -> tuple[str, str]:
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
def test_a_thought_is_told_from_the_answer_wherever_pieces_end(
    text: str, begun: bool, thought: str, answer: str, cuts: list[int]
) -> None:
    assert taken_apart(text, cuts, begun) == (thought, answer)


def test_the_template_tells_how_a_model_thinks() -> None:
    assert reasoning_mode(QWEN3, "<|im_start|>assistant\n") == "optional"
    assert reasoning_mode(QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n") == "off"
    assert reasoning_mode(BEGUN, "<|im_start|>assistant\n<think>\n") == "open"
    assert reasoning_mode("no such thing", "<|im_start|>assistant\n") == "off"


def test_a_form_holds_behind_the_thought() -> None:
    llm = thinker()
    for thought in ("<think>\nA {thought}, <|im_start|> and all.</think>", ""):
        text = written(llm, constraint(llm, response_format=FORMAT), thought)
        assert json.loads(text.partition("</think>\n\n")[2] or text) in ({"x": True}, {"x": False})
    calls = written(llm, constraint(llm, tools=TOOLS, tool_choice="required"), "<think>Call it.</think>")
    assert calls.partition("</think>\n\n")[2].startswith("<tool_call>")


def test_a_thought_that_takes_too_long_is_ended_so_that_the_answer_still_comes() -> None:
    llm = thinker()
    limit = constraint(llm, max_tokens=80, response_format=FORMAT)
    text = written(llm, limit, "<think>" + "again and " * 40, tokens=80)
    assert set(json.loads(text.partition("</think>\n\n")[2])) == {"x"}
    assert limit.complete


def test_no_thought_is_begun_where_few_tokens_are_left() -> None:
    llm = thinker()
    limit = constraint(llm, max_tokens=40, response_format=FORMAT)
    opened = llm._load().template.encode("<think>")
    scores = limit.mask(torch.zeros(len(llm.tokenizer)))
    assert scores[opened].tolist() == [float("-inf")]


def test_a_thought_cannot_end_the_answer() -> None:
    llm = thinker(BEGUN)
    limit = constraint(llm, response_format=FORMAT)
    scores = limit.mask(torch.zeros(len(llm.tokenizer)))
    assert scores[llm.tokenizer.eos_token_id] == float("-inf")
    assert not limit.complete
    assert not limit.done


@pytest.mark.parametrize("wanted", [{"response_format": FORMAT}, {"tools": TOOLS, "tool_choice": "required"}, {}])
def test_an_answer_that_begins_within_the_thought_has_both(wanted: dict[str, Any]) -> None:
    llm = thinker(BEGUN)
    *pieces, last = llm.stream("Hello", sampling=WARM, **wanted)
    chunks = [*pieces, last]
    thought, text = "".join(chunk.reasoning for chunk in chunks), "".join(chunk.text for chunk in chunks)
    assert last.usage is not None
    assert thought
    assert "think>" not in thought + text
    assert 0 < last.usage.reasoning_tokens <= last.usage.completion_tokens
    result = llm.chat("Hello", sampling=WARM, **wanted)
    assert (result.text, result.reasoning) == (text, thought)
    if "response_format" in wanted:
        assert set(json.loads(text)) == {"x"}
    elif wanted:
        assert last.tool_calls


def test_a_batch_keeps_thoughts_apart_too() -> None:
    llm = thinker(BEGUN)
    for result in llm.batch(["Hello", "Good day to you"], response_format=FORMAT, sampling=WARM):
        assert result.reasoning
        assert set(json.loads(result.text)) == {"x"}


def test_stop_strings_count_from_the_answer_on() -> None:
    llm = thinker(BEGUN)
    result = llm.chat("Hello", response_format=FORMAT, sampling=WARM.replace(stop=("e", "a", "o", "}")))
    assert result.reasoning
    assert result.text.startswith('{"x')
    assert result.finish_reason == "stop"


def test_a_conversation_goes_on_behind_a_thought_whether_it_comes_back_or_not() -> None:
    for key in ("", "reasoning_content"):
        llm = thinker(BEGUN)
        messages = said("Hello")
        first = llm.chat(messages, response_format=FORMAT, sampling=WARM)
        reply = {"role": "assistant", "content": first.text, **({key: first.reasoning} if key else {})}
        second = llm.chat([*messages, reply, *said("And now?")], sampling=WARM.replace(max_tokens=4))
        assert second.usage.reuse == "continued"
        assert second.usage.cached_tokens > first.usage.prompt_tokens
