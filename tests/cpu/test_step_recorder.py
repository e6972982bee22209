"""Replayed decode steps give exactly the logits and caches of the steps that are not recorded."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from tests.support.tiny_models import tiny_model
from zsmerge_llm import CacheConfig, SamplingParams
from zsmerge_llm.cpu import native, step_recorder
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.kvcache.cache import Cache

WIDTHS = (1, 1 + MAX_DRAFT_TOKENS)
CONFIG = CacheConfig(slots=24, sink=2, recent=6, stage=8, observation_window=4)
PROMPT = [5, 17, 40, 3, 88, 61, 22, 9, 14, 70, 33, 51]
STEPS = 24


def engine(family: str = "llama", record: bool = True) -> Engine:
    started = Engine(tiny_model(family), CONFIG, compile=False)
    started.backend.start()
    if not record:
        started.backend.compiled.recorders.clear()
    return started


def recorded(engine: Engine) -> list[bool]:
    """Return for each width of single-row steps whether they have been recorded."""
    return [each.ready for (rows, _), each in engine.backend.compiled.recorders.items() if rows == 1]


def decode(reader: Engine, config: CacheConfig = CONFIG) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits of steps of one or more tokens over several compressions, and the tensors of the cache."""
    cache = reader.new_cache(config)
    reader.read(cache, PROMPT)
    logits = [reader.read(cache, list(range(at, at + WIDTHS[at % 4 == 3]))) for at in range(STEPS)]
    tensors = [
        getattr(layer, name)[:, :, : layer.num_filled[0]] for layer in cache.layers for name in ("keys", "score")
    ]
    return torch.stack(logits), [*tensors, *(layer.queries for layer in cache.layers)]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3", "phi3"])
def test_a_replayed_step_gives_the_same_logits_and_the_same_cache(family: str) -> None:
    expected, expected_tensors = decode(engine(family, record=False))
    recorder = engine(family)

    for _ in range(2):  # in the second run every step is replayed
        logits, tensors = decode(recorder)
        assert torch.equal(logits, expected)
        assert all(torch.equal(a, b) for a, b in zip(tensors, expected_tensors, strict=True))
    assert all(recorded(recorder))


@pytest.mark.parametrize(
    "config", [CacheConfig.paper(16), CacheConfig.h2o(16), CacheConfig.streaming(16), CacheConfig.full()]
)
def test_a_replayed_step_works_with_every_eviction_policy(config: CacheConfig) -> None:
    recorder = engine()
    decode(recorder)
    assert all(recorded(recorder))

    logits, tensors = decode(recorder, config)

    expected, expected_tensors = decode(engine(record=False), config)
    assert torch.equal(logits, expected)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected_tensors, strict=True))


def test_a_recording_keeps_no_reference_to_a_cache() -> None:
    recorder = engine()
    cache = recorder.new_cache()
    for step in range(6):
        recorder.read(cache, [step])
    reference = weakref.ref(cache)
    del cache
    gc.collect()
    assert reference() is None


def test_conversations_alternate_in_the_same_recorded_steps() -> None:
    recorder, plain = engine(), engine(record=False)
    caches = {each: [each.new_cache() for _ in range(2)] for each in (recorder, plain)}
    for step in range(STEPS):
        logits = [each.read(caches[each][step % 2], [step + 1]) for each in (recorder, plain)]
        assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
@pytest.mark.parametrize("rows", [2, 8, 19])
def test_batches_of_conversations_are_decoded_in_recorded_steps(family: str, rows: int) -> None:
    """Of different lengths, over compressions, and with steps in which some rows are inactive."""
    recorder, plain = engine(family), Engine(tiny_model(family), CONFIG, compile=False)
    if rows > native.MAX_ROWS:
        decode_batch(recorder, native.MAX_ROWS)
    assert rows <= native.MAX_ROWS or recorder.backend.compiled.recorders[native.MAX_ROWS, 1].ready
    logits, cache = decode_batch(recorder, rows)

    expected, expected_cache = decode_batch(plain, rows)
    assert recorder.backend.compiled.recorders[native.MAX_ROWS, 1].ready
    assert torch.allclose(logits, expected, atol=1e-4)
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        assert layer.num_filled == other.num_filled
        used = max(layer.num_filled)
        assert torch.equal(
            layer.position[:, :, :used] * (layer.multiplicity > 0)[:, :, :used],
            other.position[:, :, :used] * (other.multiplicity > 0)[:, :, :used],
        )
        assert torch.allclose(layer.queries, other.queries, atol=1e-4)


def decode_batch(reader: Engine, rows: int) -> tuple[torch.Tensor, Cache]:
    """Return the logits of every row after each step, and the cache."""
    cache = reader.new_cache(rows=rows)
    reader.read_batch(cache, [PROMPT[: 3 + row] for row in range(rows)])
    logits = []
    with torch.inference_mode():
        for step in range(STEPS):
            active = None if step % 3 else torch.tensor([[(row + step) % 4 != 0] for row in range(rows)])
            reader.runner.run(cache, torch.full((rows, 1), step + 1), active)
            assert cache.logits is not None
            logits.append(cache.logits.clone())
    return torch.stack(logits), cache


def test_drafts_are_verified_in_recorded_steps() -> None:
    recorder = engine()
    greedy = SamplingParams(max_tokens=40, ignore_eos=True)
    prompt = PROMPT * 3
    exact = recorder.new_cache(CacheConfig.full())
    plain = list(recorder.stream(exact, prompt, greedy.replace(lookup=False)))

    for _ in range(2):
        cache = recorder.new_cache(CacheConfig(slots=200))
        assert list(recorder.stream(cache, prompt, greedy)) == plain
    assert recorder.backend.compiled.recorders[1, WIDTHS[1]].ready


def test_a_model_with_unknown_operators_is_not_recorded_and_decodes_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_recorder, "KNOWN", {"torch"})
    reader = engine()

    logits, _ = decode(reader)

    assert torch.equal(logits, decode(engine(record=False))[0])
    assert not any(recorded(reader))
    assert reader.backend.compiled.enabled
