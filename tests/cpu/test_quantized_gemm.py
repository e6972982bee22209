"""quantized_gemm matches the dequantized matrix within the rounding of its inputs to 8 or 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support.cpu_kernels import load_kernels
from tests.support.tiny_models import tiny_model
from zsmerge_llm import CacheConfig
from zsmerge_llm.cpu import native
from zsmerge_llm.cpu.quantized_linear import Int4Linear, Int8Linear, quantize_linear, quantize_model
from zsmerge_llm.engine.engine import Engine

RESIDUAL_MAX_ROWS = 64
"""Most rows whose inputs are rounded to 16 bits."""
BLOCK_SPANS = 8
"""Most spans of inputs whose weights share a scale."""


@pytest.fixture(scope="module", autouse=True)
def _built_kernels() -> None:
    native.build(native.PREFILL_SOURCES)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random_layer(
    rows: int, inputs: int, outputs: int, biased: bool, seed: int, bits: int = 4
) -> tuple[Tensor, Int4Linear | Int8Linear]:
    torch.manual_seed(seed)
    x = torch.randn(rows, inputs)
    x[:, 5] = 60  # one large input must not cost the others their precision
    plain = nn.Linear(inputs, outputs, bias=biased)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(outputs, inputs) + 0.5)  # a mean other than zero, so that zero points matter
    layer = quantize_linear(plain, bits, torch.bfloat16)
    assert isinstance(layer, Int4Linear | Int8Linear)
    return x.bfloat16(), layer


def product(x: Tensor, layer: Int4Linear | Int8Linear) -> Tensor:
    return native.quantized_gemm(x, layer.weight, layer.scales, layer.bias)


def span(inputs: int, bits: int) -> int:
    """Return the number of inputs that share a scale."""
    step = 32 if bits == 4 else 4
    return next(each for each in range(min(64, inputs), 0, -1) if inputs % each == 0 == each % step)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(native.MAX_ROWS + 1, 3 * RESIDUAL_MAX_ROWS // 2),
    bits=st.sampled_from([4, 8]),
    groups=st.integers(1, 40),
    outputs=st.integers(1, 4).map(lambda each: 64 * each),
    biased=st.booleans(),
    seed=st.integers(0, 9),
)
def test_quantized_gemm_matches_the_dequantized_matrix(
    rows: int, bits: int, groups: int, outputs: int, biased: bool, seed: int
) -> None:
    if not native.has_int8_products():  # this processor dequantises
        return
    inputs = 16 * groups if bits == 8 else 32 * groups
    x, layer = random_layer(rows, inputs, outputs, biased, seed, bits)
    output, dequantized = product(x.view(1, *x.shape), layer)[0], layer.dequantized_weight()
    expected = x.float() @ dequantized.T + (0 if layer.bias is None else layer.bias.float())

    size = span(inputs, bits)
    largest = x.float().view(rows, -1, size).abs().amax(-1, keepdim=True).expand(-1, -1, size).reshape(rows, -1)
    steps = 127 if rows > RESIDUAL_MAX_ROWS else 127 * 127
    rounding = (largest / (2 * steps)) @ dequantized.abs().T  # half a step of each input
    if bits == 4:  # and half a step of each weight
        maximum = torch.cat(
            [part.abs().amax(-1, keepdim=True).expand_as(part) for part in dequantized.split(BLOCK_SPANS * size, 1)], 1
        )
        rounding = rounding + x.float().abs() @ (maximum / 250).T
    terms = x.float().abs() @ dequantized.abs().T
    assert output.dtype == torch.bfloat16
    assert bool(((output.float() - expected).abs() <= rounding + 0.01 * terms).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_neither_threads_nor_other_rows_change_a_product(bits: int, threads: Callable[[int], None]) -> None:
    if not native.has_int8_products():
        return
    for rows, part in ((RESIDUAL_MAX_ROWS, slice(23, 60)), (300, slice(37, 200))):
        x, layer = random_layer(rows, 192, 128, True, 0, bits)
        expected = product(x, layer)
        threads(1)
        assert torch.equal(product(x, layer), expected)
        threads(2)
        assert torch.equal(product(x[part], layer), expected[part])


@pytest.mark.parametrize("bits", [4, 8])
def test_unsupported_inputs_are_left_to_pytorch_or_refused(bits: int) -> None:
    if not native.has_int8_products():
        return
    x, layer = random_layer(20, 64, 64, False, 0, bits)
    assert native.can_gemm(x, layer.weight, layer.scales)
    assert not native.can_gemm(x.float(), layer.weight, layer.scales)
    assert not native.can_gemm(x[: native.MAX_ROWS], layer.weight, layer.scales)
    assert not native.can_gemm(x, layer.weight[:48], layer.scales)
    with pytest.raises(RuntimeError, match="do not match"):
        native.quantized_gemm(x[:, :32].contiguous(), layer.weight, layer.scales, None)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_model_has_the_same_logits_with_and_without_the_kernel(bits: int) -> None:
    ids = [(7 * at) % 90 for at in range(300)]
    model = tiny_model(hidden_size=128, intermediate_size=192)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.4)  # so that rounding errors do not grow from layer to layer
    quantize_model(model, bits, torch.bfloat16)

    def read(kernels: bool) -> Tensor:
        engine = Engine(model, CacheConfig(slots=512), chunk=40, compile=False)
        if kernels:
            load_kernels(engine, prefill=True)
        return engine.read(engine.new_cache(), ids).float()

    expected, logits = read(kernels=False), read(kernels=True)
    if native.has_int8_products():
        assert not torch.equal(expected, logits), "the kernel was not used"
    assert float((expected - logits).norm() / expected.norm()) < 0.05
