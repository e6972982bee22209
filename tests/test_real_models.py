"""Real weights: exact logits while everything fits, correct answers beyond."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.models.loader import load

PROMPT = "The old lighthouse keeper climbed the stairs every evening to"
TEXT = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8")[:4000]


def test_greedy_text_of_smollm2_equals_transformers_generate(smollm2: LLM) -> None:
    ids = smollm2.tokenizer(PROMPT, return_tensors="pt").input_ids
    model = smollm2.engine.model
    model.set_attn_implementation("sdpa")
    expected = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
    model.set_attn_implementation("zsmerge")
    params = SamplingParams(max_tokens=64, ignore_eos=True)
    generated = list(smollm2.engine.stream(smollm2.engine.new_cache(), ids[0], params))
    assert generated[: len(expected)] == expected


def test_smollm2_answers_and_reports_usage(smollm2: LLM) -> None:
    result = smollm2.chat("What is the capital of France?", sampling=SamplingParams(max_tokens=40))
    assert "Paris" in result.text
    assert result.finish_reason == "stop"
    assert result.usage.completion_tokens < 40
    assert result.usage.dropped_tokens == 0
    assert result.usage.prefill_seconds > 0


def test_a_question_after_a_long_text_is_answered_with_an_eighth_of_the_slots(smollm2: LLM) -> None:
    """About 1,900 tokens in 256 slots, ranked by the attention of the question at the prompt's end."""
    llm = LLM(smollm2.engine.model, tokenizer=smollm2.tokenizer, cache=CacheConfig(slots=256))
    filler = "The harbour was quiet, and the boats lay still along the wooden pier under a grey sky. "
    fact = "The secret code of the old safe is 7351. "
    messages = [
        {"role": "user", "content": filler * 50 + fact + filler * 50 + "\n\nWhat is the secret code of the old safe?"}
    ]
    result = llm.chat(messages, sampling=SamplingParams(max_tokens=24))
    assert "7351" in result.text
    assert result.usage.prompt_tokens > 7 * 256
    assert result.usage.dropped_tokens > 6 * 256


def test_dropped_facts_of_a_document_are_retrieved_from_its_text(smollm2: LLM) -> None:
    """The document is read before any question, into about an eighth of the slots that it needs."""
    llm = LLM(smollm2.engine.model, tokenizer=smollm2.tokenizer, cache=CacheConfig(slots=256))
    filler = "The harbour was quiet, and the boats lay still along the wooden pier under a grey sky. "
    facts = [
        "\n\nThe old safe opens with the code 7351.\n\n",
        "\n\nThe miller's dog has the name Bruno.\n\n",
        "\n\nThe chapel was built in the year 1742.\n\n",
    ]
    document = llm.read_document(text=(filler * 25).join(["", *facts, ""]))
    for question, answer in (("What is the code of the old safe?", "7351"), ("When was the chapel built?", "1742")):
        result = llm.chat(question, session=document, sampling=SamplingParams(max_tokens=24))
        assert answer in result.text
        assert 0 < result.usage.retrieved_tokens <= 140
        assert result.usage.dropped_tokens > 6 * 256


def test_stop_strings_end_an_answer_and_are_not_part_of_it(smollm2: LLM) -> None:
    params = SamplingParams(max_tokens=60)
    whole = smollm2.complete("One, two, three, four,", sampling=params).text
    stop = whole[5:9]
    cut = smollm2.complete("One, two, three, four,", sampling=params.replace(stop=(stop,)))
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_a_batch_of_different_lengths_equals_single_requests(smollm2: LLM) -> None:
    prompts = ["Name three colours.", "What is two plus two? Answer in one short sentence, please.", "Hello!"]
    params = SamplingParams(max_tokens=16)
    results = smollm2.batch(prompts, sampling=params)
    assert [result.text for result in results] == [smollm2.chat(p, sampling=params).text for p in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b-instruct", "gemma-3-270m"])
def test_real_weights_give_transformers_logits_while_everything_fits(name: str, gguf: dict[str, Path]) -> None:
    loaded = load(gguf[name], dtype="float32")
    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids[:, :700]
    with torch.inference_mode():
        logits = loaded.model(ids).logits[0]
    expected = logits[:-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    del logits
    engine = Engine(loaded.model, CacheConfig(slots=1024), chunk=256)
    logprobs = engine.logprobs(engine.new_cache(), ids[0])[1:]
    torch.testing.assert_close(logprobs, expected, atol=2e-3, rtol=2e-3)
    assert (logprobs - expected).abs().mean() < 1e-4
