"""Chunks times matrices of 4 or 8 bits: what the matrix it stands for gives, with inputs in 8 or 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.tiny_models import tiny_model
from zsmerge_llm import CacheConfig
from zsmerge_llm.cpu import native as kernels
from zsmerge_llm.cpu.quantized_linear import Int4Linear, Int8Linear, pack, packed_linear
from zsmerge_llm.engine.engine import Engine

SHORT = 64
"""Rows whose inputs have 16 bits, at most."""
SPANS = 8
"""Spans of inputs whose weights share a scale, at most."""


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    kernels.build(kernels.READING)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def chunk(
    rows: int, inputs: int, outputs: int, biased: bool, seed: int, bits: int = 4
) -> tuple[Tensor, Int4Linear | Int8Linear]:
    torch.manual_seed(seed)
    x = torch.randn(rows, inputs)
    x[:, 5] = 60  # one large input must not take the precision of all others
    plain = nn.Linear(inputs, outputs, bias=biased)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(outputs, inputs) + 0.5)  # not around zero: zeros count
    layer = packed_linear(plain, bits, torch.bfloat16)
    assert isinstance(layer, Int4Linear | Int8Linear)
    return x.bfloat16(), layer


def product(x: Tensor, layer: Int4Linear | Int8Linear) -> Tensor:
    return kernels.many(x, layer.weight, layer.ranges, layer.bias)


def span(inputs: int, bits: int) -> int:
    """Inputs with one scale."""
    step = 32 if bits == 4 else 4
    return next(each for each in range(min(64, inputs), 0, -1) if inputs % each == 0 == each % step)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(kernels.MOST + 1, 3 * SHORT // 2),
    bits=st.sampled_from([4, 8]),
    groups=st.integers(1, 40),
    outputs=st.integers(1, 4).map(lambda each: 64 * each),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_chunk_times_a_matrix_of_4_or_8_bits_is_that_of_the_matrix_it_stands_for(
    rows: int, bits: int, groups: int, outputs: int, biased: bool, seed: int
) -> None:
    if not kernels.multiplies_packed():  # this processor dequantises
        return
    inputs = 16 * groups if bits == 8 else 32 * groups
    x, layer = chunk(rows, inputs, outputs, biased, seed, bits)
    given, whole = product(x.view(1, *x.shape), layer)[0], layer.dequantised()
    expected = x.float() @ whole.T + (0 if layer.bias is None else layer.bias.float())

    size = span(inputs, bits)
    largest = x.float().view(rows, -1, size).abs().amax(-1, keepdim=True).expand(-1, -1, size).reshape(rows, -1)
    steps = 127 if rows > SHORT else 127 * 127
    rounding = (largest / (2 * steps)) @ whole.abs().T  # half a step of each input
    if bits == 4:  # and half a step of each weight
        most = torch.cat(
            [part.abs().amax(-1, keepdim=True).expand_as(part) for part in whole.split(SPANS * size, 1)], 1
        )
        rounding = rounding + x.float().abs() @ (most / 250).T
    terms = x.float().abs() @ whole.abs().T
    assert given.dtype == torch.bfloat16
    assert bool(((given.float() - expected).abs() <= rounding + 0.01 * terms).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_neither_the_number_of_threads_nor_the_other_rows_change_a_product(
    bits: int, threads: Callable[[int], None]
) -> None:
    if not kernels.multiplies_packed():
        return
    for rows, some in ((SHORT, slice(23, 60)), (300, slice(37, 200))):
        x, layer = chunk(rows, 192, 128, True, 0, bits)
        whole = product(x, layer)
        threads(1)
        assert torch.equal(product(x, layer), whole)
        threads(2)
        assert torch.equal(product(x[some], layer), whole[some])


@pytest.mark.parametrize("bits", [4, 8])
def test_what_does_not_fit_is_left_to_pytorch_or_refused(bits: int) -> None:
    if not kernels.multiplies_packed():
        return
    x, layer = chunk(20, 64, 64, False, 0, bits)
    assert kernels.takes_many(x, layer.weight, layer.ranges)
    assert not kernels.takes_many(x.float(), layer.weight, layer.ranges)
    assert not kernels.takes_many(x[: kernels.MOST], layer.weight, layer.ranges)
    assert not kernels.takes_many(x, layer.weight[:48], layer.ranges)
    with pytest.raises(RuntimeError, match="do not match"):
        kernels.many(x[:, :32].contiguous(), layer.weight, layer.ranges, None)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_few_bits_reads_through_the_kernel_what_it_reads_without(bits: int) -> None:
    ids = [(7 * at) % 90 for at in range(300)]
    model = tiny_model(hidden_size=128, intermediate_size=192)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.4)  # a calmer one, that does not make rounding larger from layer to layer
    pack(model, bits, torch.bfloat16)

    def read(compile: bool) -> Tensor:
        engine = Engine(model, CacheConfig(slots=512), chunk=40, compile=compile)
        return engine.read(engine.new_cache(), ids).float()

    plain, through = read(compile=False), read(compile=True)
    if kernels.multiplies_packed():
        assert not torch.equal(plain, through), "the kernel was not used"
    assert float((plain - through).norm() / plain.norm()) < 0.05
