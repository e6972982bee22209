"""`layer_budgets`: each layer has its own number of slots, the total is unchanged, and the cache works as before."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.chat import SHORT, SMALL_CACHE, make_llm
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.inspection.memory_map import map_cache
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.cache_state import cache_state, restore_cache

UNEVEN = CacheConfig(slots=40, sink=2, recent=8, stage=8, observation_window=4, layer_budgets=(0.5, 1.5))
"""20 and 60 slots in a model of two layers."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model("qwen2"), UNEVEN, chunk=16)


@st.composite
def budgets(draw: st.DrawFn) -> CacheConfig:
    """Return any configuration with layer budgets."""
    weights = draw(st.lists(st.floats(0, 10), min_size=1, max_size=40).filter(lambda drawn: sum(drawn) > 0.01))
    mean = sum(weights) / len(weights)
    parts = {name: draw(st.integers(low, 20)) for name, low in (("sink", 0), ("recent", 1), ("residual", 0))}
    slots = draw(st.integers(sum(parts.values()) + 1, 4000))
    return CacheConfig(slots=slots, **parts, layer_budgets=tuple(weight / mean for weight in weights))


@given(budgets())
def test_layer_budgets_keep_the_total_and_every_layer_has_room_for_context(config: CacheConfig) -> None:
    assert config.slots is not None
    assert config.layer_budgets is not None
    slots = config.layer_slots(len(config.layer_budgets))
    assert sum(slots) == config.slots * len(slots)
    assert min(slots) >= config.sink + config.recent + config.residual + 1


@given(budgets())
def test_a_larger_budget_never_gives_fewer_slots(config: CacheConfig) -> None:
    assert config.layer_budgets is not None
    layer_slots = config.layer_slots(len(config.layer_budgets))
    ordered = [slots for _, slots in sorted(zip(config.layer_budgets, layer_slots, strict=True))]
    assert all(after >= before - 1 for before, after in pairwise(ordered))  # 1: rounding


@given(budgets())
def test_slots_are_proportional_to_budgets_where_every_layer_has_room(config: CacheConfig) -> None:
    assert config.slots is not None
    assert config.layer_budgets is not None
    expected = [config.slots * budget for budget in config.layer_budgets]
    if min(expected) >= config.sink + config.recent + config.residual + 1:
        assert config.layer_slots(len(expected)) == [pytest.approx(each, abs=1.01) for each in expected]


@pytest.mark.parametrize(
    ("budgets", "reason"),
    [((0.5, 1.0), "mean 1"), ((-1.0, 3.0), "between"), ((float("nan"), 1.0), "finite"), ((), "one weight"), (2, "one")],
)
def test_impossible_layer_budgets_are_refused(budgets: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        CacheConfig(layer_budgets=budgets)  # type: ignore[arg-type]


def test_layer_budgets_of_another_model_and_of_the_full_cache_are_refused() -> None:
    engine = Engine(tiny_model("qwen2"))
    with pytest.raises(ConfigError, match="3 weights and the model 2"):
        engine.new_cache(CacheConfig(layer_budgets=(0.5, 1.0, 1.5)))
    with pytest.raises(ConfigError, match="leave out layer_budgets"):
        CacheConfig(slots=None, layer_budgets=(1.0,))


def test_pyramid_budgets_decrease_from_the_first_layer_to_the_last() -> None:
    slots = CacheConfig.pyramid(1000, layers=10).layer_slots(10)
    assert slots == sorted(slots, reverse=True)
    assert (slots[0], slots[-1], sum(slots)) == (1900, 100, 10_000)


def test_layer_budgets_can_be_loaded_from_json() -> None:
    assert CacheConfig.from_dict({"slots": 40, "recent": 8, "layer_budgets": [0.5, 1.5]}).layer_budgets == (0.5, 1.5)


def test_the_memory_map_reports_the_slots_of_each_layer(engine: Engine) -> None:
    cache, uniform = engine.new_cache(), engine.new_cache(UNEVEN.replace(layer_budgets=None))
    for each in (cache, uniform):
        engine.read(each, tokens(200))
    memory_map = map_cache(cache, tokens(200))
    assert [layer.slots for layer in memory_map.layers] == [20, 60]
    assert [layer.verbatim_tokens for layer in memory_map.layers] == [20, 60]
    assert (cache.slots, cache.exact_capacity, cache.seen) == (40, 20, 200)
    assert cache.nbytes == uniform.nbytes
    assert cache.dropped_tokens == 200 - 40


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss-sinks"])
def test_sliding_window_layers_take_no_part_in_the_budgets(family: str) -> None:
    engine = Engine(tiny_model(family), UNEVEN.replace(layer_budgets=(1.0,)))
    assert sorted(layer.config.slots or 0 for layer in engine.new_cache().layers)[-1] == 40
    assert sorted({layer.config.slots or 0 for layer in engine.new_cache().layers}) == [9, 40]


@settings(max_examples=15, deadline=None)
@given(budget=st.floats(0.3, 1.0), flip=st.booleans(), seed=st.integers(0, 99))
def test_logits_are_exact_up_to_the_capacity_of_the_smallest_layer(
    engine: Engine, budget: float, flip: bool, seed: int
) -> None:
    budgets = (2 - budget, budget) if flip else (budget, 2 - budget)
    cache, exact = engine.new_cache(UNEVEN.replace(layer_budgets=budgets)), engine.new_cache(CacheConfig.full())
    assert cache.exact_capacity is not None
    ids = tokens(cache.exact_capacity, seed=seed)
    assert torch.allclose(engine.read(cache, ids), engine.read(exact, ids), atol=1e-4)
    assert cache.dropped_tokens == 0


@settings(max_examples=15, deadline=None)
@example(lengths=[41, 73], budget=1.0)
@given(lengths=st.lists(st.integers(1, 120), min_size=2, max_size=3), budget=st.floats(0.3, 1.7))
def test_rows_of_a_batch_equal_single_rows(engine: Engine, lengths: list[int], budget: float) -> None:
    config = UNEVEN.replace(layer_budgets=(budget, 2 - budget))
    prompts = [tokens(length, seed=length) for length in lengths]
    logits = engine.read_batch(engine.new_cache(config, len(prompts)), prompts)
    for row, prompt in enumerate(prompts):
        assert torch.allclose(logits[row], engine.read(engine.new_cache(config), prompt), atol=1e-4)


def test_caches_are_stacked_into_a_batch_and_split_again(engine: Engine) -> None:
    caches = [engine.new_cache() for _ in range(2)]
    for seed, cache in enumerate(caches):
        engine.read(cache, tokens(50 + 40 * seed, seed=seed))
    batch = Cache.stack(caches)
    for row, cache in enumerate(caches):
        split = batch.row(row)
        assert torch.equal(engine.read(split, tokens(30)), engine.read(cache, tokens(30)))
    with pytest.raises(ConfigError):
        Cache.stack([caches[0], engine.new_cache(UNEVEN.replace(layer_budgets=(1.5, 0.5)))])


@settings(max_examples=10, deadline=None)
@given(length=st.integers(1, 200), budget=st.floats(0.3, 1.7))
def test_a_restored_cache_continues_bit_for_bit(engine: Engine, length: int, budget: float) -> None:
    cache = engine.new_cache(UNEVEN.replace(layer_budgets=(budget, 2 - budget)))
    engine.read(cache, tokens(length))
    tensors, metadata = cache_state(cache)
    restored = restore_cache({name: tensor.clone() for name, tensor in tensors.items()}, metadata)
    assert restored.config == cache.config
    assert torch.equal(engine.read(restored, tokens(9)), engine.read(cache, tokens(9)))


def test_the_stage_of_every_layer_can_be_compressed(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(65))
    cache.compress_stage()
    assert [max(layer.num_filled) for layer in cache.layers] == [20, 60]
    assert cache.fits(7)
    assert not cache.fits(8)


def test_sessions_with_layer_budgets_are_saved_and_loaded(tmp_path: Path) -> None:
    llm = make_llm(cache=SMALL_CACHE.replace(layer_budgets=(0.5, 1.5)))
    first = llm.chat("Tell me about the sea, at length. " * 20, session="ann", sampling=SHORT)
    assert first.usage.dropped_tokens > 0
    llm.session("ann").save(tmp_path / "ann.zsmerge")
    other = make_llm(cache=SMALL_CACHE.replace(layer_budgets=(0.5, 1.5)))
    loaded = other.load_session(tmp_path / "ann.zsmerge")
    for restored, original in zip(loaded.cache.layers, llm.session("ann").cache.layers, strict=True):
        assert torch.equal(restored.keys, original.keys)


def test_positions_are_remapped_once_the_smallest_layer_has_dropped_tokens() -> None:
    model = tiny_model("qwen2")
    model.config.max_position_embeddings = 43
    remapped = {}
    for budgets in (None, (0.5, 1.5)):
        engine = Engine(model, UNEVEN.replace(layer_budgets=budgets))
        cache = engine.new_cache()
        for token in tokens(40):
            engine.read(cache, [token])
        remapped[budgets] = cache.position_maps[0].offset > 0
    assert remapped == {None: False, (0.5, 1.5): True}
