"""Beyond the trained window, old tokens get new positions: exact rotation, bounded memory, errors where impossible."""

from __future__ import annotations

import json
import warnings
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.tiny_models import FAMILIES, tiny_model, tokens
from zsmerge_llm.attention import interface as attention
from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.engine import model_runner
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.position_remapping import PositionRemapper, RemapLayout
from zsmerge_llm.errors import ContextLimitError
from zsmerge_llm.generation.loops import check_length
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.cache_state import cache_state, restore_cache
from zsmerge_llm.kvcache.rope import PositionMap, Rotation, fit_rotation

WINDOW = 144
LIMIT = 86
SMALL = CacheConfig(slots=24, recent=6, stage=4, sink=2, observation_window=8)
MERGING = CacheConfig(slots=24, recent=6, stage=4, sink=2, observation_window=8, residual=3)
PAPER = CacheConfig.paper(24).replace(observation_window=8)
ROPE = {
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "rope_theta": 5e5,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 1024},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}
LAYOUTS: dict[str, dict[str, object]] = {
    "interleaved": {"model_type": "cohere"},
    "interleaved-partial": {"model_type": "glm", "head_dim": 8},
    "without-positions": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "at-the-end": {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
    },
    **{f"rope-{name}": {"model_type": "llama", "rope_parameters": rope} for name, rope in ROPE.items()},
}
ALL_MODELS = {**FAMILIES, **LAYOUTS}
UNMAPPABLE: dict[str, dict[str, object]] = {
    "no rotary positions": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
}


def model_of(settings: dict[str, object], window: int = WINDOW, **more: object) -> PreTrainedModel:
    """Return a tiny model whose configuration names a window of few positions."""
    with mock.patch.dict(FAMILIES, {"it": {**settings, "max_position_embeddings": window, **more}}):
        return tiny_model("it")


@pytest.fixture(scope="module")
def small() -> Engine:
    """Two layers of Llama, 144 positions."""
    return Engine(model_of({"model_type": "llama"}), SMALL, chunk=16)


def rope_positions(cache: Cache, row: int = 0) -> Tensor:
    return cache.position_maps[row].rope_positions(torch.arange(cache.lengths[row]))


def keys_at(model: PreTrainedModel, ids: list[int], position: int) -> dict[int, Tensor]:
    recorder, column = attention._Keys(), torch.tensor(ids)[:, None]
    with torch.inference_mode():
        attention.forward(model, recorder, input_ids=column, position_ids=torch.full_like(column, position))
    return recorder.keys


@pytest.mark.parametrize("kind", ALL_MODELS)
def test_keys_rotated_to_a_position_equal_keys_computed_there(kind: str) -> None:
    model = model_of(ALL_MODELS[kind], window=4096)
    attention.prepare_model(model)
    rotations = attention.measure_rotations(model, [1, 7, 1200, 3600])
    before, expected = keys_at(model, tokens(6), 3000), keys_at(model, tokens(6), 1111)
    for layer, rotation in enumerate(rotations):
        assert rotation is not None
        rotated = rotation.rotate(before[layer], torch.tensor(1111.0 - 3000.0))
        torch.testing.assert_close(rotated, expected[layer], atol=2e-3, rtol=2e-3)
    if kind != "without-positions":
        assert not torch.allclose(before[0], expected[0], atol=0.1), "the positions make a difference"


def test_the_layers_of_gemma_3_have_one_of_two_sets_of_frequencies() -> None:
    model = model_of(FAMILIES["gemma3"], window=4096)
    attention.prepare_model(model)
    local, full, other = (each.frequencies for each in attention.measure_rotations(model, [1, 7, 1200, 3600]))
    assert torch.equal(local, other)
    assert not torch.allclose(local, full)


def test_a_large_bias_does_not_hide_a_wrong_frequency() -> None:
    origin = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0))
    origin[..., 0] += 1000
    right, wrong = torch.tensor([1.0, 0.1]), torch.tensor([1.0, 0.3])
    rotated = {at: Rotation(right.double()).rotate(origin, torch.tensor(float(at))) for at in (1, 50)}
    assert fit_rotation(origin, rotated, [wrong]) is None
    fitted = fit_rotation(origin, rotated, [wrong, right])
    assert fitted is not None
    assert torch.equal(fitted.frequencies, right.double())


def test_keys_in_bfloat16_stay_close_over_many_remaps() -> None:
    """Each remap halves the positions, so after about twenty they hardly change."""
    rotation = Rotation(1e4 ** -(torch.arange(32).double() / 32))
    keys = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    position, rotated = torch.linspace(100, 7000, 50).double(), keys
    for _ in range(60):
        rotated = rotation.rotate(rotated, -position / 2)
        position = position / 2
    direct = rotation.rotate(keys, -torch.linspace(100, 7000, 50).double()).float()
    assert (rotated.float() - direct).norm() / direct.norm() < 0.015


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=2, max_size=5),
    chunk=st.integers(5, 200),
    probe=st.integers(0, 20),
    sink=st.integers(0, 6),
    layout=st.builds(
        RemapLayout,
        squeeze=st.sampled_from([0.1, 0.5, 0.9]),
        near=st.sampled_from([0.1, 0.4]),
        segments=st.integers(1, 5),
    ),
)
def test_remapping_keeps_order_newest_distances_and_first_positions_below_the_limit(
    sizes: list[int], chunk: int, probe: int, sink: int, layout: RemapLayout
) -> None:
    small = Engine(model_of({"model_type": "llama"}), SMALL.replace(sink=sink), chunk=chunk)
    small.runner.remapper = PositionRemapper(small.model, small.specs, WINDOW, layout)
    near = max(int(LIMIT * layout.near), SMALL.observation_window)
    largest: list[int] = []

    def recording(*args: object, **inputs: Tensor) -> Tensor:
        largest.append(int(inputs["position_ids"].max()))
        return attention.forward(*args, **inputs)

    cache = small.new_cache()
    with mock.patch.object(model_runner, "forward", recording):
        for size in sizes:
            small.read(cache, tokens(size), probe=tokens(probe) if probe else None)
            positions, head = rope_positions(cache), max(sink, 5)
            assert (positions.diff() > 0).all(), "order"
            assert (positions[-near:].diff() == 1).all(), "newest distances"
            assert torch.equal(positions[:head], torch.arange(cache.seen).double()[:head]), "first positions"
            assert len(cache.position_maps[0].knots) <= layout.segments + 1, "bounded table"
    assert max(largest) < LIMIT
    if sum(sizes) > WINDOW:
        assert cache.position_maps[0].knots


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", SMALL),
        ("llama", MERGING),
        ("llama", PAPER),
        ("gemma3", SMALL),
        ("gpt_oss-sinks", MERGING),
        ("mistral-sliding", SMALL),
        ("falcon-new", SMALL),
        ("interleaved", SMALL),
    ],
)
def test_ten_windows_are_read_in_constant_memory(kind: str, config: CacheConfig) -> None:
    reader = Engine(model_of(ALL_MODELS[kind]), config, chunk=16)
    cache = reader.new_cache()
    reader.read(cache, tokens(WINDOW))
    nbytes = cache.nbytes
    reader.read(cache, tokens(9 * WINDOW, seed=1), probe=tokens(5) if config.policy == "observation_window" else None)
    assert cache.nbytes == nbytes
    assert cache.seen == 10 * WINDOW
    assert torch.isfinite(cache.logits).all()
    assert rope_positions(cache).max() < LIMIT
    for layer in cache.layers:
        accounted = layer.multiplicity.sum(-1) + layer.dropped
        assert (accounted == cache.seen).all()
        merged = layer.residual_keys
        assert torch.equal(layer.keys[:, :, : merged.shape[2]], merged), (
            "float32 means equal the keys that are attended to"
        )


@pytest.mark.parametrize("kind", ["llama", "interleaved", "rope-yarn", "qwen3"])
def test_after_remaps_logits_equal_a_new_pass_at_the_same_positions(kind: str) -> None:
    """With one layer, keys depend on their token and position only; everything fits into the slots."""
    ids, more = tokens(300), tokens(12, seed=1)
    model = model_of(ALL_MODELS[kind], num_hidden_layers=1)
    reader = Engine(model, SMALL.replace(slots=400), chunk=16)
    cache = reader.new_cache()
    reader.read(cache, ids)
    logprobs = reader.logprobs(cache, more)
    assert len(cache.position_maps[0].knots) > 2
    model.set_attn_implementation("eager")
    whole = torch.tensor([ids + more])
    with torch.inference_mode():
        logits = model(
            whole, position_ids=rope_positions(cache)[None].float(), attention_mask=torch.ones_like(whole)
        ).logits[0]
    expected = logits[len(ids) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(more)[:, None])[:, 0]
    torch.testing.assert_close(logprobs[1:], expected[1:], atol=1e-4, rtol=1e-4)


def test_remapping_keeps_the_products_of_the_newest_queries_and_keys(small: Engine) -> None:
    cache, rotations = small.new_cache(MERGING), attention.measure_rotations(small.model, [1, 50])
    small.read(cache, tokens(80))

    def products() -> list[Tensor]:
        return [layer.queries[0].unflatten(0, (2, 2)) @ layer.keys[0, :, None].mT for layer in cache.layers]

    newest = [((layer.position >= 60) & (layer.multiplicity > 0))[0, :, None, None] for layer in cache.layers]
    before, means = products(), [layer.residual_keys.clone() for layer in cache.layers]
    position_map = PositionMap().squeezed(head=5, near=60, to=20, segments=4)
    cache.remap(0, position_map, [each for each in rotations if each])
    for layer, mean, rotation in zip(cache.layers, means, rotations, strict=True):
        first = layer.position[:, :, : mean.shape[2]]
        assert rotation is not None
        assert torch.equal(layer.residual_keys, rotation.rotate(mean, position_map.rope_positions(first) - first)), (
            "the means are rotated too"
        )
    for old, new, near in zip(before, products(), newest, strict=True):
        torch.testing.assert_close(old * near, new * near, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(old * ~near, new * ~near, atol=0.1), "distances to the others are smaller"


def test_while_everything_fits_positions_are_unchanged_within_the_window() -> None:
    ids = tokens(WINDOW)
    model = model_of({"model_type": "llama"})
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    reader = Engine(model, SMALL.replace(slots=WINDOW + 4), chunk=16)
    cache = reader.new_cache()
    last = reader.read(cache, ids)
    torch.testing.assert_close(last, logits[-1], atol=1e-4, rtol=1e-4)
    assert not cache.position_maps[0].knots
    reader.read(cache, tokens(1))
    assert cache.position_maps[0].knots, "the window is full"


@pytest.mark.parametrize("config", [SMALL, MERGING, CacheConfig.streaming(24).replace(observation_window=8)])
def test_a_row_of_a_batch_equals_a_single_row_across_remaps(small: Engine, config: CacheConfig) -> None:
    rows = [tokens(230, seed=1), tokens(60, seed=2), tokens(80, seed=3)]
    batch, caches = small.new_cache(config, rows=3), [small.new_cache(config) for _ in rows]
    small.read_batch(batch, rows)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(small.read(caches[row], ids), batch.logits[row], atol=1e-4, rtol=1e-4)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    steps = list(small.decode(batch, [params] * 3, rows))
    for row, ids in enumerate(rows):
        assert [step[0] for step in small.decode(caches[row], [params], [ids])] == [step[row] for step in steps]
        assert caches[row].position_maps[0] == batch.position_maps[row]
    assert len({each.offset for each in batch.position_maps}) == 3, "each row is remapped on its own"


@pytest.mark.parametrize("config", [SMALL, MERGING, PAPER])
def test_copies_and_restored_states_continue_bit_for_bit_across_the_next_remap(
    small: Engine, config: CacheConfig
) -> None:
    cache, other = small.new_cache(config), small.new_cache(config)
    small.read(cache, tokens(200))
    small.read(other, tokens(20))
    before = cache.position_maps[0]
    clone, stacked = cache.clone(), Cache.stack([other, cache]).row(1)
    tensors, metadata = cache_state(clone.clone())
    loaded = restore_cache(dict(tensors), json.loads(json.dumps(metadata)))
    logits = small.read(cache, tokens(150, seed=1))
    assert clone.position_maps[0] == before != cache.position_maps[0]
    for copy in (clone, stacked, loaded):
        assert torch.equal(small.read(copy, tokens(150, seed=1)), logits)
        assert copy.position_maps == cache.position_maps


def test_logprobs_are_computed_across_remaps(small: Engine) -> None:
    ids = tokens(250)
    cache, reader = small.new_cache(), small.new_cache()
    logprobs = small.logprobs(cache, ids)
    last = small.read(reader, ids)
    assert len(logprobs) == 250
    torch.testing.assert_close(cache.logits[0], last, atol=1e-4, rtol=1e-4)


def test_a_chunk_beyond_the_remaining_positions_is_read_in_parts() -> None:
    wide = Engine(model_of({"model_type": "llama"}), SMALL, chunk=512)
    narrow = Engine(wide.model, SMALL, chunk=wide.runner.remapper.max_pass_tokens(wide.new_cache(), 512, 0))
    ids = tokens(400)
    a, b = wide.new_cache(), narrow.new_cache()
    assert torch.equal(wide.logprobs(a, ids), narrow.logprobs(b, ids))
    rows = [tokens(300, seed=1), tokens(20, seed=2)]
    both, singles = wide.new_cache(rows=2), [narrow.new_cache() for _ in rows]
    wide.read_batch(both, rows)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(both.logits[row], narrow.read(singles[row], ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reason", UNMAPPABLE)
def test_models_without_remappable_positions_raise_at_the_end_of_their_window(reason: str) -> None:
    reader = Engine(model_of(UNMAPPABLE[reason]), SMALL, chunk=16)
    cache = reader.new_cache()
    reader.read(cache, tokens(WINDOW - 1))
    assert cache.seen == WINDOW - 1 > LIMIT
    reader.read(cache, tokens(1))
    with pytest.raises(ContextLimitError, match=rf"ForCausalLM has .*{reason}.* {WINDOW} positions .*begin a new one"):
        reader.read(cache, tokens(1))
    assert cache.seen == WINDOW
    assert not cache.position_maps[0].knots


def test_rotations_are_measured_only_when_they_are_needed() -> None:
    reader = Engine(model_of({"model_type": "llama"}), SMALL, chunk=16)
    cache = reader.new_cache()
    with mock.patch(
        "zsmerge_llm.engine.position_remapping.measure_rotations", wraps=attention.measure_rotations
    ) as measure:
        reader.read(cache, tokens(80))
        assert not measure.called
        reader.read(cache, tokens(400))
        assert measure.call_count == 1


def test_the_full_cache_is_never_remapped_and_warns_beyond_the_window(small: Engine) -> None:
    cache = small.new_cache(CacheConfig.full())
    small.read(cache, tokens(200))
    assert not cache.position_maps[0].knots
    assert small.exact_limit is None
    exact = Engine(small.model, CacheConfig.full())
    with pytest.warns(UserWarning, match=f"trained on {WINDOW} positions"):
        check_length(WINDOW - 6, SamplingParams(max_tokens=20), None, exact.exact_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_length(WINDOW - 6, SamplingParams(max_tokens=20), None, small.exact_limit)


def test_a_model_without_a_configured_window_is_never_remapped() -> None:
    reader = Engine(model_of({"model_type": "llama"}), SMALL, chunk=16)
    reader.runner.remapper = PositionRemapper(reader.model, reader.specs, None)
    cache = reader.new_cache()
    reader.read(cache, tokens(300))
    assert not cache.position_maps[0].knots


def test_a_probe_that_leaves_no_positions_is_refused_with_its_length(small: Engine) -> None:
    cache = small.new_cache()
    small.read(cache, tokens(30), probe=tokens(55))
    with pytest.raises(ContextLimitError, match="probe of 55 tokens"):
        small.read(cache, tokens(60), probe=tokens(55))


def test_a_position_map_without_knots_is_the_identity() -> None:
    assert PositionMap().rope_positions(torch.tensor([[0, 5], [7, 1]])).tolist() == [[0, 5], [7, 1]]
    assert PositionMap().offset == 0
