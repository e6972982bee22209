"""Speculative decoding with drafts from the prompt changes the number of passes and nothing else."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny_models import FAMILIES, tiny_model, tokens
from zsmerge_llm import CacheConfig, SamplingParams
from zsmerge_llm.attention.passes import ForwardPass
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS, NGRAM, SEARCHED_TOKENS, PromptLookup
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.cache_state import cache_state

CONFIGS = {
    "default": CacheConfig(slots=32, sink=2, recent=6, stage=16, observation_window=4),
    "query-agnostic": CacheConfig(slots=32, sink=2, recent=6, stage=16, observation_window=4).query_agnostic(),
    "merging": CacheConfig(slots=32, recent=6, residual=3, stage=16),
    "attention": CacheConfig(slots=32, recent=6, stage=16, policy="cumulative_attention"),
    "paper": CacheConfig.paper(32),
    "streaming": CacheConfig.streaming(32),
    "full": CacheConfig.full(),
}
PARAMS = SamplingParams(max_tokens=60, ignore_eos=True)


class Oracle(PromptLookup):
    """Drafts the known answer, and every third time one that is wrong after two tokens."""

    answer: tuple[int, ...] = ()

    def propose(self) -> list[int]:
        generated = len(self._ids) - self.prompt
        draft = list(self.answer[generated : generated + MAX_DRAFT_TOKENS])
        return [*draft[:2], 3, 3] if generated % 3 == 0 else draft

    def __init__(self, ids: list[int], stops: object) -> None:
        self.prompt = len(ids)
        super().__init__(ids, frozenset())


def generate(engine: Engine, config: CacheConfig, prompt: list[int], lookup: bool) -> tuple[list[int], Cache]:
    """Return an answer, and the cache after all of it has been read."""
    cache = engine.new_cache(config)
    answer = list(engine.stream(cache, prompt, PARAMS.replace(lookup=lookup)))
    if rest := [*prompt, *answer][cache.seen :]:
        engine.read(cache, rest)
    return answer, cache


def nearly_equal(left: Cache, right: Cache) -> bool:
    """Return whether two caches are equal, but for rounding and for the contents of empty slots."""
    left_tensors, left_metadata = cache_state(left)
    right_tensors, right_metadata = cache_state(right)
    for name, tensor in left_tensors.items():
        index, _, part = name.partition(".")
        used = left_tensors[f"{index}.multiplicity"] > 0 if part in ("keys", "values", "score", "position") else None
        other = right_tensors[name]
        if not torch.allclose(*((tensor, other) if used is None else (tensor[used], other[used])), atol=1e-4):
            return False
    return left_metadata == right_metadata


@pytest.mark.parametrize("family", FAMILIES)
def test_speculative_decoding_changes_no_answer_in_any_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(family), compile=False)
    plain, expected = generate(engine, CONFIGS["default"], tokens(50), lookup=False)
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))

    answer, cache = generate(engine, CONFIGS["default"], tokens(50), lookup=True)

    assert answer == plain
    assert nearly_equal(cache, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_speculative_decoding_changes_no_answer_with_any_policy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), compile=False)
    plain, expected = generate(engine, CONFIGS[name], tokens(70), lookup=False)
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))

    answer, cache = generate(engine, CONFIGS[name], tokens(70), lookup=True)

    assert answer == plain
    assert nearly_equal(cache, expected)


def test_accepted_drafts_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), compile=False)
    plain, _ = generate(engine, CacheConfig.full(), tokens(50), lookup=False)
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))
    passes, run = [], engine.runner._forward

    def recording(step: ForwardPass, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        passes.append(ids.shape[1])
        return run(step, ids, wanted)

    monkeypatch.setattr(engine.runner, "_forward", recording)
    generate(engine, CacheConfig.full(), tokens(50), lookup=True)

    assert max(passes[1:]) == 1 + MAX_DRAFT_TOKENS
    assert len(passes) < len(plain) / 2


@settings(max_examples=25, deadline=None)
@given(taken=st.integers(1, 40), seed=st.integers(0, 5))
def test_closing_a_stream_early_leaves_only_yielded_tokens_in_the_cache(taken: int, seed: int) -> None:
    engine, prompt = Engine(tiny_model(), compile=False), tokens(7, seed=seed) * 5
    cache, plain = engine.new_cache(CONFIGS["default"]), engine.new_cache(CONFIGS["default"])
    stream = engine.stream(cache, prompt, PARAMS)
    yielded = list(islice(stream, taken))
    stream.close()

    assert cache.seen <= len(prompt) + len(yielded)
    rest = [*prompt, *yielded][cache.seen :]
    engine.read(plain, prompt)
    for token in yielded:
        engine.read(plain, [token])
    assert torch.allclose(engine.read(cache, rest) if rest else cache.logits[0], plain.logits[0], atol=1e-4)


def test_sampled_answers_are_the_same_with_and_without_prompt_lookup() -> None:
    engine, prompt = Engine(tiny_model(), compile=False), tokens(7) * 5
    sampled = PARAMS.replace(temperature=1.0, seed=4)

    with_lookup = list(engine.stream(engine.new_cache(), prompt, sampled))
    without = list(engine.stream(engine.new_cache(), prompt, sampled.replace(lookup=False)))

    assert with_lookup == without


@given(st.lists(st.integers(0, 4), max_size=60))
def test_a_draft_is_the_continuation_of_the_latest_equal_ngram(ids: list[int]) -> None:
    ngram = ids[-NGRAM:]
    ends = [at for at in range(NGRAM, len(ids)) if ids[at - NGRAM : at] == ngram]
    expected = ids[ends[-1] : ends[-1] + MAX_DRAFT_TOKENS] if ends else []
    expected = expected[: expected.index(4)] if 4 in expected else expected

    assert PromptLookup(ids, stop_ids={4}).propose() == expected


def test_only_the_newest_part_of_a_long_prompt_is_searched() -> None:
    """So that the search takes no longer in a long conversation."""
    quoted, filler = [1, 2, 3, 9], list(range(100, 100 + SEARCHED_TOKENS))
    assert PromptLookup([*quoted, *filler[:1000], 1, 2, 3], stop_ids=()).propose()[:1] == [9]
    assert PromptLookup([*quoted, *filler, 1, 2, 3], stop_ids=()).propose() == []


def test_an_answer_that_ends_within_a_draft_leaves_its_last_token_to_the_next_turn_as_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the next turn would read other tokens at once than beside other conversations, where there are no drafts."""
    engine, prompt = Engine(tiny_model("llama"), compile=False), tokens(50)
    plain, _ = generate(engine, CONFIGS["full"], prompt, lookup=False)
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))
    for max_tokens in range(1, 14):
        cache = engine.new_cache(CONFIGS["full"])
        assert list(engine.stream(cache, prompt, PARAMS.replace(max_tokens=max_tokens))) == plain[:max_tokens]
        assert cache.seen == len(prompt) + max_tokens - 1
