"""Reading and decoding: chunks, batches, padding, cancellation, sampling, and what is refused."""

from __future__ import annotations

import itertools
from threading import Event

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.tiny_models import VOCAB, tiny_model, tokens
from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Cancelled, Engine
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.cache_state import cache_state, restore_cache

SMALL = CacheConfig(slots=24, recent=6, stage=4, sink=2)
MERGING = CacheConfig(slots=24, recent=6, stage=4, sink=2, residual=3)
PAPER = CacheConfig.paper(24)
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_model("llama"), SMALL, chunk=16)


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=5), stage=st.integers(1, 9))
def test_chunk_boundaries_change_nothing_while_everything_fits(engine: Engine, cuts: list[int], stage: int) -> None:
    config, ids = CacheConfig(slots=40, recent=6, stage=stage), tokens(40)
    whole = engine.read(engine.new_cache(config), ids)
    cache, boundaries = engine.new_cache(config), sorted({0, 40, *cuts})
    for start, end in itertools.pairwise(boundaries):
        last = engine.read(cache, ids[start:end])
    assert_close(last, whole)


@pytest.mark.parametrize("config", [SMALL, MERGING, PAPER, CacheConfig.h2o(24), CacheConfig.streaming(24)])
def test_a_row_of_a_padded_batch_equals_a_single_row(engine: Engine, config: CacheConfig) -> None:
    """Prefill and decode of prompts of very different lengths, some far beyond the budget."""
    rows = [tokens(90, seed=1), tokens(5, seed=2), tokens(37, seed=3), tokens(26, seed=4)]
    batch = engine.new_cache(config, rows=4)
    logits = engine.read_batch(batch, rows)
    caches = [engine.new_cache(config) for _ in rows]
    for row, ids in enumerate(rows):
        assert_close(logits[row], engine.read(caches[row], ids))
    steps = list(engine.decode(batch, [PARAMS] * 4, rows))
    for row, ids in enumerate(rows):
        single = [step[0] for step in engine.decode(caches[row], [PARAMS], [ids])]
        assert [step[row] for step in steps] == single


@pytest.mark.parametrize("config", [SMALL, MERGING, PAPER, CacheConfig.full()])
def test_stacked_caches_decode_as_single_caches(engine: Engine, config: CacheConfig) -> None:
    rows = [tokens(70, seed=1), tokens(9, seed=2)]
    caches = [engine.new_cache(config) for _ in rows]
    for cache, ids in zip(caches, rows, strict=True):
        engine.read(cache, ids)
    batch = Cache.stack(caches)
    steps = list(engine.decode(batch, [PARAMS] * 2, rows))
    for row, cache in enumerate(caches):
        single = [step[0] for step in engine.decode(cache, [PARAMS], [rows[row]])]
        assert [step[row] for step in steps] == single
        assert_close(batch.row(row).logits, cache.logits)


def test_rows_of_a_batch_end_at_their_own_lengths(engine: Engine) -> None:
    rows = [tokens(8, seed=1), tokens(8, seed=2)]
    batch = engine.new_cache(rows=2)
    engine.read_batch(batch, rows)
    short, long = SamplingParams(max_tokens=2, ignore_eos=True), SamplingParams(max_tokens=5, ignore_eos=True)
    steps = list(engine.decode(batch, [short, long], rows))
    assert [step[0] is None for step in steps] == [False, False, True, True, True]
    assert all(step[1] is not None for step in steps)
    assert batch.lengths == [8 + 1, 8 + 4], "the last token of each row is not fed back"


@pytest.mark.parametrize("config", [SMALL, MERGING, PAPER])
def test_a_clone_is_independent_of_its_original(engine: Engine, config: CacheConfig) -> None:
    cache = engine.new_cache(config)
    engine.read(cache, tokens(60))
    copy = cache.clone()
    after = engine.read(copy, tokens(30, seed=1))
    engine.read(copy, tokens(30, seed=2))
    assert_close(engine.read(cache, tokens(30, seed=1)), after)


@settings(max_examples=25, deadline=None)
@given(read=st.integers(0, 70), more=st.integers(1, 40), config=st.sampled_from([SMALL, MERGING, CacheConfig.full()]))
def test_what_is_trimmed_has_no_free_slots_and_its_clone_continues_bit_for_bit(
    engine: Engine, read: int, more: int, config: CacheConfig
) -> None:
    cache = engine.new_cache(config)
    if read:
        engine.read(cache, tokens(read))
    kept = cache.trimmed()
    assert all(layer.capacity == max(1, *layer.num_filled) for layer in kept.layers)
    assert kept.nbytes <= cache.nbytes
    copy = kept.clone()
    assert torch.equal(engine.read(copy, tokens(more, seed=1)), engine.read(cache, tokens(more, seed=1)))
    assert copy.nbytes == cache.nbytes


def test_a_trimmed_cache_is_not_read_into(engine: Engine) -> None:
    cache = engine.new_cache()
    engine.read(cache, tokens(9))
    kept = cache.trimmed()
    for read in (
        lambda: engine.read(kept, tokens(1)),
        lambda: engine.read_batch(kept, [tokens(1)]),
        lambda: engine.logprobs(kept, tokens(1)),
        lambda: next(engine.decode(kept, [PARAMS], [[]])),
    ):
        with pytest.raises(InputError, match=r"read into cache\.clone\(\)"):
            read()
    assert kept.seen == 9


def test_short_and_long_trimmed_caches_are_stacked_into_one_batch(engine: Engine) -> None:
    rows = [tokens(70, seed=1), tokens(3, seed=2)]
    caches = [engine.new_cache() for _ in rows]
    for cache, ids in zip(caches, rows, strict=True):
        engine.read(cache, ids)
    batch = Cache.stack([cache.trimmed() for cache in caches])
    steps = list(engine.decode(batch, [PARAMS] * 2, rows))
    for row, cache in enumerate(caches):
        assert [step[row] for step in steps] == [step[0] for step in engine.decode(cache, [PARAMS], [rows[row]])]


@pytest.mark.parametrize("config", [SMALL, MERGING, PAPER, CacheConfig.full()])
def test_a_cache_restored_from_its_state_continues_bit_for_bit(engine: Engine, config: CacheConfig) -> None:
    cache = engine.new_cache(config)
    engine.read(cache, tokens(60))
    tensors, metadata = cache_state(cache.clone())
    copy = restore_cache(dict(tensors), metadata)
    assert torch.equal(engine.read(copy, tokens(7)), engine.read(cache, tokens(7)))
    assert copy.nbytes == cache.nbytes


def test_tokens_can_be_appended_at_any_time(engine: Engine) -> None:
    """Turns of many sizes, one after another, to a cache far beyond its budget."""
    cache, total = engine.new_cache(MERGING), 0
    for size in (1, 30, 2, 16, 17, 1, 1, 3, 50, 4):
        engine.read(cache, tokens(size, seed=size))
        total += size
        assert cache.seen == total
        assert all((layer.multiplicity.sum(-1) == total).all() for layer in cache.layers)
    assert cache.dropped_tokens + cache.merged_tokens == total - (24 - 3)


@pytest.mark.parametrize("config", [SMALL, MERGING, PAPER, CacheConfig.h2o(24), CacheConfig.streaming(24)])
def test_compressing_between_turns_accounts_for_every_token_and_makes_room_for_more(
    engine: Engine, config: CacheConfig
) -> None:
    config = config.replace(stage=10)
    caches = [engine.new_cache(config) for _ in range(2)]
    for cache, size in zip(caches, (60, 27), strict=True):
        engine.read(cache, tokens(size))
        engine.read(cache, tokens(5, seed=1))
    batch = Cache.stack(caches)
    for cache in (*caches, batch):
        cache.compress_stage()
        assert cache.fits(9)
        for layer in cache.layers:
            accounted = layer.multiplicity.sum(-1) + layer.dropped
            assert (accounted == torch.tensor(cache.lengths)[:, None]).all()
    engine.read_batch(batch, [tokens(7, seed=2)] * 2)
    for row, cache in enumerate(caches):
        assert_close(engine.read(cache, tokens(7, seed=2)), batch.logits[row])
    large = engine.new_cache(CacheConfig(slots=80, recent=6))
    engine.read(large, tokens(60))
    before = [layer.keys.clone() for layer in large.layers]
    large.compress_stage()
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(large.layers, before, strict=True))


def test_a_probe_is_read_but_never_cached(engine: Engine) -> None:
    ids, probe = tokens(80), tokens(6, seed=9)
    plain, guided = engine.new_cache(), engine.new_cache()
    without_probe, with_probe = engine.read(plain, ids), engine.read(guided, ids, probe=probe)
    assert guided.seen == plain.seen == 80
    assert all((layer.position < 80).all() for layer in guided.layers)
    assert not torch.equal(without_probe, with_probe), "the probe changes what is kept"
    large = CacheConfig(slots=100, recent=6)
    assert_close(
        engine.read(engine.new_cache(large), ids, probe=probe), engine.read(engine.new_cache(large), ids)
    )  # while everything fits, it changes nothing


def test_logprobs_of_a_text_do_not_depend_on_how_it_is_split(engine: Engine) -> None:
    ids = tokens(20)
    whole = engine.logprobs(engine.new_cache(), ids)
    cache = engine.new_cache()
    assert_close(torch.cat([engine.logprobs(cache, ids[:7]), engine.logprobs(cache, ids[7:])]), whole)
    assert whole[0] == 0


def test_a_stream_yields_greedy_tokens_and_leaves_the_last_one_unread(engine: Engine) -> None:
    cache, ids = engine.new_cache(), tokens(10)
    generated = list(engine.stream(cache, ids, PARAMS))
    assert len(generated) == 12
    assert cache.seen == 10 + 11
    other = engine.new_cache()
    logits = engine.read(other, ids)
    for token in generated:
        assert logits.argmax() == token
        logits = engine.read(other, [token])


def test_cancelling_stops_within_one_token(engine: Engine) -> None:
    cancel = Event()
    stream = engine.stream(engine.new_cache(), tokens(10), PARAMS, cancel=cancel)
    next(stream)
    cancel.set()
    with pytest.raises(Cancelled):
        next(stream)


def test_cancelling_stops_reading_after_the_chunk(engine: Engine) -> None:
    cancel, cache = Event(), engine.new_cache()
    with pytest.raises(Cancelled):
        engine.read(cache, tokens(100), cancel=cancel, progress=lambda done, total: cancel.set())
    assert cache.seen == 16


def test_progress_counts_every_token_once(engine: Engine) -> None:
    calls: list[tuple[int, int]] = []
    engine.read(engine.new_cache(), tokens(40), progress=lambda done, total: calls.append((done, total)))
    assert calls == [(16, 40), (32, 40), (40, 40)]


def test_equal_seeds_give_equal_answers_and_other_seeds_do_not(engine: Engine) -> None:
    def sample(seed: int) -> list[int]:
        params = SamplingParams(max_tokens=12, temperature=1.5, seed=seed, ignore_eos=True)
        return list(engine.stream(engine.new_cache(), tokens(5), params))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("ids", [[], [VOCAB], [-1], [[1, 2]]])
def test_bad_token_ids_are_refused_before_anything_is_read(engine: Engine, ids: list[int]) -> None:
    cache = engine.new_cache()
    with pytest.raises(InputError):
        engine.read(cache, ids)
    assert cache.seen == 0


def test_wrong_numbers_of_rows_and_unread_caches_are_refused(engine: Engine) -> None:
    with pytest.raises(InputError, match="read_batch"):
        engine.read(engine.new_cache(rows=2), tokens(3))
    with pytest.raises(InputError, match="prompt a row"):
        engine.read_batch(engine.new_cache(rows=2), [tokens(3)])
    with pytest.raises(InputError, match="has read something"):
        next(engine.decode(engine.new_cache(), [PARAMS], [[]]))
    with pytest.raises(ConfigError, match="chunk"):
        Engine(tiny_model("llama"), chunk=0)
    with pytest.raises(ConfigError, match="one CacheConfig"):
        Cache.stack([engine.new_cache(), engine.new_cache(PAPER)])
