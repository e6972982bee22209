"""Chunks in half precision on a processor that multiplies float32 faster."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny_models import tiny_model
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.cpu.float32_products import Float32Linear, Float32Ops
from zsmerge_llm.cpu.native import MAX_ROWS
from zsmerge_llm.cpu.quantized_linear import quantize_linear
from zsmerge_llm.engine.engine import Engine

CHUNK = 3 * MAX_ROWS


@pytest.fixture(params=["AVX2", "AVX512"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_float32_rounded_once(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3000, 700, bias=has_bias).to(dtype)  # more than one piece
    x = torch.randn(2, CHUNK, 3000).to(dtype)
    with torch.no_grad():
        product = Float32Linear(layer)(x)
        exact = torch.nn.functional.linear(
            x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
        )

    assert product.dtype == dtype
    assert ((product.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + 1e-3).all()


def test_few_rows_and_other_dtypes_go_through_the_layer_itself() -> None:
    layer = torch.nn.Linear(8, 4).bfloat16()
    stand_in = Float32Linear(layer)
    stand_in.eager = lambda x: "eager"
    assert stand_in(torch.ones(MAX_ROWS, 8).bfloat16()) == "eager"
    assert stand_in(torch.ones(CHUNK, 8)) == "eager"
    assert isinstance(stand_in(torch.ones(CHUNK, 8).bfloat16()), torch.Tensor)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_matrices_multiply_a_chunk_alike_in_both_dtypes(capability: str, bits: int) -> None:
    torch.manual_seed(0)
    layer = quantize_linear(torch.nn.Linear(64, 128), bits, torch.bfloat16)
    x = torch.randn(2 * CHUNK, 64).bfloat16()
    product = layer(x)

    assert product.dtype == torch.bfloat16
    exact = x.float() @ layer.dequantized_weight().T + layer.bias.float()
    assert ((product.float() - exact).abs().max() / exact.abs().max()).item() < 0.02


def test_a_model_reads_alike_on_both_kinds_of_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 64, (CHUNK,), generator=torch.Generator().manual_seed(0)).tolist()
    logits = {}
    for kind in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda kind=kind: kind)
        model = tiny_model().bfloat16()
        engine = Engine(model, compile=False)
        assert isinstance(engine.backend.torch_ops, Float32Ops) == (kind == "AVX2")
        cache = engine.new_cache(CacheConfig(slots=16, sink=2, recent=4))
        engine.read(cache, ids)
        assert cache.logits is not None
        logits[kind] = cache.logits.float()
        engine.close()
        assert all("forward" not in vars(module) for module in model.modules())

    difference = (logits["AVX2"] - logits["AVX512"]).abs().max() / logits["AVX512"].abs().max()
    assert difference.item() < 0.05
