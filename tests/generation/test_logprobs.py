"""Log-probabilities of an answer's tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.chat import LARGE_CACHE, make_llm
from tests.support.scripted_model import scripted_answers
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.errors import ConfigError

ASK = [{"role": "user", "content": "Name a tree."}]
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with make_llm(cache=LARGE_CACHE, retrieval_tokens=0) as llm:
        yield llm


def sampling(**settings: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 12, "logprobs": 3, **settings})


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}, {"logprobs": 0}])
def test_each_token_has_its_log_probability_and_the_text_is_the_same(llm: LLM, options: dict[str, Any]) -> None:
    given = sampling(**options)
    result = llm.chat(ASK, sampling=given)
    assert result.text == llm.chat(ASK, sampling=given.replace(logprobs=None)).text
    assert len(result.logprobs) == result.usage.completion_tokens
    for token in result.logprobs:
        assert token.logprob <= 0
        assert len(token.top) == given.logprobs
        assert [each.logprob for each in token.top] == sorted((each.logprob for each in token.top), reverse=True)
        if not options:  # greedy
            assert token.logprob == token.top[0].logprob


def test_they_are_those_that_the_model_gives_the_tokens_it_reads(llm: LLM) -> None:
    import torch

    prompt = "Once upon a time"
    result = llm.complete(prompt, sampling=sampling(logprobs=20, max_tokens=1))
    cache = llm.engine.new_cache()
    logits = llm.engine.read(cache, llm.tokenizer.encode(prompt, add_special_tokens=False))
    expected = logits.log_softmax(-1).topk(20).values
    assert torch.allclose(torch.tensor([each.logprob for each in result.logprobs[0].top]), expected, atol=1e-4)


def test_the_pieces_of_a_stream_have_those_of_the_whole_answer(llm: LLM) -> None:
    whole = llm.chat(ASK, sampling=sampling())
    chunks = list(llm.stream(ASK, sampling=sampling()))
    assert [each for chunk in chunks for each in chunk.logprobs] == whole.logprobs


def test_an_answer_in_a_format_has_them_for_forced_tokens_too(llm: LLM) -> None:
    whole = llm.chat(ASK, sampling=sampling(max_tokens=60), response_format=FORMAT)
    assert "".join(each.token for each in whole.logprobs) == whole.text
    assert all(math.isfinite(each.logprob) for each in whole.logprobs)


def test_answers_of_a_batch_have_their_own(llm: LLM) -> None:
    alone = llm.chat(ASK, sampling=sampling())
    for result in llm.batch([ASK, ASK], sampling=sampling()):
        assert [each.token for each in result.logprobs] == [each.token for each in alone.logprobs]


def test_reasoning_is_left_out() -> None:
    with make_llm("qwen3", cache=LARGE_CACHE, retrieval_tokens=0) as llm:
        with scripted_answers(llm, "<think>\nOak?\n</think>\n\nAn oak."):
            result = llm.chat(ASK, sampling=sampling(max_tokens=100))
        assert result.reasoning == "Oak?"
        assert "".join(each.token for each in result.logprobs).endswith("An oak.")
        assert "Oak?" not in "".join(each.token for each in result.logprobs)


def test_where_nobody_asks_there_are_none(llm: LLM) -> None:
    assert llm.chat(ASK, sampling=SamplingParams(max_tokens=3)).logprobs == []
    for number in (-1, 21, 1.5):
        with pytest.raises(ConfigError, match="logprobs"):
            sampling(logprobs=number)
