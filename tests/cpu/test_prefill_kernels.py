"""The C++ kernels of prefill match PyTorch: prefill_attention and attention_mass."""

from __future__ import annotations

import subprocess
import sys
from typing import Literal

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
from zsmerge_llm.cpu.backend import BUILD_PREFILL_AFTER
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache import equations


@pytest.fixture(scope="module", autouse=True)
def _built_kernels() -> None:
    native.build()
    native.build(native.PREFILL_SOURCES)


@settings(max_examples=60, deadline=None)
@given(
    num_past=st.lists(st.integers(0, 700), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 32, 48, 64, 80, 128]),
    tokens=st.one_of(st.integers(9, 200), st.sampled_from([64, 512, 576])),
    cap=st.sampled_from([None, 5.0]),
    window=st.sampled_from([None, 40, 300]),
    merged=st.booleans(),
    with_sinks=st.booleans(),
    seed=st.integers(0, 9),
)
def test_prefill_attention_matches_the_reference(
    num_past: list[int], heads: int, group: int, head_dim: int, tokens: int, cap: float | None, window: int | None,
    merged: bool, with_sinks: bool, seed: int,
) -> None:  # fmt: skip
    if not native.has_bf16_products():
        return
    torch.manual_seed(seed)
    rows, room = len(num_past), max(num_past) + tokens
    query = torch.randn(rows, tokens, heads * group, head_dim).bfloat16().transpose(1, 2)  # the layout of models
    keys, values = (torch.randn(rows, heads, room + 5, head_dim).bfloat16()[:, :, :room] for _ in range(2))
    bias = torch.randn(rows, heads, room) if merged else None
    if bias is not None:
        bias[:, :, 1] = float("-inf")  # an empty slot
    slot_position = torch.arange(room, dtype=torch.int32).expand(rows, room)
    query_position = torch.tensor(num_past, dtype=torch.int32)[:, None] + torch.arange(tokens, dtype=torch.int32)
    sinks = torch.randn(heads * group) if with_sinks else None

    output = native.prefill_attention(
        query, keys, values, num_past, scaling=head_dim**-0.5, softcap=cap, sinks=sinks, window=window, bias=bias,
        query_position=query_position, slot_position=slot_position,
    )  # fmt: skip

    for row, past in enumerate(num_past):
        at = past + torch.arange(tokens)[:, None]
        hidden = torch.arange(room) > at
        if window is not None:
            hidden |= at - torch.arange(room) >= window
        total_bias = torch.zeros(heads, 1, room) if bias is None else bias[row][:, None]
        total_bias = total_bias.masked_fill(hidden, float("-inf"))
        expected = reference_attention(query[row], keys[row], values[row], total_bias, head_dim**-0.5, cap, sinks)
        assert relative_error(output[row], expected) < TOLERANCE[torch.bfloat16]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 2),
    slots=st.integers(20, 900),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([8, 48, 64, 128]),
    num_queries=st.integers(1, 70),
    cap=st.sampled_from([None, 5.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 9),
)
def test_attention_mass_matches_pytorch(
    rows: int,
    slots: int,
    heads: int,
    group: int,
    head_dim: int,
    num_queries: int,
    cap: float | None,
    with_sinks: bool,
    seed: int,
) -> None:
    if not native.has_bf16_products():
        return
    torch.manual_seed(seed)
    queries = torch.randn(rows, num_queries, heads * group, head_dim).bfloat16().transpose(1, 2)
    keys = torch.randn(rows, heads, slots + 3, head_dim).bfloat16()[:, :, :slots]
    bias = torch.randn(rows, heads, slots)
    bias[:, :, 2] = float("-inf")
    slot_position = torch.arange(slots, dtype=torch.int32).expand(rows, heads, slots)
    query_position = torch.randint(3, 2 * slots, (rows, num_queries))
    query_position[0, 1:2] = -1
    sinks = torch.randn(heads * group) if with_sinks else None

    mean, maximum = native.attention_mass(
        queries, keys, bias, query_position, slot_position, head_dim**-0.5, cap, sinks
    )

    visible = slot_position[:, :, None, :] <= query_position[:, None, :, None]
    masked_bias = bias[:, :, None, :].masked_fill(~visible, float("-inf"))[:, :, None]
    grouped = queries.float().reshape(rows, heads, group, num_queries, head_dim)
    mass = equations.attention_weights(grouped, keys.float(), masked_bias, head_dim**-0.5, cap, sinks)
    torch.testing.assert_close(mean, equations.mean_attention(mass, query_position >= 0), rtol=1e-3, atol=1e-6)
    valid_mass = mass.masked_fill((query_position < 0)[:, None, None, :, None], 0.0)
    torch.testing.assert_close(maximum, valid_mass.amax((2, 3)), rtol=1e-3, atol=1e-6)


def test_queries_whose_own_keys_are_not_in_the_slots_are_refused() -> None:
    query, slots = torch.ones(1, 2, 20, 8).bfloat16(), torch.ones(1, 1, 30, 8).bfloat16()
    with pytest.raises(RuntimeError, match=r"are not in slots 11 to 31|needs a processor"):
        native.prefill_attention(query, slots, slots, [11], scaling=1.0, softcap=None, sinks=None)


@pytest.mark.slow
def test_a_processor_without_bf16_products_still_has_int8_products() -> None:
    code = (
        "from zsmerge_llm.cpu import native; native.FLAGS = (*native.FLAGS, '-U__AVX512BF16__'); "
        "native.build(native.PREFILL_SOURCES); print(native.has_bf16_products(), native.has_int8_products())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    native.build(native.PREFILL_SOURCES)
    assert done.stdout == f"False {native.has_int8_products()}\n", done.stderr


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2-softcap", "gpt_oss-sinks"])
@pytest.mark.parametrize("config", [CacheConfig(slots=128), CacheConfig.paper(slots=128)], ids=["default", "paper"])
def test_an_engine_prefills_with_the_kernels_as_without(name: str, config: CacheConfig) -> None:
    model, ids = tiny_model(name, dtype=torch.bfloat16), [(7 * at) % 90 for at in range(300)]

    def read(kernels: bool) -> Tensor:
        engine = Engine(model, config, chunk=40, compile=False)
        if kernels:
            load_kernels(engine, prefill=True)
        assert engine.backend.has_prefill_kernels == (kernels and native.has_bf16_products())
        cache = engine.new_cache()
        return engine.read(cache, ids, probe=ids[:12])

    assert relative_error(read(kernels=True), read(kernels=False)) < 0.05


@pytest.mark.slow
def test_prefill_kernels_load_if_they_are_built_or_after_many_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(tokens: int, compile: bool | Literal["auto"] = "auto") -> bool:
        engine = Engine(tiny_model(dtype=torch.bfloat16), compile=compile)
        for _ in range(tokens // 500):
            engine.backend.on_pass(500)
        return engine.backend.has_prefill_kernels

    supported = native.has_bf16_products()
    assert native.is_built(native.PREFILL_SOURCES)
    assert loads(500) == supported
    monkeypatch.setattr(native, "is_built", lambda _: False)
    assert not loads(BUILD_PREFILL_AFTER - 500)
    assert loads(BUILD_PREFILL_AFTER + 500) == supported
    assert loads(0, compile=True) == supported
    assert not loads(BUILD_PREFILL_AFTER + 500, compile=False)
    engine = Engine(tiny_model(dtype=torch.bfloat16))
    engine.backend.warm_up()
    assert engine.backend.has_prefill_kernels == supported
    assert not engine.backend.pending_build
