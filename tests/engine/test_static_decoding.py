"""Decoding and reading in fixed memory give what each cache alone gives, whatever happens in between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from tests.support.presets import EVERY_LAYER_ITS_BUDGET, SMALL_PRESETS
from tests.support.static_backend import StaticBackend
from tests.support.tiny_models import FAMILIES, HYBRIDS, tiny_model, tokens
from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Cancelled, Engine
from zsmerge_llm.engine.static_decoder import STEP_TOKENS, StaticDecoder, make_decoder
from zsmerge_llm.errors import ContextLimitError, DeviceMemoryError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.cache_state import cache_state, restore_cache
from zsmerge_llm.kvcache.layer_cache import SAVED
from zsmerge_llm.kvcache.policies import EvictionPolicy
from zsmerge_llm.kvcache.policies.recency import Recency
from zsmerge_llm.kvcache.slots import PER_SLOT

GREEDY = SamplingParams(max_tokens=40, ignore_eos=True)
QUICK = ["lfm2", "falcon_h1", "jamba"]
SLOW = sorted(set(HYBRIDS) - set(QUICK))


def eager_engine(config: CacheConfig, family: str = "llama", **settings: Any) -> Engine:
    return Engine(tiny_model(family), config, chunk=40, compile=False, **settings)


def static_engine(config: CacheConfig, family: str = "llama") -> Engine:
    return Engine(tiny_model(family), config, chunk=40, backend=StaticBackend())


def decoder_of(engine: Engine, rows: int) -> StaticDecoder:
    return make_decoder(engine.runner, engine.layers, engine.vocab_size, engine.config, rows, 256)


def assert_equal_caches(one: Cache, other: Cache) -> None:
    """Compare everything but entries that no row uses; the ring's queries by their positions."""
    assert one.lengths == other.lengths
    assert one.position_maps == other.position_maps
    for layer, same in zip(one.layers, other.layers, strict=True):
        assert layer.num_filled == same.num_filled == layer.filled.tolist() == same.filled.tolist()
        used = layer.num_filled[0]
        assert not layer.multiplicity[:, :, used:].any()
        for name in SAVED:
            tensor, expected = getattr(layer, name), getattr(same, name)
            if name in PER_SLOT:
                tensor, expected = tensor[:, :, :used], expected[:, :, :used]
            torch.testing.assert_close(
                tensor, expected, atol=1e-4, rtol=1e-4, msg=lambda text, at=name: f"{at}: {text}"
            )
    for state, same_state in zip(one.states, other.states, strict=True):
        for name, tensor in state.tensors.items():
            torch.testing.assert_close(tensor, same_state.tensors[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", [*SMALL_PRESETS, "layer-budgets"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_ragged_rows_that_join_and_leave_equal_the_same_conversations_alone(family: str, preset: str) -> None:
    if preset == "layer-budgets" and family != "llama":
        return  # other families have fewer full-attention layers
    check_ragged_rows(static_engine({**SMALL_PRESETS, "layer-budgets": EVERY_LAYER_ITS_BUDGET}[preset], family))


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
@torch.inference_mode()
def test_ragged_rows_of_a_hybrid_equal_the_same_conversations_alone(family: str) -> None:
    check_ragged_rows(static_engine(SMALL_PRESETS["default"], family))


def check_ragged_rows(engine: Engine) -> None:
    caches = [engine.new_cache() for _ in range(3)]
    for row, cache in enumerate(caches):
        engine.read(cache, tokens(20 + 17 * row, seed=row))
    alone, decoder = [cache.clone() for cache in caches], decoder_of(engine, 4)
    rows = {0: decoder.join(caches[0]), 1: decoder.join(caches[1])}
    for step in range(25):
        if step == 7:
            rows[2] = decoder.join(caches[2])
        if step == 18:
            decoder.leave(rows.pop(0))
        active = [each for each in rows if (each + step) % 5 != 3]  # sometimes one waits
        ids = {each: [(7 * step + each) % 90 + 3] for each in active}
        logits = decoder.step({rows[each]: part for each, part in ids.items()})
        for each in active:
            decoder.keep(rows[each])
            expected = engine.runner.run(alone[each], torch.tensor([ids[each]]))[0]
            torch.testing.assert_close(logits[rows[each]], expected, atol=1e-4, rtol=1e-4)
    for row in rows.values():
        decoder.leave(row)
    for cache, expected in zip(caches, alone, strict=True):
        assert_equal_caches(cache, expected)


@pytest.mark.parametrize("preset", SMALL_PRESETS)
def test_a_stream_gives_the_same_tokens_and_the_same_cache(preset: str) -> None:
    config, ids = SMALL_PRESETS[preset], tokens(40)
    one, other = eager_engine(config), static_engine(config)
    expected, cache = one.new_cache(), other.new_cache()
    assert list(other.stream(cache, ids, GREEDY)) == list(one.stream(expected, ids, GREEDY))
    assert_equal_caches(cache, expected)
    assert cache.logits is not None
    torch.testing.assert_close(cache.logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("taken", [1, 2, 9, 25])
def test_a_token_that_was_computed_ahead_of_a_closed_stream_is_not_in_the_cache(taken: int, lookup: bool) -> None:
    config, params = SMALL_PRESETS["default"], GREEDY.replace(lookup=lookup)
    one, other = eager_engine(config), static_engine(config)
    expected, cache = one.new_cache(), other.new_cache()
    for engine, own in ((one, expected), (other, cache)):
        stream = engine.stream(own, tokens(40), params)
        for _ in range(taken):
            next(stream)
        stream.close()
    assert_equal_caches(cache, expected)


@pytest.mark.parametrize(("family", "taken"), [("qwen3_next", 3), ("lfm2", 40)])
def test_a_hybrid_streams_the_same_tokens_and_a_closed_stream_leaves_no_trace_in_a_state(
    family: str, taken: int
) -> None:
    config = SMALL_PRESETS["default"]
    one, other = eager_engine(config, family), static_engine(config, family)
    expected, cache = one.new_cache(), other.new_cache()
    said = []
    for engine, own in ((one, expected), (other, cache)):
        stream = engine.stream(own, tokens(40), GREEDY.replace(lookup=True))
        said.append([next(stream) for _ in range(taken)])
        stream.close()
    assert said[0] == said[1]
    assert_equal_caches(cache, expected)
    assert isinstance(other.backend, StaticBackend)
    assert other.backend.captured >= 1


def test_cancelling_leaves_a_cache_that_goes_on_as_if_nothing_had_happened() -> None:
    config, cancel = SMALL_PRESETS["default"], Event()
    engine, plain = static_engine(config), eager_engine(config)
    cache, expected = engine.new_cache(), plain.new_cache()
    stream = engine.stream(cache, tokens(40), GREEDY, cancel=cancel)
    said = [next(stream) for _ in range(5)]
    cancel.set()
    with pytest.raises(Cancelled):
        next(stream)
    plain.read(expected, [*tokens(40), *said[: cache.seen - 40]])
    torch.testing.assert_close(engine.read(cache, [5, 6, 7]), plain.read(expected, [5, 6, 7]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("preset", ["default", "paper", "h2o"])
def test_threads_that_share_steps_get_the_answers_they_get_alone(preset: str) -> None:
    """Six conversations, four rows: some have to leave theirs for others."""
    engine, plain = static_engine(SMALL_PRESETS[preset]), eager_engine(SMALL_PRESETS[preset])
    prompts = [tokens(20 + 9 * index, seed=index) for index in range(6)]
    answers: dict[int, list[int]] = {}

    def answer(index: int) -> None:
        answers[index] = list(engine.stream(engine.new_cache(), prompts[index], GREEDY))

    threads = [threading.Thread(target=answer, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for index, prompt in enumerate(prompts):
        assert answers[index] == list(plain.stream(plain.new_cache(), prompt, GREEDY))


def test_a_slow_reader_loses_nothing_to_another_conversation() -> None:
    """Its step ran ahead, and another conversation's step came before it was taken."""
    engine, plain = static_engine(SMALL_PRESETS["default"]), eager_engine(SMALL_PRESETS["default"])
    cache, expected = engine.new_cache(), plain.new_cache()
    slow = engine.stream(cache, tokens(40), GREEDY)
    said = [next(slow) for _ in range(3)]
    list(engine.stream(engine.new_cache(), tokens(30, seed=9), GREEDY))
    said += list(slow)
    assert said == list(plain.stream(expected, tokens(40), GREEDY))
    assert cache.lengths == expected.lengths


def test_a_batch_equals_its_rows() -> None:
    engine, plain = static_engine(SMALL_PRESETS["default"]), eager_engine(SMALL_PRESETS["default"])
    params = [GREEDY.replace(max_tokens=8 + 5 * row) for row in range(3)]

    def answers(of: Engine) -> tuple[list[list[int | None]], Cache]:
        caches = [of.new_cache() for _ in params]
        for row, cache in enumerate(caches):
            of.read(cache, tokens(20 + 9 * row, seed=row))
        batch = Cache.stack(caches)
        return list(of.decode(batch, params, [[]] * 3)), batch

    (said, batch), (expected, other) = answers(engine), answers(plain)
    assert said == expected
    for row in range(3):
        assert_equal_caches(batch.row(row), other.row(row))


@pytest.mark.parametrize("probe", [None, tokens(7, seed=3), tokens(45, seed=3)])
@pytest.mark.parametrize("preset", [name for name in SMALL_PRESETS if name != "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss-sinks"])
def test_a_long_text_is_kept_as_in_a_cache_alone(family: str, preset: str, probe: list[int] | None) -> None:
    config = SMALL_PRESETS[preset]
    one, other = eager_engine(config, family), static_engine(config, family)
    expected, cache = one.new_cache(), other.new_cache()
    for part in (230, 95):
        wanted = one.read(expected, tokens(part, seed=part), probe=probe, multi_turn=part == 95)
        given = other.read(cache, tokens(part, seed=part), probe=probe, multi_turn=part == 95)
        torch.testing.assert_close(given, wanted, atol=1e-4, rtol=1e-4)
    assert_equal_caches(cache, expected)
    assert isinstance(other.backend, StaticBackend)
    assert other.backend.captured >= 1


def test_two_texts_that_are_read_at_once_do_not_mix() -> None:
    engine, plain = static_engine(SMALL_PRESETS["default"]), eager_engine(SMALL_PRESETS["default"])
    texts, found = [tokens(400, seed=seed) for seed in range(3)], {}

    def read(index: int) -> None:
        found[index] = engine.read(engine.new_cache(), texts[index])

    threads = [threading.Thread(target=read, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for index, text in enumerate(texts):
        torch.testing.assert_close(found[index], plain.read(plain.new_cache(), text), atol=1e-4, rtol=1e-4)


def test_decoding_goes_on_across_the_end_of_the_window() -> None:
    def engine(of: Callable[..., Engine]) -> Engine:
        made = of(SMALL_PRESETS["default"])
        made.runner.remapper.window = 128
        return made

    one, other = engine(eager_engine), engine(static_engine)
    expected, cache = one.new_cache(), other.new_cache()
    params = GREEDY.replace(max_tokens=300, lookup=False)  # where a window is remapped depends on the drafts
    assert list(other.stream(cache, tokens(40), params)) == list(one.stream(expected, tokens(40), params))
    assert cache.position_maps[0].knots
    assert_equal_caches(cache, expected)


def test_the_exact_cache_grows_while_it_decodes() -> None:
    one, other = eager_engine(CacheConfig.full()), static_engine(CacheConfig.full())
    params = GREEDY.replace(max_tokens=400)
    assert list(other.stream(other.new_cache(), [5, 6], params)) == list(one.stream(one.new_cache(), [5, 6], params))


def test_conversations_of_other_configurations_take_turns() -> None:
    engine, plain = static_engine(SMALL_PRESETS["default"]), eager_engine(SMALL_PRESETS["default"])
    configs = [engine.config, engine.config.replace(sink=8), engine.config.replace(sink=6), engine.config]
    for config in configs:
        cache, expected = engine.new_cache(config), plain.new_cache(config)
        assert list(engine.stream(cache, tokens(50), GREEDY)) == list(plain.stream(expected, tokens(50), GREEDY))


class HostPolicy(Recency):
    """A policy that looks at numbers of the host, as one of a user may."""

    name = "host"
    capturable = False


def test_a_policy_that_cannot_be_captured_decodes_as_before() -> None:
    policy: EvictionPolicy = HostPolicy()
    config = CacheConfig(slots=32, recent=8, stage=4, policy=policy)
    one, other = eager_engine(config), static_engine(config)
    assert list(other.stream(other.new_cache(), tokens(40), GREEDY)) == list(
        one.stream(one.new_cache(), tokens(40), GREEDY)
    )
    assert isinstance(other.backend, StaticBackend)
    assert other.backend.captured == 0


class NoMemory(StaticBackend):
    """A device whose memory ends while something is captured."""

    left = 0

    def capture(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return super().capture(run, warm_up)


def test_without_memory_an_error_says_what_would_fit_and_the_conversation_is_unharmed() -> None:
    backend = NoMemory()
    engine = Engine(tiny_model("llama"), SMALL_PRESETS["paper"], chunk=20, backend=backend)
    cache = engine.new_cache()
    backend.left = 100
    engine.read(cache, tokens(50))
    before = cache.clone()
    backend.left = 0
    with pytest.raises(DeviceMemoryError, match="slots=16"):
        list(engine.decode(cache, [GREEDY], [[]]))
    assert_equal_caches(cache, before)
    backend.left = 100
    expected = [token for (token,) in eager_engine(engine.config).decode(before, [GREEDY], [[]])]
    assert [token for (token,) in engine.decode(cache, [GREEDY], [[]])] == expected


def test_without_memory_to_capture_compressing_it_runs_as_it_is() -> None:
    backend = NoMemory()
    backend.left = 100
    engine = Engine(tiny_model("llama"), SMALL_PRESETS["paper"], chunk=20, backend=backend)
    cache = engine.new_cache()
    engine.read(cache, tokens(50))
    before = cache.clone()
    backend.left = 1  # the step's
    expected = [token for (token,) in eager_engine(engine.config).decode(before, [GREEDY], [[]])]
    assert [token for (token,) in engine.decode(cache, [GREEDY], [[]])] == expected
    assert_equal_caches(cache, before)


def test_without_memory_for_a_chunk_an_error_names_a_smaller_one() -> None:
    backend = NoMemory()
    engine = Engine(tiny_model("llama"), SMALL_PRESETS["h2o"], chunk=40, backend=backend)
    with pytest.raises(DeviceMemoryError, match="chunk=20"):
        engine.read(engine.new_cache(), tokens(200))


def test_the_end_of_the_window_is_an_error_for_the_conversation_that_reaches_it_alone() -> None:
    engine = Engine(tiny_model("gpt_neox"), SMALL_PRESETS["default"], chunk=40, backend=StaticBackend())
    engine.runner.remapper.window, engine.runner.remapper._rotations = 60, [None]
    with pytest.raises(ContextLimitError):
        list(engine.stream(engine.new_cache(), tokens(40), GREEDY))
    assert list(engine.stream(engine.new_cache(), tokens(10), GREEDY.replace(max_tokens=5)))


class Conversations(RuleBasedStateMachine):
    """Conversations in a static batch, beside the same ones alone: every step, fork, copy and cancel agrees."""

    def __init__(self) -> None:
        super().__init__()
        config = CacheConfig(slots=20, recent=4, stage=6, observation_window=4, residual=1)
        self.engine = static_engine(config)
        self.decoder = decoder_of(self.engine, 3)
        self.batched: list[Cache] = []
        self.alone: list[Cache] = []
        self.row_of: dict[int, int] = {}

    @rule(length=st.integers(1, 50), seed=st.integers(0, 5))
    @precondition(lambda self: len(self.batched) < 5)
    def begin(self, length: int, seed: int) -> None:
        cache = self.engine.new_cache()
        self.engine.read(cache, tokens(length, seed=seed))
        self.batched.append(cache)
        self.alone.append(cache.clone())

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.decoder.num_free and len(self.row_of) < len(self.batched))
    def join(self, pick: int) -> None:
        outside = [index for index in range(len(self.batched)) if index not in self.row_of]
        index = outside[pick % len(outside)]
        self.row_of[index] = self.decoder.join(self.batched[index])

    @rule(pick=st.integers(0, 9))
    @precondition(lambda self: self.row_of)
    def leave(self, pick: int) -> None:
        index = sorted(self.row_of)[pick % len(self.row_of)]
        self.decoder.leave(self.row_of.pop(index))
        assert_equal_caches(self.batched[index], self.alone[index])

    @rule(data=st.data(), token=st.integers(3, 90))
    @precondition(lambda self: self.row_of)
    def step(self, data: st.DataObject, token: int) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.row_of)), min_size=1, unique=True))
        logits = self.decoder.step({self.row_of[index]: [token + index] for index in chosen})
        for index in chosen:
            if not data.draw(st.booleans()):  # its stream was closed, or cancelled
                continue
            self.decoder.keep(self.row_of[index])
            expected = self.engine.runner.run(self.alone[index], torch.tensor([[token + index]]))[0]
            torch.testing.assert_close(logits[self.row_of[index]], expected, atol=1e-4, rtol=1e-4)

    @rule(pick=st.integers(0, 9), ids=st.lists(st.integers(3, 90), min_size=2, max_size=STEP_TOKENS), data=st.data())
    @precondition(lambda self: self.row_of)
    def draft(self, pick: int, ids: list[int], data: st.DataObject) -> None:
        index = sorted(self.row_of)[pick % len(self.row_of)]
        if not self.decoder.takes_draft:
            return
        logits = self.decoder.step({self.row_of[index]: ids})[self.row_of[index]]
        kept = data.draw(st.integers(0, len(ids)))
        self.decoder.keep(self.row_of[index], kept)
        for at, token in enumerate(ids[:kept]):
            expected = self.engine.runner.run(self.alone[index], torch.tensor([[token]]))[0, 0]
            torch.testing.assert_close(logits[at], expected, atol=1e-4, rtol=1e-4)

    @rule(pick=st.integers(0, 9), restored=st.booleans())
    @precondition(lambda self: len(self.row_of) < len(self.batched) < 5)
    def fork(self, pick: int, restored: bool) -> None:
        outside = [index for index in range(len(self.batched)) if index not in self.row_of]
        cache = self.batched[outside[pick % len(outside)]]
        tensors, facts = cache_state(cache)
        copied = {name: tensor.clone() for name, tensor in tensors.items()}
        self.batched.append(restore_cache(copied, facts) if restored else cache.clone())
        self.alone.append(self.alone[outside[pick % len(outside)]].clone())

    def teardown(self) -> None:
        for index, row in self.row_of.items():
            self.decoder.leave(row)
            assert_equal_caches(self.batched[index], self.alone[index])


TestConversations = Conversations.TestCase
TestConversations.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are fastest with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
