"""The C++ kernels of decode steps and of reading give what plain PyTorch gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.tiny_models import tiny_model
from zsmerge_llm import CacheConfig
from zsmerge_llm.cpu import native as kernels
from zsmerge_llm.cpu.backend import BUILD_PREFILL_AFTER
from zsmerge_llm.cpu.quantized_linear import round_to_int4, round_to_int8
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache import equations

DTYPES = list(kernels.DTYPES)
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    kernels.build()
    kernels.build(kernels.READING)


def difference(given: Tensor, expected: Tensor) -> float:
    """Relative to the expected values' size."""
    return float((given.float() - expected).norm() / expected.norm().clamp(min=1e-9))


def in_8_bits(x: Tensor, group: int) -> Tensor:
    """float32 [M, K]: each `group` inputs of a row rounded to 255 values."""
    parts = [part.float() for part in x.split(group, dim=-1)]
    scales = [part.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127 for part in parts]
    return torch.cat([(part / scale).round() * scale for part, scale in zip(parts, scales, strict=True)], dim=-1)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, kernels.MOST),
    inputs=st.integers(1, 200),
    outputs=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_rows_times_matrices_of_any_size_are_those_of_pytorch(
    dtype: torch.dtype, count: int, inputs: int, outputs: list[int], biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(count, inputs).to(dtype)
    weights = [torch.randn(each, inputs).to(dtype) for each in outputs]
    biases = [torch.randn(each).to(dtype) for each in outputs] if biased else []

    products = kernels.rows(x, weights, [], biases)

    for index, (product, weight) in enumerate(zip(products, weights, strict=True)):
        bias = biases[index].float() if biased else torch.zeros(len(weight))
        expected = x.float() @ weight.float().T + bias
        terms = x.float().abs() @ weight.float().abs().T + bias.abs() + 1e-3
        assert product.dtype == dtype
        assert bool(((product.float() - expected).abs() <= ROUNDING[dtype] * terms).all())


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, kernels.MOST),
    inputs=st.integers(1, 40).map(lambda each: 16 * each),
    outputs=st.integers(1, 150),
    size=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 9),
)
def test_rows_times_a_matrix_of_8_bits_are_those_of_the_matrix_it_stands_for(
    dtype: torch.dtype, count: int, inputs: int, outputs: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(count, inputs)
    x[0, 0] = 1000  # one large input must not take the precision of the others
    x = (x * (1 if dtype == torch.float16 else size)).to(dtype)
    weight, scale = round_to_int8(torch.randn(outputs, inputs), dtype)

    (product,) = kernels.rows(x, [weight], [scale], [])

    whole = weight.float() * scale.float()[:, None]
    terms = x.float().abs() @ whole.abs().T  # a sum may be much smaller than what it is a sum of
    steps = x.float().abs().amax(-1, keepdim=True) / 32767 * whole.abs().sum(-1)  # inputs are rounded to 16 bits
    assert bool(((product.float() - x.float() @ whole.T).abs() <= ROUNDING[dtype] * terms + steps).all())


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, kernels.MOST),
    inputs=st.integers(1, 12).map(lambda each: 32 * each),
    outputs=st.lists(st.integers(1, 4).map(lambda each: 64 * each), min_size=1, max_size=3),
    seed=st.integers(0, 9),
)
def test_rows_times_matrices_of_4_bits_are_those_of_torchs_own_kernel(
    dtype: torch.dtype, count: int, inputs: int, outputs: list[int], seed: int
) -> None:
    if not torch.ops.zsmerge.packed():  # this processor leaves 4 bits to PyTorch
        return
    torch.manual_seed(seed)
    x = torch.randn(count, inputs).to(dtype)
    packed = [round_to_int4(torch.randn(each, inputs), dtype) for each in outputs]

    products = kernels.rows(x, [weight for weight, _ in packed], [ranges for _, ranges in packed], [])

    entering = x.float() if dtype == torch.float32 else in_8_bits(x, 32)
    for product, (weight, ranges) in zip(products, packed, strict=True):
        expected = torch.ops.aten._weight_int4pack_mm_for_cpu(entering, weight, 32, ranges.float())
        assert difference(product, expected) < max(ROUNDING[dtype], 1e-4)


@settings(max_examples=10, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    count=st.integers(1, kernels.MOST),
    inputs=st.integers(1, 12).map(lambda each: 16 * each),
    more=st.integers(0, 100),
    seed=st.integers(0, 9),
)
def test_several_rows_enter_an_output_layer_of_8_bits_in_8_bits(
    dtype: torch.dtype, count: int, inputs: int, more: int, seed: int
) -> None:
    if not torch.ops.zsmerge.packed():  # this processor multiplies float32
        return
    torch.manual_seed(seed)
    x = (torch.randn(count, inputs) + 1).to(dtype)
    weight, scale = round_to_int8(torch.randn(2**15 + more, inputs), dtype)

    (product,) = kernels.rows(x, [weight], [scale], [])

    entering = x.float() if dtype == torch.float32 or count == 1 else in_8_bits(x, 128)
    expected = entering @ (weight.float() * scale.float()[:, None]).T
    assert difference(product, expected) < max(ROUNDING[dtype], 1e-4)


def test_more_rows_than_the_kernels_take_are_refused() -> None:
    with pytest.raises(RuntimeError, match="1 to 8 rows"):
        kernels.rows(torch.ones(9, 32), [torch.ones(4, 32)], [], [])


def test_a_matrix_that_no_row_comes_to_is_left_to_pytorch() -> None:
    model = tiny_model()
    engine = Engine(model, compile=True)
    assert engine.backend.has_decode_kernels
    with torch.inference_mode():
        assert model.lm_head(torch.ones(0, 32)).shape == (0, model.config.vocab_size)


def test_matrices_that_are_views_and_slots_without_room_are_refused() -> None:
    with pytest.raises(RuntimeError, match="contiguous"):
        kernels.rows(torch.ones(1, 32), [torch.ones(32, 4).T], [], [])
    assert not kernels.multiplies(torch.ones(1, 32), torch.ones(32, 4).T)
    slots = [torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), *torch.ones(3, 1, 1, 4), torch.ones(1, 1, 4).int()]
    arriving = [torch.ones(1, 1, 1, 8)] * 3
    with pytest.raises(RuntimeError, match="no room behind slot 4"):
        kernels.look(
            arriving, slots, torch.zeros(1, 1).int(), [4],
            scaling=1, alpha=1, softcap=None, window=None, sinks=None,
        )  # fmt: skip


def by_the_book(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float, cap: float | None, sinks: Tensor | None
) -> Tensor:
    """One row: query [Hq, T, D], keys and values [H, C, D], bias [H, T, C] → float32 [Hq, T, D]."""
    heads, group = len(keys), len(query) // len(keys)
    grouped = query.float().view(heads, group, *query.shape[1:])
    logits = torch.einsum("hgtd,hcd->hgtc", grouped, keys.float()) * scaling
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    logits = logits + bias[:, None]
    if sinks is not None:
        column = sinks.view(heads, group, 1, 1).expand(-1, -1, logits.shape[2], 1)
        logits = torch.cat([logits, column], dim=-1)
    paid = logits.softmax(-1)[..., : keys.shape[1]]
    return torch.einsum("hgtc,hcd->hgtd", paid, values.float()).flatten(0, 1)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    fills=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([8, 32, 48, 64, 80, 128]),
    tokens=st.integers(1, kernels.MOST),
    cap=st.sampled_from([None, 5.0]),
    window=st.sampled_from([None, 40]),
    learned=st.booleans(),
    seed=st.integers(0, 9),
)
def test_looking_at_slots_is_attention_by_the_book(
    dtype: torch.dtype, fills: list[int], heads: int, group: int, size: int, tokens: int,
    cap: float | None, window: int | None, learned: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    rows, room = len(fills), max(fills) + tokens + 3
    query = torch.randn(rows, tokens, heads * group, size).to(dtype).transpose(1, 2)  # as models give it
    key, value = (torch.randn(rows, tokens, heads, size).to(dtype).transpose(1, 2) for _ in range(2))
    keys, values = (torch.randn(rows, heads, room, size).to(dtype) for _ in range(2))
    count = torch.ones(rows, heads, room)
    count[:, :, :3] = torch.tensor([0.0, 1.0, 300.0])
    score, accumulated = torch.ones(2, rows, heads, room)
    position = torch.arange(room, dtype=torch.int32).expand(rows, heads, room).clone()
    now = torch.tensor([[fill + step for step in range(tokens)] for fill in fills], dtype=torch.int32)
    sinks = torch.randn(heads * group) if learned else None

    output = kernels.look(
        (query, key, value), (keys, values, count, score, accumulated, position), now, fills,
        scaling=size**-0.5, alpha=0.6, softcap=cap, window=window, sinks=sinks,
    )  # fmt: skip

    for row, fill in enumerate(fills):
        end = fill + tokens
        assert torch.equal(keys[row, :, fill:end], key[row])
        assert torch.equal(values[row, :, fill:end], value[row])
        assert bool((count[row, :, fill:end] == 1).all())
        assert bool((score[row, :, fill:end] == 0).all())
        assert bool((accumulated[row, :, fill:end] == 0).all())
        at, seen = now[row][:, None], position[row, 0, :end]
        hidden = torch.arange(end) > fill + torch.arange(tokens)[:, None]
        if window is not None:
            hidden |= at - seen >= window
        bias = (0.6 * count[row, :, None, :end].log()).masked_fill(hidden, float("-inf"))
        expected = by_the_book(query[row], keys[row, :, :end], values[row, :, :end], bias, size**-0.5, cap, sinks)
        assert difference(output[row], expected) < ROUNDING[dtype]


@settings(max_examples=60, deadline=None)
@given(
    bases=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([8, 32, 48, 64, 80, 128]),
    tokens=st.one_of(st.integers(9, 200), st.sampled_from([64, 512, 576])),
    cap=st.sampled_from([None, 5.0]),
    window=st.sampled_from([None, 40, 300]),
    merged=st.booleans(),
    learned=st.booleans(),
    seed=st.integers(0, 9),
)
def test_reading_is_attention_by_the_book(
    bases: list[int], heads: int, group: int, size: int, tokens: int, cap: float | None, window: int | None,
    merged: bool, learned: bool, seed: int,
) -> None:  # fmt: skip
    if not kernels.multiplies_bfloat16():
        return
    torch.manual_seed(seed)
    rows, room = len(bases), max(bases) + tokens
    query = torch.randn(rows, tokens, heads * group, size).bfloat16().transpose(1, 2)  # as models give it
    keys, values = (torch.randn(rows, heads, room + 5, size).bfloat16()[:, :, :room] for _ in range(2))
    bias = torch.randn(rows, heads, room) if merged else None
    if bias is not None:
        bias[:, :, 1] = float("-inf")  # an empty slot
    position = torch.arange(room, dtype=torch.int32).expand(rows, room)
    asking = torch.tensor(bases, dtype=torch.int32)[:, None] + torch.arange(tokens, dtype=torch.int32)
    sinks = torch.randn(heads * group) if learned else None

    output = kernels.read(
        query, keys, values, bases, scaling=size**-0.5, softcap=cap, sinks=sinks, window=window, bias=bias,
        asking=asking, position=position,
    )  # fmt: skip

    for row, base in enumerate(bases):
        at = base + torch.arange(tokens)[:, None]
        hidden = torch.arange(room) > at
        if window is not None:
            hidden |= at - torch.arange(room) >= window
        added = torch.zeros(heads, 1, room) if bias is None else bias[row][:, None]
        added = added.masked_fill(hidden, float("-inf"))
        expected = by_the_book(query[row], keys[row], values[row], added, size**-0.5, cap, sinks)
        assert difference(output[row], expected) < ROUNDING[torch.bfloat16]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 2),
    slots=st.integers(20, 900),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    size=st.sampled_from([8, 48, 64, 128]),
    asked=st.integers(1, 70),
    cap=st.sampled_from([None, 5.0]),
    learned=st.booleans(),
    seed=st.integers(0, 9),
)
def test_what_queries_pay_is_that_of_pytorch(
    rows: int, slots: int, heads: int, group: int, size: int, asked: int, cap: float | None, learned: bool, seed: int
) -> None:
    if not kernels.multiplies_bfloat16():
        return
    torch.manual_seed(seed)
    queries = torch.randn(rows, asked, heads * group, size).bfloat16().transpose(1, 2)
    keys = torch.randn(rows, heads, slots + 3, size).bfloat16()[:, :, :slots]
    bias = torch.randn(rows, heads, slots)
    bias[:, :, 2] = float("-inf")
    position = torch.arange(slots, dtype=torch.int32).expand(rows, heads, slots)
    asking = torch.randint(3, 2 * slots, (rows, asked))
    asking[0, 1:2] = -1
    sinks = torch.randn(heads * group) if learned else None

    mean, most = kernels.watch(queries, keys, bias, asking, position, size**-0.5, cap, sinks)

    seen = position[:, :, None, :] <= asking[:, None, :, None]
    hiding = bias[:, :, None, :].masked_fill(~seen, float("-inf"))[:, :, None]
    grouped = queries.float().reshape(rows, heads, group, asked, size)
    paid = equations.attention_weights(grouped, keys.float(), hiding, size**-0.5, cap, sinks)
    torch.testing.assert_close(mean, equations.mean_attention(paid, asking >= 0), rtol=1e-3, atol=1e-6)
    counted = paid.masked_fill((asking < 0)[:, None, None, :, None], 0.0)
    torch.testing.assert_close(most, counted.amax((2, 3)), rtol=1e-3, atol=1e-6)


def test_tokens_that_do_not_stand_in_the_slots_are_refused() -> None:
    query, slots = torch.ones(1, 2, 20, 8).bfloat16(), torch.ones(1, 1, 30, 8).bfloat16()
    with pytest.raises(RuntimeError, match=r"do not stand in slots 11 to 31|needs a processor"):
        kernels.read(query, slots, slots, [11], scaling=1.0, softcap=None, sinks=None)


@pytest.mark.slow
def test_a_processor_without_products_of_bfloat16_attends_by_pytorch_and_multiplies_bytes_all_the_same() -> None:
    code = (
        "from zsmerge_llm import kernels; kernels.FLAGS = (*kernels.FLAGS, '-U__AVX512BF16__'); "
        "kernels.build(kernels.READING); print(kernels.multiplies_bfloat16(), kernels.multiplies_packed())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    kernels.build(kernels.READING)
    assert done.stdout == f"False {kernels.multiplies_packed()}\n", done.stderr


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2-softcap", "gpt_oss-sinks"])
@pytest.mark.parametrize("config", [CacheConfig(slots=128), CacheConfig.paper(slots=128)], ids=["default", "paper"])
def test_an_engine_reads_with_the_kernels_what_it_reads_without(name: str, config: CacheConfig) -> None:
    model, ids = tiny_model(name, dtype=torch.bfloat16), [(7 * at) % 90 for at in range(300)]

    def read(compile: bool) -> Tensor:
        engine = Engine(model, config, chunk=40, compile=compile)
        engine.backend.has_prefill_kernels = compile and kernels.multiplies_bfloat16()
        cache = engine.new_cache()
        return engine.read(cache, ids, probe=ids[:12])

    assert difference(read(compile=True), read(compile=False)) < 0.05


def test_the_kernels_of_reading_load_where_they_were_built_or_when_much_was_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reads(tokens: int, compile: bool | Literal["auto"] = "auto") -> bool:
        engine = Engine(tiny_model(dtype=torch.bfloat16), compile=compile)
        for _ in range(tokens // 500):
            engine.backend.on_pass(500)
        return engine.backend.has_prefill_kernels

    can = kernels.multiplies_bfloat16()
    assert kernels.built(kernels.READING)
    assert reads(500) == can
    monkeypatch.setattr(kernels, "built", lambda _: False)
    assert not reads(BUILD_PREFILL_AFTER - 500)
    assert reads(BUILD_PREFILL_AFTER + 500) == can
    assert reads(0, compile=True) == can
    assert not reads(BUILD_PREFILL_AFTER + 500, compile=False)
    engine = Engine(tiny_model(dtype=torch.bfloat16))
    engine.backend.warm_up()
    assert engine.backend.has_prefill_kernels == can
    assert not engine.backend.pending_build


def test_the_newest_queries_push_out_the_oldest() -> None:
    queries, asked = torch.arange(2 * 3 * 4 * 2.0).view(2, 3, 4, 2), torch.tensor([[-1, 0, 1, 2]] * 2).int()
    newest, now = -torch.ones(2, 2, 3, 2).transpose(1, 2), torch.tensor([[3, 4], [5, 6]]).int()
    expected = torch.cat([queries[:, :, 2:], newest], dim=2)

    kernels.remember(queries, asked, newest, now)

    assert torch.equal(queries, expected)
    assert asked.tolist() == [[1, 2, 3, 4], [1, 2, 5, 6]]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_nothing() -> None:
    def said(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        engine = Engine(tiny_model(), compile=True)
        cache = engine.new_cache(CacheConfig(slots=24, sink=2, recent=6, stage=8, observation_window=4))
        engine.read(cache, list(range(30)))
        return torch.stack([engine.read(cache, [token]) for token in range(12)])

    assert torch.equal(said(1), said(2))


def test_without_a_compiler_decoding_goes_on_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no g++ here")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", broken)
    kernels.build.cache_clear()
    try:
        engine = Engine(tiny_model(), compile=True)
    finally:
        kernels.build.cache_clear()

    assert not engine.backend.has_decode_kernels
    assert caplog.text.count("no g++ here") == 1
