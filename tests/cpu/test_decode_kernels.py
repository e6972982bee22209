"""The C++ kernels of decode steps match PyTorch: gemv, decode_attention, push_queries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.cpu_kernels import load_kernels
from tests.support.reference_attention import TOLERANCE, reference_attention, relative_error
from tests.support.tiny_models import tiny_model
from zsmerge_llm import CacheConfig
from zsmerge_llm.cpu import native
from zsmerge_llm.cpu.quantized_linear import Int4Linear, quantize_int4, quantize_int8, quantize_linear
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import UnsupportedModelError
from zsmerge_llm.kvcache import equations

DTYPES = list(native.DTYPES)


@pytest.fixture(scope="module", autouse=True)
def _built_kernels() -> None:
    native.build()


def rounded_to_int8(x: Tensor, group: int) -> Tensor:
    """Round each `group` inputs of a row to 255 values: float32 [M, K]."""
    parts = [part.float() for part in x.split(group, dim=-1)]
    scales = [part.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127 for part in parts]
    return torch.cat([(part / scale).round() * scale for part, scale in zip(parts, scales, strict=True)], dim=-1)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, native.MAX_ROWS),
    inputs=st.integers(1, 200),
    outputs=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_gemv_with_matrices_of_any_size_matches_pytorch(
    dtype: torch.dtype, rows: int, inputs: int, outputs: list[int], biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, inputs).to(dtype)
    weights = [torch.randn(each, inputs).to(dtype) for each in outputs]
    biases = [torch.randn(each).to(dtype) for each in outputs] if biased else []

    products = native.gemv(x, weights, [], biases)

    for index, (product, weight) in enumerate(zip(products, weights, strict=True)):
        bias = biases[index].float() if biased else torch.zeros(len(weight))
        expected = x.float() @ weight.float().T + bias
        terms = x.float().abs() @ weight.float().abs().T + bias.abs() + 1e-3
        assert product.dtype == dtype
        assert bool(((product.float() - expected).abs() <= TOLERANCE[dtype] * terms).all())


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, native.MAX_ROWS),
    inputs=st.integers(1, 40).map(lambda each: 16 * each),
    outputs=st.integers(1, 150),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 9),
)
def test_gemv_with_int8_weights_matches_the_dequantized_matrix(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, magnitude: float, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, inputs)
    x[0, 0] = 1000  # one large input must not cost the others their precision
    x = (x * (1 if dtype == torch.float16 else magnitude)).to(dtype)
    weight, scale = quantize_int8(torch.randn(outputs, inputs), dtype)

    (product,) = native.gemv(x, [weight], [scale], [])

    dequantized = weight.float() * scale.float()[:, None]
    terms = x.float().abs() @ dequantized.abs().T  # a sum may be much smaller than its terms
    steps = x.float().abs().amax(-1, keepdim=True) / 32767 * dequantized.abs().sum(-1)  # inputs are rounded to 16 bits
    assert bool(((product.float() - x.float() @ dequantized.T).abs() <= TOLERANCE[dtype] * terms + steps).all())


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, native.MAX_ROWS),
    inputs=st.integers(1, 12).map(lambda each: 32 * each),
    outputs=st.lists(st.integers(1, 4).map(lambda each: 64 * each), min_size=1, max_size=3),
    seed=st.integers(0, 9),
)
def test_gemv_with_int4_weights_matches_the_kernel_of_pytorch(
    dtype: torch.dtype, rows: int, inputs: int, outputs: list[int], seed: int
) -> None:
    if not native.int4_pack_width():  # this processor leaves 4 bits to PyTorch
        return
    torch.manual_seed(seed)
    x = torch.randn(rows, inputs).to(dtype)
    packed = [quantize_int4(torch.randn(each, inputs), dtype) for each in outputs]

    products = native.gemv(x, [weight for weight, _ in packed], [scales for _, scales in packed], [])

    rounded_inputs = x.float() if dtype == torch.float32 else rounded_to_int8(x, 32)
    for product, (weight, scales) in zip(products, packed, strict=True):
        expected = torch.ops.aten._weight_int4pack_mm_for_cpu(rounded_inputs, weight, 32, scales.float())
        assert relative_error(product, expected) < max(TOLERANCE[dtype], 1e-4)


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    rows=st.integers(native.MAX_ROWS + 1, 40),
    inputs=st.integers(1, 8).map(lambda each: 32 * each),
    outputs=st.integers(1, 6).map(lambda each: 32 * each),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_chunk_times_int4_weights_has_for_each_row_what_the_row_has_alone(
    dtype: torch.dtype, rows: int, inputs: int, outputs: int, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = quantize_linear(torch.nn.Linear(inputs, outputs, bias=biased), 4, dtype)
    assert isinstance(layer, Int4Linear)
    x, biases = torch.randn(rows, inputs).to(dtype), [layer.bias] if layer.bias is not None else []
    takes_blocks = bool(native.int4_pack_width()) and outputs % native.int4_pack_width() == 0
    assert native.can_gemv(x, layer.weight) == (takes_blocks and torch.ops.zsmerge.has_chunks())
    assert not native.can_gemv(x.float(), layer.weight)  # their rounding to 8 bits would be seen
    if not native.can_gemv(x, layer.weight):  # this processor has another kernel for chunks, or PyTorch's
        return

    (product,) = native.gemv(x, [layer.weight], [layer.scales], biases)

    alone = [native.gemv(row[None].contiguous(), [layer.weight], [layer.scales], biases)[0] for row in x]
    assert torch.equal(product, torch.cat(alone))


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from((torch.bfloat16, torch.float16)),
    bits=st.sampled_from((8, 16)),
    rows=st.integers(native.MAX_ROWS + 1, 40),
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 70),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_chunk_times_weights_of_8_or_16_bits_is_that_of_float32_rounded_once(
    dtype: torch.dtype, bits: int, rows: int, inputs: int, outputs: int, biased: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs)
    biases = [torch.randn(outputs).to(dtype)] if biased else []
    if bits == 16:
        matrix, scale = weight.to(dtype), torch.ones(outputs, dtype=dtype)
    else:
        matrix, scale = quantize_int8(weight, dtype)
    scales = [scale] if bits == 8 else []
    assert native.can_gemv(x, matrix) == torch.ops.zsmerge.has_chunks()
    if not native.can_gemv(x, matrix):  # this processor has another kernel for chunks, or PyTorch's
        return

    (product,) = native.gemv(x, [matrix], scales, biases)

    exact = x.double() @ (matrix.double() * scale.double()[:, None]).T + sum(bias.double() for bias in biases)
    assert ((product.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 1e-4).all()
    beside_others = native.gemv(torch.cat([x, x]), [matrix], scales, biases)[0]
    assert torch.equal(beside_others, torch.cat([product, product]))


def test_gemv_refuses_more_than_8_rows() -> None:
    with pytest.raises(RuntimeError, match="1 to 8 rows"):
        native.gemv(torch.ones(9, 32), [torch.ones(4, 32)], [], [])


def test_an_input_without_rows_is_left_to_pytorch() -> None:
    model = tiny_model()
    engine = Engine(model, compile=False)
    load_kernels(engine)
    assert engine.backend.has_decode_kernels
    with torch.inference_mode():
        assert model.lm_head(torch.ones(0, 32)).shape == (0, model.config.vocab_size)


def test_views_of_matrices_and_full_slots_are_refused() -> None:
    with pytest.raises(RuntimeError, match="contiguous"):
        native.gemv(torch.ones(1, 32), [torch.ones(32, 4).T], [], [])
    assert not native.can_gemv(torch.ones(1, 32), torch.ones(32, 4).T)
    slots = [torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), *torch.ones(3, 1, 1, 4), torch.ones(1, 1, 4).int()]
    tokens = [torch.ones(1, 1, 1, 8)] * 3
    with pytest.raises(RuntimeError, match="no room behind slot 4"):
        native.decode_attention(
            tokens, slots, torch.zeros(1, 1).int(), [4], [1],
            scaling=1, alpha=1, softcap=None, window=None, sinks=None,
        )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    num_filled=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 32, 48, 64, 80, 128]),
    tokens=st.integers(1, native.MAX_ROWS),
    cap=st.sampled_from([None, 5.0]),
    window=st.sampled_from([None, 40]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 9),
)
def test_decode_attention_matches_the_reference(
    dtype: torch.dtype, num_filled: list[int], heads: int, group: int, head_dim: int, tokens: int,
    cap: float | None, window: int | None, with_sinks: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    rows, room = len(num_filled), max(num_filled) + tokens + 3
    query = torch.randn(rows, tokens, heads * group, head_dim).to(dtype).transpose(1, 2)  # the layout of models
    key, value = (torch.randn(rows, tokens, heads, head_dim).to(dtype).transpose(1, 2) for _ in range(2))
    keys, values = (torch.randn(rows, heads, room, head_dim).to(dtype) for _ in range(2))
    multiplicity = torch.ones(rows, heads, room)
    multiplicity[:, :, :3] = torch.tensor([0.0, 1.0, 300.0])
    score, cumulative = torch.ones(2, rows, heads, room)
    position = torch.arange(room, dtype=torch.int32).expand(rows, heads, room).clone()
    token_position = torch.tensor(
        [[filled + step for step in range(tokens)] for filled in num_filled], dtype=torch.int32
    )
    sinks = torch.randn(heads * group) if with_sinks else None

    output = native.decode_attention(
        (query, key, value), (keys, values, multiplicity, score, cumulative, position), token_position, num_filled,
        [1] * rows, scaling=head_dim**-0.5, alpha=0.6, softcap=cap, window=window, sinks=sinks,
    )  # fmt: skip

    for row, filled in enumerate(num_filled):
        end = filled + tokens
        assert torch.equal(keys[row, :, filled:end], key[row])
        assert torch.equal(values[row, :, filled:end], value[row])
        assert bool((multiplicity[row, :, filled:end] == 1).all())
        assert bool((score[row, :, filled:end] == 0).all())
        assert bool((cumulative[row, :, filled:end] == 0).all())
        at, seen = token_position[row][:, None], position[row, 0, :end]
        hidden = torch.arange(end) > filled + torch.arange(tokens)[:, None]
        if window is not None:
            hidden |= at - seen >= window
        bias = (0.6 * multiplicity[row, :, None, :end].log()).masked_fill(hidden, float("-inf"))
        expected = reference_attention(
            query[row], keys[row, :, :end], values[row, :, :end], bias, head_dim**-0.5, cap, sinks
        )
        assert relative_error(output[row], expected) < TOLERANCE[dtype]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3), new=st.integers(1, 8), data=st.data(),
    size=st.integers(1, 9),
)  # fmt: skip
def test_pushed_queries_replace_the_oldest(lengths: list[int], new: int, size: int, data: st.DataObject) -> None:
    counts = torch.tensor([data.draw(st.integers(0, new)) for _ in lengths])
    history = torch.randn(len(lengths), 3, max(lengths) + new, 2)  # the query of each position
    seen, steps = torch.tensor(lengths)[:, None], torch.arange(new)
    positions = (seen + torch.minimum(steps, (counts - 1).clamp(min=0)[:, None])).int()
    query_positions = positions.masked_fill(steps >= counts[:, None], -1)
    given = torch.stack([history[row, :, at] for row, at in enumerate(positions)])
    newest = [list(range(max(0, length - size), length)) for length in lengths]
    ring, ring_positions = torch.zeros(len(lengths), 3, size, 2), torch.full((len(lengths), size), -1).int()
    for row, known in enumerate(newest):
        for position in known:
            ring[row, :, position % size], ring_positions[row, position % size] = history[row, :, position], position
    expected = equations.push_ring(ring, ring_positions, given, positions, query_positions)

    native.push_queries(ring, ring_positions, given, query_positions)

    assert torch.equal(ring, expected[0])
    assert torch.equal(ring_positions, expected[1])
    for row, length in enumerate(lengths):
        end = length + int(counts[row])
        known = set(range(max(0, end - size), end))
        assert set(ring_positions[row].tolist()) - {-1} == known
        assert all(torch.equal(ring[row, :, position % size], history[row, :, position]) for position in known)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_does_not_change_logits() -> None:
    def logits(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        engine = Engine(tiny_model(), compile=True)
        cache = engine.new_cache(CacheConfig(slots=24, sink=2, recent=6, stage=8, observation_window=4))
        engine.read(cache, list(range(30)))
        return torch.stack([engine.read(cache, [token]) for token in range(12)])

    assert torch.equal(logits(1), logits(2))


def test_without_a_compiler_decoding_falls_back_to_pytorch_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise FileNotFoundError("no g++ here")

    monkeypatch.setenv("ZSMERGE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(native, "_compile", broken)
    for cached in (native.build, native._library_path):
        cached.cache_clear()
    try:
        engine = Engine(tiny_model(), compile=True)
    finally:
        for cached in (native.build, native._library_path):
            cached.cache_clear()

    assert not engine.backend.has_decode_kernels
    assert caplog.text.count("no g++ here") == 1


def test_a_compiler_error_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_library_path", lambda _: tmp_path / "kernels" / "kernels.so")
    monkeypatch.setattr(native, "_source", lambda _: "#error not for this machine")
    with pytest.raises(UnsupportedModelError, match="not for this machine"):
        native.build(("none",))
    assert not list((tmp_path / "kernels").iterdir())
    assert (tmp_path / "kernels").stat().st_mode & 0o777 == 0o700


def test_a_kernel_library_is_loaded_only_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    folder.mkdir(mode=0o700)
    library = folder / "kernels.so"
    library.write_bytes(b"code")
    assert not native._is_trusted(library)  # nothing says what it was
    library.with_suffix(".sha256").write_text(hashlib.sha256(b"code").hexdigest())
    assert native._is_trusted(library)
    folder.chmod(0o777)
    assert not native._is_trusted(library)
    folder.chmod(0o700)
    library.write_bytes(b"other code")
    assert not native._is_trusted(library)
