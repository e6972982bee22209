"""Where a request writes a conversation differently from what was read, the next one reads only from there on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.language.test_reasoning import reasoning_model
from tests.support.chat import LARGE_CACHE, SHORT, SYSTEM, dialogue, make_llm
from tests.support.scripted_model import scripted_answers
from tests.support.templates import TOOLS
from tests.support.tools import CALL, with_results
from zsmerge_llm import LLM, SamplingParams

TOKENS = SamplingParams(max_tokens=800)
LONG_THOUGHT = "I wonder what this may be about, and what to say of it. " * 2


def edited_dialogue(llm: LLM, turns: int) -> tuple[list[int], list[int]]:
    """Hold a dialogue as coding agents do: the newest text of a file stands before each question.

    Return how many tokens each turn has read, and how many its prompt has.
    """
    history: list[dict[str, Any]] = [SYSTEM]
    read, length = [], []
    for turn in range(turns):
        file = dialogue(f"This is the file now:\n{'x = 1; ' * 20}y = {turn}", "Ok.")
        question = dialogue(f"Change it, please, for the {turn}th time. " * 5)
        result = llm.chat([*history, *file, *question], sampling=SHORT)
        history += [*question, {"role": "assistant", "content": result.text}]
        length.append(result.usage.prompt_tokens)
        read.append(length[-1] - result.usage.cached_tokens)
    return read, length


def test_a_dialogue_whose_last_but_one_message_changes_reads_its_history_once() -> None:
    read, length = edited_dialogue(make_llm(cache=LARGE_CACHE), 6)
    assert length[-1] > 1.9 * length[1]
    assert max(read[3:]) < 1.3 * read[2]  # what follows the point where it parts from the turn before


def test_a_point_where_requests_part_changes_no_answer() -> None:
    llm, fresh = make_llm(cache=LARGE_CACHE), make_llm(cache=LARGE_CACHE)
    edited_dialogue(llm, 4)
    history = [SYSTEM, *dialogue("Change it, please, for the 0th time. " * 5)]
    messages = [*history, {"role": "assistant", "content": "No."}, *dialogue("And now?")]
    again, first = (each.chat(messages, sampling=SHORT, session="it") for each in (llm, fresh))
    assert again.usage.cached_tokens > first.usage.cached_tokens == 0
    assert again.text == first.text
    assert llm.session("it").tokens == fresh.session("it").tokens
    logits = (each.session("it").cache.logits for each in (llm, fresh))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def reasoned(thought: str, answer: str, is_open: bool = False) -> str:
    return f"{'' if is_open else '<think>'}\n{thought}\n</think>\n\n{answer}"


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_reasoning_that_the_template_leaves_out_is_not_in_the_cache_of_the_next_turn(name: str) -> None:
    llm = reasoning_model() if name == "qwen3" else make_llm(name, cache=LARGE_CACHE)
    messages = dialogue("Hello, who are you? " * 4)
    for turn in range(3):
        with scripted_answers(llm, reasoned(LONG_THOUGHT, f"Answer {turn}.", name == "deepseek-r1")):
            result = llm.chat(messages, sampling=TOKENS, session="it")
        assert result.reasoning == LONG_THOUGHT.strip()
        if turn:
            assert result.usage.reuse == "restored"
            assert result.usage.prompt_tokens - result.usage.cached_tokens < 60
        text = llm.tokenizer.decode(llm.session("it").tokens)
        assert text.count("I wonder") == 2
        assert all(f"Answer {earlier}." in text for earlier in range(turn))
        messages = [*messages, {"role": "assistant", "content": result.text}, *dialogue(f"And {turn}?")]


def test_short_reasoning_stays_where_more_would_be_read_again() -> None:
    llm = reasoning_model()
    with scripted_answers(llm, reasoned("Hm.", LONG_THOUGHT)):
        first = llm.chat("Hello", sampling=TOKENS)
        second = llm.chat(dialogue("Hello", first.text, "And?"), sampling=TOKENS)
    assert second.usage.reuse == "continued"


def test_reasoning_within_a_turn_of_tools_stays_until_the_turn_is_over() -> None:
    llm = reasoning_model()
    messages = dialogue("Is it warm in Zürich?")
    with scripted_answers(llm, reasoned(LONG_THOUGHT, CALL), reasoned("18 degrees.", "It is warm.")):
        called = llm.chat(messages, tools=TOOLS, sampling=TOKENS, session="it")
        messages = with_results(messages, called)
        answered = llm.chat(messages, tools=TOOLS, sampling=TOKENS, session="it")
    assert (called.usage.reuse, answered.usage.reuse) == ("new", "continued")
    assert "I wonder" in llm.tokenizer.decode(llm.session("it").tokens)
    messages = [*messages, {"role": "assistant", "content": answered.text}, *dialogue("Thanks")]
    with scripted_answers(llm, reasoned("Polite.", "Welcome.")):
        last = llm.chat(messages, tools=TOOLS, sampling=TOKENS, session="it")
    assert last.usage.reuse == "restored"
    text = llm.tokenizer.decode(llm.session("it").tokens)
    assert "I wonder" not in text
    assert "It is warm." in text


def test_regenerating_an_answer_reads_no_more_than_its_header() -> None:
    llm = reasoning_model()
    with scripted_answers(llm, reasoned(LONG_THOUGHT, "One."), reasoned(LONG_THOUGHT, "Two.")):
        first = llm.chat("Hello", sampling=TOKENS)
        second = llm.chat("Hello", sampling=TOKENS)
    assert (first.text, second.text) == ("One.", "Two.")
    assert second.usage.prompt_tokens - second.usage.cached_tokens < 12
