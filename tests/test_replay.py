"""Steps that are run as they were recorded give exactly what they gave before."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from zsmerge_llm import CacheConfig, SamplingParams, replay
from zsmerge_llm.engine import Engine
from zsmerge_llm.fusion import WIDTHS

CONFIG = CacheConfig(slots=24, sink=2, recent=6, stage=8, window=4)
PROMPT = [5, 17, 40, 3, 88, 61, 22, 9, 14, 70, 33, 51]
STEPS = 24


def engine(family: str = "llama", replaying: bool = True) -> Engine:
    made = Engine(tiny_model(family), CONFIG, compile=False)
    made.fusion.start()
    if not replaying:
        made.fusion.replays.clear()
    return made


def said(reader: Engine, config: CacheConfig = CONFIG) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of single tokens and of five at a time, past several compressions; what the cache holds then."""
    cache = reader.new_cache(config)
    reader.read(cache, PROMPT)
    logits = [reader.read(cache, list(range(at, at + WIDTHS[at % 4 == 3]))) for at in range(STEPS)]
    held = [getattr(layer, name)[:, :, : layer.fills[0]] for layer in cache.layers for name in ("keys", "score")]
    return torch.stack(logits), [*held, *(layer.queries for layer in cache.layers)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_a_recorded_step_gives_the_same_logits_and_the_same_cache(family: str) -> None:
    expected, kept = said(engine(family, replaying=False))
    recorder = engine(family)

    for _ in range(2):  # in the second run every step is one that was recorded
        given, held = said(recorder)
        assert torch.equal(given, expected)
        assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
    assert all(each.ready and each.trouble is None for each in recorder.fusion.replays.values())


@pytest.mark.parametrize(
    "config", [CacheConfig.paper(16), CacheConfig.h2o(16), CacheConfig.streaming(16), CacheConfig.full()]
)
def test_a_recorded_step_keeps_to_every_rule_of_the_cache(config: CacheConfig) -> None:
    recorder = engine()
    said(recorder)
    assert all(each.ready for each in recorder.fusion.replays.values())

    given, held = said(recorder, config)

    expected, kept = said(engine(replaying=False), config)
    assert torch.equal(given, expected)
    assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))


def test_conversations_take_turns_in_the_same_memory() -> None:
    recorder, plain = engine(), engine(replaying=False)
    caches = {each: [each.new_cache() for _ in range(2)] for each in (recorder, plain)}
    for step in range(STEPS):
        logits = [each.read(caches[each][step % 2], [step + 1]) for each in (recorder, plain)]
        assert torch.equal(*logits)


def test_guesses_are_tried_in_recorded_steps() -> None:
    recorder = engine()
    greedy = SamplingParams(max_tokens=40, ignore_eos=True)
    prompt = PROMPT * 3
    exact = recorder.new_cache(CacheConfig.full())
    plain = list(recorder.stream(exact, prompt, greedy.replace(lookup=False)))

    for _ in range(2):
        cache = recorder.new_cache(CacheConfig(slots=200))
        assert list(recorder.stream(cache, prompt, greedy)) == plain
    assert recorder.fusion.replays[WIDTHS[1]].ready


def test_a_model_whose_code_is_strange_decodes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "KNOWN", {"torch"})
    reader = engine()

    given, _ = said(reader)

    assert torch.equal(given, said(engine(replaying=False))[0])
    assert all(each.trouble for each in reader.fusion.replays.values())
    assert reader.fusion.on
