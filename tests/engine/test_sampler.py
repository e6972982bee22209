"""Tokens are sampled with the probabilities of transformers, reproducibly; logits that are not finite raise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.engine.sampler import Sampler
from zsmerge_llm.errors import ZSMergeError

VOCAB = 50


def sample(params: SamplingParams, logits: Tensor, seen: list[int] | None = None, times: int = 1) -> list[int]:
    sampler = Sampler(params, seen or [], "cpu")
    return [int(sampler(logits)) for _ in range(times)]


def logits(seed: int = 0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1, min_p=0.1),
        SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.5),
    ],
)
def test_tokens_have_the_probabilities_that_transformers_gives_them(params: SamplingParams) -> None:
    seen = [3, 4, 3, 9, 3]
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    generation = GenerationConfig(
        do_sample=True,
        temperature=float(params.temperature),
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
    )
    ids = torch.tensor([seen])
    processors = LlamaForCausalLM(config)._get_logits_processor(generation, input_ids_seq_length=len(seen))
    expected = processors(ids, logits()[None])[0].softmax(-1)

    sampled = torch.tensor(sample(params.replace(seed=1), logits(), seen, times=4_000))
    frequency = torch.bincount(sampled, minlength=VOCAB) / len(sampled)
    assert (frequency[expected == 0] == 0).all()
    assert (frequency - expected).abs().max() < 0.035


def test_temperature_zero_and_tiny_temperatures_choose_the_most_likely_token() -> None:
    best = int(logits().argmax())

    assert sample(SamplingParams(), logits()) == [best]
    assert sample(SamplingParams(temperature=1e-40), logits() * 1e30, times=50) == [best] * 50


def test_a_seed_makes_sampling_reproducible() -> None:
    seeded, flat = SamplingParams(temperature=1.0, seed=7), torch.zeros(VOCAB)  # no two draws are equal by chance
    torch.manual_seed(0)
    unseeded = sample(seeded.replace(seed=None), flat, times=60)
    torch.manual_seed(0)

    assert sample(seeded, flat, times=60) == sample(seeded, flat, times=60)
    assert sample(seeded, flat, times=60) != sample(seeded.replace(seed=8), flat, times=60)
    assert sample(seeded.replace(seed=None), flat, times=60) != unseeded


def test_the_repetition_penalty_counts_prompt_and_generated_tokens_and_ignores_ids_beyond_the_logits() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, -1.0])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0, 0, 900], "cpu")

    sampler.accept(2)
    assert int(sampler(scores)) == 1
    sampler.accept(1)
    assert int(sampler(scores)) == 0  # 2.5 against 2.0, 1.5 and -1.0
    assert Sampler(SamplingParams(repetition_penalty=2.0), [0, 1, 2, 3], "cpu")(-scores.abs()).item() == 3


def test_masked_tokens_are_never_sampled() -> None:
    masked = torch.full((VOCAB,), -torch.inf)
    masked[[4, 7]] = 0.0

    assert set(sample(SamplingParams(temperature=5.0, seed=1), masked, times=200)) == {4, 7}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_raise_an_error_that_names_the_remedy(temperature: float, broken: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9, top_k=4, min_p=0.1, repetition_penalty=1.2)
    one_broken = logits()
    one_broken[5] = broken
    for bad in (one_broken, torch.full((VOCAB,), broken), torch.full((VOCAB,), -torch.inf)):
        sampler = Sampler(params, [1], "cpu")
        token = int(sampler(bad))
        assert token == -1
        with pytest.raises(ZSMergeError, match="dtype='float32' or 'bfloat16'"):
            sampler.accept(token)


def test_a_token_is_a_scalar_on_the_device() -> None:
    for temperature in (0.0, 1.0):
        token = Sampler(SamplingParams(temperature=temperature), [], "cpu")(logits())
        assert (token.shape, token.dtype) == ((), torch.int64)
