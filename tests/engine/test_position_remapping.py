"""Beyond the trained window: new places for old tokens, exact in rotation, bounded in memory, refused by name."""

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
from zsmerge_llm.generation import check_length
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.rope import PositionMap, Rotation, fit_rotation

WINDOW = 96
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
    **{f"rope-{name}": {"model_type": "llama", "rope_parameters": given} for name, given in ROPE.items()},
}
EVERY = {**FAMILIES, **LAYOUTS}
UNMAPPABLE: dict[str, dict[str, object]] = {
    "longrope": {
        "model_type": "phi3",
        "sliding_window": None,
        "original_max_position_embeddings": 40,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 40,
        },
    },
    "no rotary positions": {"model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
}


def model_of(given: dict[str, object], window: int = WINDOW, **more: object) -> PreTrainedModel:
    """A tiny model trained on few positions."""
    with mock.patch.dict(FAMILIES, {"it": {**given, "max_position_embeddings": window, **more}}):
        return tiny_model("it")


@pytest.fixture(scope="module")
def small() -> Engine:
    """Two layers of Llama, 96 positions."""
    return Engine(model_of({"model_type": "llama"}), SMALL, chunk=16)


def stands(cache: Cache, row: int = 0) -> Tensor:
    return cache.position_maps[row].rope_positions(torch.arange(cache.lengths[row]))


def keys_at(model: PreTrainedModel, ids: list[int], place: int) -> dict[int, Tensor]:
    seen, column = attention._Keys(), torch.tensor(ids)[:, None]
    with torch.inference_mode():
        attention.forward(model, seen, input_ids=column, position_ids=torch.full_like(column, place))
    return seen.keys


@pytest.mark.parametrize("kind", EVERY)
def test_keys_turned_to_a_place_equal_keys_made_there(kind: str) -> None:
    model = model_of(EVERY[kind], window=4096)
    attention.prepare_model(model)
    known = attention.measure_rotations(model, [1, 7, 1200, 3600])
    here, there = keys_at(model, tokens(6), 3000), keys_at(model, tokens(6), 1111)
    for layer, rotation in enumerate(known):
        assert rotation is not None
        turned = rotation.rotate(here[layer], torch.tensor(1111.0 - 3000.0))
        torch.testing.assert_close(turned, there[layer], atol=2e-3, rtol=2e-3)
    if kind != "without-positions":
        assert not torch.allclose(here[0], there[0], atol=0.1), "else nothing was tested"


def test_gemma_3_has_two_frequencies_and_each_layer_its_own() -> None:
    model = model_of(FAMILIES["gemma3"], window=4096)
    attention.prepare_model(model)
    local, full, other = (each.frequencies for each in attention.measure_rotations(model, [1, 7, 1200, 3600]))
    assert torch.equal(local, other)
    assert not torch.allclose(local, full)


def test_a_large_bias_does_not_hide_a_wrong_frequency() -> None:
    origin = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(0))
    origin[..., 0] += 1000
    right, wrong = torch.tensor([1.0, 0.1]), torch.tensor([1.0, 0.3])
    moved = {place: Rotation(right.double()).rotate(origin, torch.tensor(float(place))) for place in (1, 50)}
    assert fit_rotation(origin, moved, [wrong]) is None
    found = fit_rotation(origin, moved, [wrong, right])
    assert found is not None
    assert torch.equal(found.frequencies, right.double())


def test_in_bfloat16_keys_stay_close_over_as_many_epochs_as_move_them() -> None:
    """Each epoch halves the way to the beginning: after some twenty nothing moves any more."""
    rotation = Rotation(1e4 ** -(torch.arange(32).double() / 32))
    keys = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    place, turned = torch.linspace(100, 7000, 50).double(), keys
    for _ in range(60):
        turned = rotation.rotate(turned, -place / 2)
        place = place / 2
    direct = rotation.rotate(keys, -torch.linspace(100, 7000, 50).double()).float()
    assert (turned.float() - direct).norm() / direct.norm() < 0.015


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=2, max_size=5),
    chunk=st.integers(5, 200),
    probe=st.integers(0, 20),
    sink=st.integers(0, 6),
    shape=st.builds(
        RemapLayout,
        squeeze=st.sampled_from([0.1, 0.5, 0.9]),
        near=st.sampled_from([0.1, 0.4]),
        segments=st.integers(1, 5),
    ),
)
def test_order_newest_distances_and_beginning_hold_and_no_place_is_beyond_the_limit(
    sizes: list[int], chunk: int, probe: int, sink: int, shape: RemapLayout
) -> None:
    small = Engine(model_of({"model_type": "llama"}), SMALL.replace(sink=sink), chunk=chunk)
    small.runner.remapper = PositionRemapper(small.model, small.specs, WINDOW, shape)
    near = max(int(LIMIT * shape.near), SMALL.observation_window)
    asked: list[int] = []

    def seeing(*given: object, **inputs: Tensor) -> Tensor:
        asked.append(int(inputs["position_ids"].max()))
        return attention.forward(*given, **inputs)

    cache = small.new_cache()
    with mock.patch.object(model_runner, "forward", seeing):
        for size in sizes:
            small.read(cache, tokens(size), probe=tokens(probe) if probe else None)
            place = stands(cache)
            assert (place.diff() > 0).all(), "order"
            assert (place[-near:].diff() == 1).all(), "newest distances"
            assert torch.equal(place[: max(sink, 5)], torch.arange(cache.seen).double()[: max(sink, 5)]), "beginning"
            assert len(cache.position_maps[0].knots) <= shape.segments + 1, "a small table"
    assert max(asked) < LIMIT
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
    reader = Engine(model_of(EVERY[kind]), config, chunk=16)
    cache = reader.new_cache()
    reader.read(cache, tokens(WINDOW))
    held = cache.nbytes
    reader.read(cache, tokens(9 * WINDOW, seed=1), probe=tokens(5) if config.policy == "observation_window" else None)
    assert cache.nbytes == held
    assert cache.seen == 10 * WINDOW
    assert torch.isfinite(cache.logits).all()
    assert stands(cache).max() < LIMIT
    for layer in cache.layers:
        accounted = layer.multiplicity.sum(-1) + layer.dropped
        assert (accounted == cache.seen).all()
        merged = layer.residual_keys
        assert torch.equal(layer.keys[:, :, : merged.shape[2]], merged), "the means and what is attended to agree"


@pytest.mark.parametrize("kind", ["llama", "interleaved", "rope-yarn", "qwen3"])
def test_after_epochs_logits_equal_a_fresh_pass_at_the_same_places(kind: str) -> None:
    """One layer, whose keys know nothing but their token and place; everything fits into the slots."""
    ids, more = tokens(300), tokens(12, seed=1)
    model = model_of(EVERY[kind], num_hidden_layers=1)
    reader = Engine(model, SMALL.replace(slots=400), chunk=16)
    cache = reader.new_cache()
    reader.read(cache, ids)
    got = reader.logprobs(cache, more)
    assert len(cache.position_maps[0].knots) > 2
    model.set_attn_implementation("eager")
    whole = torch.tensor([ids + more])
    with torch.inference_mode():
        logits = model(whole, position_ids=stands(cache)[None].float(), attention_mask=torch.ones_like(whole)).logits[0]
    want = logits[len(ids) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(more)[:, None])[:, 0]
    torch.testing.assert_close(got[1:], want[1:], atol=1e-4, rtol=1e-4)


def test_moving_changes_nothing_between_the_newest_queries_and_the_newest_keys(small: Engine) -> None:
    cache, known = small.new_cache(MERGING), attention.measure_rotations(small.model, [1, 50])
    small.read(cache, tokens(80))

    def likeness() -> list[Tensor]:
        return [layer.queries[0].unflatten(0, (2, 2)) @ layer.keys[0, :, None].mT for layer in cache.layers]

    newest = [((layer.position >= 60) & (layer.multiplicity > 0))[0, :, None, None] for layer in cache.layers]
    before, means = likeness(), [layer.residual_keys.clone() for layer in cache.layers]
    places = PositionMap().squeezed(head=5, near=60, to=20, segments=4)
    cache.remap(0, places, [each for each in known if each])
    for layer, mean, rotation in zip(cache.layers, means, known, strict=True):
        first = layer.position[:, :, : mean.shape[2]]
        assert rotation is not None
        assert torch.equal(layer.residual_keys, rotation.rotate(mean, places.rope_positions(first) - first)), (
            "the means go along"
        )
    for was, now, near in zip(before, likeness(), newest, strict=True):
        torch.testing.assert_close(was * near, now * near, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(was * ~near, now * ~near, atol=0.1), "the others are nearer now"


def test_while_everything_fits_the_whole_window_is_the_models_own() -> None:
    ids = tokens(WINDOW)
    model = model_of({"model_type": "llama"})
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0]
    reader = Engine(model, SMALL.replace(slots=100), chunk=16)
    cache = reader.new_cache()
    last = reader.read(cache, ids)
    torch.testing.assert_close(last, logits[-1], atol=1e-4, rtol=1e-4)
    assert not cache.position_maps[0].knots
    reader.read(cache, tokens(1))
    assert cache.position_maps[0].knots, "the window is used up"


@pytest.mark.parametrize("config", [SMALL, MERGING, CacheConfig.streaming(24).replace(observation_window=8)])
def test_a_row_of_a_batch_equals_the_same_row_alone_across_epochs(small: Engine, config: CacheConfig) -> None:
    rows = [tokens(230, seed=1), tokens(60, seed=2), tokens(80, seed=3)]
    batch, alone = small.new_cache(config, rows=3), [small.new_cache(config) for _ in rows]
    small.read_batch(batch, rows)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(small.read(alone[row], ids), batch.logits[row], atol=1e-4, rtol=1e-4)
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    together = list(small.decode(batch, [params] * 3, rows))
    for row, ids in enumerate(rows):
        assert [step[0] for step in small.decode(alone[row], [params], [ids])] == [step[row] for step in together]
        assert alone[row].position_maps[0] == batch.position_maps[row]
    assert len({places.offset for places in batch.position_maps}) == 3, "each row had epochs of its own"


@pytest.mark.parametrize("config", [SMALL, MERGING, PAPER])
def test_copies_and_files_of_a_cache_go_on_bit_for_bit_across_the_next_epoch(
    small: Engine, config: CacheConfig
) -> None:
    cache, other = small.new_cache(config), small.new_cache(config)
    small.read(cache, tokens(200))
    small.read(other, tokens(20))
    before = cache.position_maps[0]
    clone, stacked = cache.clone(), Cache.stack([other, cache]).row(1)
    tensors, facts = clone.clone().state()
    loaded = Cache.from_state(dict(tensors), json.loads(json.dumps(facts)))
    logits = small.read(cache, tokens(150, seed=1))
    assert clone.position_maps[0] == before != cache.position_maps[0]
    for copy in (clone, stacked, loaded):
        assert torch.equal(small.read(copy, tokens(150, seed=1)), logits)
        assert copy.position_maps == cache.position_maps


def test_log_probabilities_cross_epochs_too(small: Engine) -> None:
    ids = tokens(250)
    cache, reader = small.new_cache(), small.new_cache()
    got = small.logprobs(cache, ids)
    last = small.read(reader, ids)
    assert len(got) == 250
    torch.testing.assert_close(cache.logits[0], last, atol=1e-4, rtol=1e-4)


def test_a_pass_longer_than_the_room_is_read_in_parts() -> None:
    wide = Engine(model_of({"model_type": "llama"}), SMALL, chunk=512)
    narrow = Engine(wide.model, SMALL, chunk=wide.runner.remapper.max_pass_tokens(wide.new_cache(), 512, 0))
    ids = tokens(400)
    a, b = wide.new_cache(), narrow.new_cache()
    assert torch.equal(wide.logprobs(a, ids), narrow.logprobs(b, ids))
    rows = [tokens(300, seed=1), tokens(20, seed=2)]
    both, each = wide.new_cache(rows=2), [narrow.new_cache() for _ in rows]
    wide.read_batch(both, rows)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(both.logits[row], narrow.read(each[row], ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("named", UNMAPPABLE)
def test_positions_that_cannot_be_mapped_are_refused_by_name_where_the_window_ends(named: str) -> None:
    reader = Engine(model_of(UNMAPPABLE[named]), SMALL, chunk=16)
    cache = reader.new_cache()
    reader.read(cache, tokens(WINDOW - 1))
    assert cache.seen == WINDOW - 1 > LIMIT
    reader.read(cache, tokens(1))
    with pytest.raises(ContextLimitError, match=rf"ForCausalLM has .*{named}.* 96 positions .*begin a new one"):
        reader.read(cache, tokens(1))
    assert cache.seen == WINDOW
    assert not cache.position_maps[0].knots


def test_rotations_are_looked_for_only_when_they_are_needed() -> None:
    reader = Engine(model_of({"model_type": "llama"}), SMALL, chunk=16)
    cache = reader.new_cache()
    with mock.patch(
        "zsmerge_llm.engine.position_remapping.measure_rotations", wraps=attention.measure_rotations
    ) as look:
        reader.read(cache, tokens(80))
        assert not look.called
        reader.read(cache, tokens(400))
        assert look.call_count == 1


def test_the_exact_cache_never_moves_and_alone_warns(small: Engine) -> None:
    cache = small.new_cache(CacheConfig.full())
    small.read(cache, tokens(200))
    assert not cache.position_maps[0].knots
    assert small.exact_limit is None
    exact = Engine(small.model, CacheConfig.full())
    with pytest.warns(UserWarning, match="trained on 96 positions"):
        check_length(90, SamplingParams(max_tokens=20), None, exact.exact_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_length(90, SamplingParams(max_tokens=20), None, small.exact_limit)


def test_a_model_that_names_no_window_is_read_as_it_is() -> None:
    reader = Engine(model_of({"model_type": "llama"}), SMALL, chunk=16)
    reader.runner.remapper = PositionRemapper(reader.model, reader.specs, None)
    cache = reader.new_cache()
    reader.read(cache, tokens(300))
    assert not cache.position_maps[0].knots


def test_a_probe_that_leaves_no_room_is_refused_with_its_length(small: Engine) -> None:
    cache = small.new_cache()
    small.read(cache, tokens(30), probe=tokens(55))
    with pytest.raises(ContextLimitError, match="probe of 55 tokens"):
        small.read(cache, tokens(60), probe=tokens(55))


def test_places_without_knots_are_positions() -> None:
    assert PositionMap().rope_positions(torch.tensor([[0, 5], [7, 1]])).tolist() == [[0, 5], [7, 1]]
    assert PositionMap().offset == 0
