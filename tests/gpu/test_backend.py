"""The GPU backend without a GPU: its attention, what it refuses to capture, and compiled layers in static steps.

Graphs are replaced by running the work again; the attention runs in the CPU's version of the same operators.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support.presets import SMALL_PRESETS
from tests.support.tiny_models import COMMON, FAMILIES, HYBRIDS, tiny_model, tokens
from zsmerge_llm.attention.call import AttentionCall, dense_attention
from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.gpu import backend as gpu_backend
from zsmerge_llm.gpu.attention import chunk_attention, masked_attention, merge_attention
from zsmerge_llm.gpu.backend import GPUBackend
from zsmerge_llm.gpu.graphs import capture_refusal
from zsmerge_llm.kvcache.cache import Cache

GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)


class Repeat:
    """In place of graphs: warms up, and runs again. failing: what a capture raises."""

    def __init__(self, failing: Exception | None = None) -> None:
        self.failing = failing
        self.count = 0

    def __call__(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        if self.failing is not None:
            raise self.failing
        self.count += 1
        warm_up()
        return run


def engine_with(model: PreTrainedModel, config: CacheConfig, failing: Exception | None = None) -> Engine:
    """An engine whose backend is the GPU's, without graphs."""
    backend = GPUBackend(model, model.config.num_hidden_layers, False, MAX_DRAFT_TOKENS)
    backend._capture = Repeat(failing)  # type: ignore[assignment]
    return Engine(model, config, chunk=40, backend=backend)


def answers(engine: Engine) -> list[list[int | None]]:
    """What one conversation and then three at once are told."""
    caches = [engine.new_cache() for _ in range(3)]
    for row, cache in enumerate(caches):
        engine.read(cache, tokens(50 + 60 * row, seed=row), probe=tokens(9, seed=7))
    alone = [[token] for token in engine.stream(engine.new_cache(), tokens(70), GREEDY)]
    return [*alone, *engine.decode(Cache.stack(caches), [GREEDY] * 3, [[]] * 3)]


COMPARED = ("llama", "llama-mqa", "gemma3", "gemma2-softcap")
COMPILING_IS_SLOW = [pytest.param(family, True, marks=pytest.mark.slow) for family in COMPARED[1:]]


@pytest.mark.parametrize(
    ("family", "compile"), [("llama", True), *((family, False) for family in COMPARED), *COMPILING_IS_SLOW]
)
def test_it_answers_as_the_reference_does(family: str, compile: bool) -> None:
    config = SMALL_PRESETS["residual"]
    expected = answers(Engine(tiny_model(family), config, chunk=40, compile=False))
    engine = engine_with(tiny_model(family), config)
    if compile:
        engine.backend.start()
    assert answers(engine) == expected
    assert engine.backend.disabled_reason is None
    backend: Any = engine.backend
    assert backend.compiled.enabled == compile
    assert backend._capture.count >= 4  # steps of one row and of four, drafts, compressing


def test_compiled_layers_are_kept_on_disk_for_later_processes() -> None:
    def cached() -> tuple[int, int]:
        return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_bypass"]

    for _ in range(2):
        hits, bypassed = cached()
        engine = engine_with(tiny_model("qwen2"), SMALL_PRESETS["default"])
        engine.backend.start()
        engine.warm_up()
    assert cached() == (hits + 1, bypassed)  # both layers have one graph


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS])
def test_every_supported_family_can_be_captured(family: str) -> None:
    engine = Engine(tiny_model(family), compile=False)
    assert capture_refusal(engine.model) is None


def dynamic_ntk() -> PreTrainedModel:
    """A model whose positions depend on the longest one so far, which it reads on the host."""
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    config = AutoConfig.for_model(**{**COMMON, "model_type": "llama", "rope_scaling": scaling})
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_reads_values_on_the_host_runs_without_graphs_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = SMALL_PRESETS["default"]
    torch.manual_seed(0)
    model = dynamic_ntk()
    engine = engine_with(model, config)
    with caplog.at_level(logging.WARNING):
        said = answers(engine)
    assert engine.backend.disabled_reason is not None
    assert "item" in engine.backend.disabled_reason
    assert len([each for each in caplog.records if "graph" in each.message]) == 1
    backend: Any = engine.backend
    assert backend._capture.count == 0
    assert said == answers(Engine(model, config, chunk=40, compile=False))


def test_layers_on_several_devices_decode_in_each_caches_own_memory() -> None:
    model = tiny_model()
    model.lm_head.to("meta")
    backend = GPUBackend(model, 2, False, MAX_DRAFT_TOKENS)
    assert backend.static_sizes is None
    assert backend.decode_step == "eager"
    assert "several devices" in str(backend.disabled_reason)


def test_a_capture_that_fails_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    failing = RuntimeError("operation not permitted when stream is capturing")
    engine = engine_with(tiny_model(), SMALL_PRESETS["default"], failing)
    with caplog.at_level(logging.WARNING):
        said = answers(engine)
    assert "not permitted" in str(engine.backend.disabled_reason)
    assert len(caplog.records) == 1
    assert said == answers(Engine(tiny_model(), SMALL_PRESETS["default"], chunk=40, compile=False))


@pytest.mark.parametrize("free", [10**6, 10**7, 10**9])
def test_the_chunk_follows_the_free_memory(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**10))
    model = tiny_model()
    backend = GPUBackend(model, 2, False, MAX_DRAFT_TOKENS)
    chunk = Engine(model, compile=False, backend=backend).chunk
    needed = gpu_backend.token_bytes(model, Engine(model, compile=False).specs)
    assert chunk == max((size for size in gpu_backend.CHUNKS if size * needed <= free // 2), default=256)


# -- attention ---------------------------------------------------------------------------------------------------------

SIZES = {
    "kv_heads": st.integers(1, 3),
    "group": st.sampled_from([1, 2, 7]),
    "held": st.integers(0, 40),
    "total": st.integers(1, 40),
    "seed": st.integers(0, 1000),
}


def random_call(
    kv_heads: int, group: int, held: int, total: int, seed: int, sinks: bool
) -> tuple[AttentionCall, Tensor, Tensor]:
    torch.manual_seed(seed)
    query, keys, values = (torch.randn(2, heads, size, 16) for heads, size in (
        (kv_heads * group, total), (kv_heads, held + total), (kv_heads, held + total)))  # fmt: skip
    learned = torch.randn(kv_heads * group) if sinks else None
    call = AttentionCall(0, query, keys[:, :, held:], values[:, :, held:], 0.3, None, None, learned)
    return call, keys, values


def causal(call: AttentionCall, held: int) -> Tensor:
    total = call.query.shape[2]
    hidden = torch.arange(held + total) > held + torch.arange(total)[:, None]
    return torch.zeros(2, 1, total, held + total).masked_fill(hidden, float("-inf"))


@given(**SIZES, sinks=st.booleans(), biased=st.booleans())
def test_two_flash_calls_equal_one_softmax(sinks: bool, biased: bool, held: int, **sizes: int) -> None:
    call, keys, values = random_call(held=held, sinks=sinks, **sizes)
    bias = 5 * torch.rand(2, sizes["kv_heads"], held) if biased else None
    whole = causal(call, held).repeat(1, call.query.shape[1], 1, 1)
    if bias is not None:
        whole[..., :held] += bias.repeat_interleave(sizes["group"], dim=1)[:, :, None]
    expected = dense_attention(call, keys, values, whole)
    torch.testing.assert_close(chunk_attention(call, keys, values, held, bias), expected, atol=1e-5, rtol=1e-4)


@given(**SIZES, of_heads=st.booleans())
def test_folded_heads_equal_repeated_ones(held: int, of_heads: bool, **sizes: int) -> None:
    call, keys, values = random_call(held=held, sinks=False, **sizes)
    bias = causal(call, held)
    if of_heads:
        bias = bias + torch.rand(2, call.query.shape[1], 1, bias.shape[3])
    expected = dense_attention(call, keys, values, bias)
    torch.testing.assert_close(masked_attention(call, keys, values, bias), expected, atol=1e-5, rtol=1e-4)


def test_a_part_that_nothing_attends_to_adds_nothing() -> None:
    output, lse = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    merged, merged_lse = merge_attention(output, lse, torch.randn(1, 2, 3, 4), torch.full((1, 2, 3), -1e30))
    torch.testing.assert_close(merged, output)
    torch.testing.assert_close(merged_lse, lse)


@pytest.mark.parametrize("config", [SMALL_PRESETS["default"], SMALL_PRESETS["residual"], CacheConfig.full()])
def test_a_text_is_read_by_flash_attention_in_bfloat16(config: CacheConfig) -> None:
    model = tiny_model().to(torch.bfloat16)
    engine, plain = engine_with(model, config), Engine(model, config, chunk=40, compile=False)
    text = tokens(150)
    cache, expected = engine.new_cache(), plain.new_cache()
    logits, wanted = engine.read(cache, text, probe=tokens(9)), plain.read(expected, text, probe=tokens(9))
    torch.testing.assert_close(logits, wanted, atol=0.05, rtol=0.05)
    assert cache.lengths == expected.lengths
