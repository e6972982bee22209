"""Steps that are run as they were recorded give exactly what they gave before."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.support.tiny_models import tiny_model
from zsmerge_llm import CacheConfig, SamplingParams
from zsmerge_llm.cpu import native
from zsmerge_llm.cpu import step_recorder as replay
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.kvcache.cache import Cache

WIDTHS = (1, 1 + MAX_DRAFT_TOKENS)
CONFIG = CacheConfig(slots=24, sink=2, recent=6, stage=8, observation_window=4)
PROMPT = [5, 17, 40, 3, 88, 61, 22, 9, 14, 70, 33, 51]
STEPS = 24


def engine(family: str = "llama", replaying: bool = True) -> Engine:
    made = Engine(tiny_model(family), CONFIG, compile=False)
    made.backend.start()
    if not replaying:
        made.backend.compiled.recorders.clear()
    return made


def alone(recorder: Engine) -> list[bool]:
    """Whether the steps of one conversation have been recorded."""
    return [each.ready for (rows, _), each in recorder.backend.compiled.recorders.items() if rows == 1]


def said(reader: Engine, config: CacheConfig = CONFIG) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of single tokens and of five at a time, past several compressions; what the cache holds then."""
    cache = reader.new_cache(config)
    reader.read(cache, PROMPT)
    logits = [reader.read(cache, list(range(at, at + WIDTHS[at % 4 == 3]))) for at in range(STEPS)]
    held = [getattr(layer, name)[:, :, : layer.num_filled[0]] for layer in cache.layers for name in ("keys", "score")]
    return torch.stack(logits), [*held, *(layer.queries for layer in cache.layers)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "phi3"])
def test_a_recorded_step_gives_the_same_logits_and_the_same_cache(family: str) -> None:
    expected, kept = said(engine(family, replaying=False))
    recorder = engine(family)

    for _ in range(2):  # in the second run every step is one that was recorded
        given, held = said(recorder)
        assert torch.equal(given, expected)
        assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
    assert all(alone(recorder))


@pytest.mark.parametrize(
    "config", [CacheConfig.paper(16), CacheConfig.h2o(16), CacheConfig.streaming(16), CacheConfig.full()]
)
def test_a_recorded_step_keeps_to_every_rule_of_the_cache(config: CacheConfig) -> None:
    recorder = engine()
    said(recorder)
    assert all(alone(recorder))

    given, held = said(recorder, config)

    expected, kept = said(engine(replaying=False), config)
    assert torch.equal(given, expected)
    assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))


def test_a_conversation_that_ended_is_not_held_by_the_recording() -> None:
    recorder = engine()
    cache = recorder.new_cache()
    for step in range(6):
        recorder.read(cache, [step])
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_conversations_take_turns_in_the_same_memory() -> None:
    recorder, plain = engine(), engine(replaying=False)
    caches = {each: [each.new_cache() for _ in range(2)] for each in (recorder, plain)}
    for step in range(STEPS):
        logits = [each.read(caches[each][step % 2], [step + 1]) for each in (recorder, plain)]
        assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("rows", [2, 8, 19])
def test_several_conversations_are_decoded_in_recorded_steps(family: str, rows: int) -> None:
    """Of other lengths, past compressions, and with steps in which some of them wait."""
    recorder, plain = engine(family), Engine(tiny_model(family), CONFIG, compile=False)
    if rows > native.MAX_ROWS:
        together(recorder, native.MAX_ROWS)
    assert rows <= native.MAX_ROWS or recorder.backend.compiled.recorders[native.MAX_ROWS, 1].ready
    given = together(recorder, rows)

    expected = together(plain, rows)
    assert recorder.backend.compiled.recorders[native.MAX_ROWS, 1].ready
    assert torch.allclose(given[0], expected[0], atol=1e-4)
    for mine, other in zip(given[1].layers, expected[1].layers, strict=True):
        assert mine.num_filled == other.num_filled
        used = max(mine.num_filled)
        assert torch.equal(
            mine.position[:, :, :used] * (mine.multiplicity > 0)[:, :, :used],
            other.position[:, :, :used] * (other.multiplicity > 0)[:, :, :used],
        )
        assert torch.allclose(mine.queries, other.queries, atol=1e-4)


def together(reader: Engine, rows: int) -> tuple[torch.Tensor, Cache]:
    """Logits of every row after each step, and the cache at the end."""
    cache = reader.new_cache(rows=rows)
    reader.read_batch(cache, [PROMPT[: 3 + row] for row in range(rows)])
    logits = []
    with torch.inference_mode():
        for step in range(STEPS):
            waiting = None if step % 3 else torch.tensor([[(row + step) % 4 != 0] for row in range(rows)])
            reader.runner.run(cache, torch.full((rows, 1), step + 1), waiting)
            assert cache.logits is not None
            logits.append(cache.logits.clone())
    return torch.stack(logits), cache


def test_guesses_are_tried_in_recorded_steps() -> None:
    recorder = engine()
    greedy = SamplingParams(max_tokens=40, ignore_eos=True)
    prompt = PROMPT * 3
    exact = recorder.new_cache(CacheConfig.full())
    plain = list(recorder.stream(exact, prompt, greedy.replace(lookup=False)))

    for _ in range(2):
        cache = recorder.new_cache(CacheConfig(slots=200))
        assert list(recorder.stream(cache, prompt, greedy)) == plain
    assert recorder.backend.compiled.recorders[1, WIDTHS[1]].ready


def test_a_model_whose_code_is_strange_decodes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "KNOWN", {"torch"})
    reader = engine()

    given, _ = said(reader)

    assert torch.equal(given, said(engine(replaying=False))[0])
    assert not any(alone(reader))
    assert reader.backend.compiled.enabled
