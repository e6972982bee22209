"""Guessing an answer's next tokens from the prompt changes how fast it comes, and nothing else."""

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

CONFIGS = {
    "default": CacheConfig(slots=32, sink=2, recent=6, stage=16, observation_window=4),
    "ahead": CacheConfig(slots=32, sink=2, recent=6, stage=16, observation_window=4).query_agnostic(),
    "merging": CacheConfig(slots=32, recent=6, residual=3, stage=16),
    "attention": CacheConfig(slots=32, recent=6, stage=16, policy="cumulative_attention"),
    "paper": CacheConfig.paper(32),
    "streaming": CacheConfig.streaming(32),
    "full": CacheConfig.full(),
}
PARAMS = SamplingParams(max_tokens=60, ignore_eos=True)


class Oracle(PromptLookup):
    """Guesses what is known to come, but every third time something else: exercises both ends."""

    answer: tuple[int, ...] = ()

    def propose(self) -> list[int]:
        said = len(self._ids) - self.prompt
        right = list(self.answer[said : said + MAX_DRAFT_TOKENS])
        return [*right[:2], 3, 3] if said % 3 == 0 else right

    def __init__(self, ids: list[int], stops: object) -> None:
        self.prompt = len(ids)
        super().__init__(ids, frozenset())


def answered(engine: Engine, config: CacheConfig, prompt: list[int], lookup: bool) -> tuple[list[int], Cache]:
    """An answer, and the cache when all of it has been read."""
    cache = engine.new_cache(config)
    said = list(engine.stream(cache, prompt, PARAMS.replace(lookup=lookup)))
    if rest := [*prompt, *said][cache.seen :]:
        engine.read(cache, rest)
    return said, cache


def equal(one: Cache, other: Cache) -> bool:
    """Whether two caches hold the same, but for rounding and for what stands in empty slots."""
    held, facts = one.state()
    others, its = other.state()
    for name, tensor in held.items():
        index, _, part = name.partition(".")
        used = held[f"{index}.multiplicity"] > 0 if part in ("keys", "values", "score", "position") else None
        mine, theirs = (tensor, others[name]) if used is None else (tensor[used], others[name][used])
        if not torch.allclose(mine, theirs, atol=1e-4):
            return False
    return facts == its


@pytest.mark.parametrize("family", FAMILIES)
def test_guesses_change_no_answer_in_any_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(family), compile=False)
    plain, expected = answered(engine, CONFIGS["default"], tokens(50), lookup=False)
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))

    said, cache = answered(engine, CONFIGS["default"], tokens(50), lookup=True)

    assert said == plain
    assert equal(cache, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_guesses_change_no_answer_under_any_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), compile=False)
    plain, expected = answered(engine, CONFIGS[name], tokens(70), lookup=False)
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))

    said, cache = answered(engine, CONFIGS[name], tokens(70), lookup=True)

    assert said == plain
    assert equal(cache, expected)


def test_right_guesses_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(tiny_model(), compile=False)
    plain, _ = answered(engine, CacheConfig.full(), tokens(50), lookup=False)
    monkeypatch.setattr("zsmerge_llm.engine.sequence.PromptLookup", Oracle)
    monkeypatch.setattr(Oracle, "answer", tuple(plain))
    passes, run = [], engine.runner._forward

    def counted(step: ForwardPass, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        passes.append(ids.shape[1])
        return run(step, ids, wanted)

    monkeypatch.setattr(engine.runner, "_forward", counted)
    answered(engine, CacheConfig.full(), tokens(50), lookup=True)

    assert max(passes[1:]) == 1 + MAX_DRAFT_TOKENS
    assert len(passes) < len(plain) / 2


@settings(max_examples=25, deadline=None)
@given(taken=st.integers(1, 40), seed=st.integers(0, 5))
def test_whoever_leaves_early_finds_nothing_in_the_cache_that_was_not_said(taken: int, seed: int) -> None:
    engine, prompt = Engine(tiny_model(), compile=False), tokens(7, seed=seed) * 5
    cache, plain = engine.new_cache(CONFIGS["default"]), engine.new_cache(CONFIGS["default"])
    stream = engine.stream(cache, prompt, PARAMS)
    said = list(islice(stream, taken))
    stream.close()

    assert cache.seen <= len(prompt) + len(said)
    rest = [*prompt, *said][cache.seen :]
    engine.read(plain, prompt)
    for token in said:
        engine.read(plain, [token])
    assert torch.allclose(engine.read(cache, rest) if rest else cache.logits[0], plain.logits[0], atol=1e-4)


def test_an_answer_drawn_at_random_takes_no_guesses() -> None:
    engine, prompt = Engine(tiny_model(), compile=False), tokens(7) * 5
    drawn = PARAMS.replace(temperature=1.0, seed=4)

    with_lookup = list(engine.stream(engine.new_cache(), prompt, drawn))
    without = list(engine.stream(engine.new_cache(), prompt, drawn.replace(lookup=False)))

    assert with_lookup == without


@given(st.lists(st.integers(0, 4), max_size=60))
def test_a_guess_is_what_stood_behind_the_latest_equal_tokens(ids: list[int]) -> None:
    gram = ids[-NGRAM:]
    found = [at for at in range(NGRAM, len(ids)) if ids[at - NGRAM : at] == gram]
    expected = ids[found[-1] : found[-1] + MAX_DRAFT_TOKENS] if found else []
    expected = expected[: expected.index(4)] if 4 in expected else expected

    assert PromptLookup(ids, stop_ids={4}).propose() == expected


def test_only_the_newest_part_of_a_long_prompt_is_searched() -> None:
    """The work of an answer must not grow with the conversation."""
    quoted, filler = [1, 2, 3, 9], list(range(100, 100 + SEARCHED_TOKENS))
    assert PromptLookup([*quoted, *filler[:1000], 1, 2, 3], stop_ids=()).propose()[:1] == [9]
    assert PromptLookup([*quoted, *filler, 1, 2, 3], stop_ids=()).propose() == []
