"""Decode steps through compiled layers give the logits of the layers of transformers."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.support.tiny_models import FAMILIES, tiny_model
from zsmerge_llm import CacheConfig, SamplingParams
from zsmerge_llm.cpu import native, quantized_linear
from zsmerge_llm.cpu.compiled_layers import COMPILE_AFTER
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.errors import UnsupportedModelError

WIDTHS = (1, 1 + MAX_DRAFT_TOKENS)
CONFIG = CacheConfig(slots=24, sink=2, recent=6, stage=8, observation_window=4)
PROMPT = [5, 17, 40, 3, 88, 61, 22, 9, 14, 70, 33, 51]
STEPS = 30


def decode_logits(engine: Engine, config: CacheConfig = CONFIG) -> torch.Tensor:
    """Return float32 [STEPS, vocab]: logits of passes of one or five tokens after a prompt, over some compressions."""
    cache = engine.new_cache(config)
    engine.read(cache, PROMPT)
    widths = [WIDTHS[step % 4 == 3] for step in range(STEPS)]
    return torch.stack([engine.read(cache, list(range(step, step + width))) for step, width in enumerate(widths)])


def in_every_run(family: str) -> bool:
    return family in ("llama", "gemma3", "gpt_oss-sinks", "falcon-new")


@pytest.mark.parametrize(
    "family", [each if in_every_run(each) else pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES]
)
def test_compiled_layers_give_the_same_logits_in_every_family(family: str) -> None:
    engine = Engine(tiny_model(family), compile=False)
    expected = decode_logits(engine)

    engine.backend.start()
    logits = decode_logits(engine)

    if family == "gpt_oss-sinks":  # its experts are chosen by the data
        assert engine.backend.disabled_reason is not None
    else:
        assert engine.backend.compiled.enabled, engine.backend.disabled_reason
    assert engine.backend.has_decode_kernels
    assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("config", [CacheConfig.paper(16), CacheConfig.h2o(16), CacheConfig.full()])
def test_compiled_layers_work_with_every_eviction_policy(config: CacheConfig) -> None:
    engine = Engine(tiny_model(), compile=False)
    expected = decode_logits(engine, config)
    engine.backend.start()

    assert torch.allclose(decode_logits(engine, config), expected, atol=1e-4)
    assert engine.backend.compiled.enabled


@pytest.mark.parametrize("bits", [4, 8])
def test_compiled_layers_work_with_quantized_weights(bits: int) -> None:
    model = tiny_model(hidden_size=128, intermediate_size=192)
    quantized_linear.quantize_model(model, bits, torch.float32)
    engine = Engine(model, compile=False)
    expected = decode_logits(engine)
    engine.backend.start()

    assert torch.allclose(decode_logits(engine), expected, atol=2e-2)  # inputs are rounded to 16 bits
    assert engine.backend.compiled.enabled, engine.backend.disabled_reason


def test_layers_of_equal_structure_are_compiled_once() -> None:
    engine = Engine(tiny_model("gemma3"), compile=True)

    assert engine.backend.compiled.enabled
    assert len(engine.backend.compiled.graphs) < len(engine.specs)


def test_layers_of_other_sizes_are_compiled_separately() -> None:
    model = tiny_model()
    wide = tiny_model(seed=1, intermediate_size=96).model.layers[1].mlp
    model.model.layers[1].mlp = wide
    engine = Engine(model, compile=False)
    expected = decode_logits(engine)
    engine.backend.start()

    assert torch.allclose(decode_logits(engine), expected, atol=1e-4)
    assert engine.backend.compiled.enabled


def test_compiling_starts_automatically_after_many_steps() -> None:
    engine = Engine(tiny_model())
    cache = engine.new_cache(CONFIG)
    params = SamplingParams(max_tokens=COMPILE_AFTER - 1, ignore_eos=True, lookup=False)

    list(engine.stream(cache, PROMPT, params))
    assert not engine.backend.compiled.enabled
    list(engine.stream(cache, PROMPT, SamplingParams(max_tokens=4, ignore_eos=True)))
    assert engine.backend.compiled.enabled


def test_compiling_can_be_turned_off() -> None:
    engine = Engine(tiny_model(), compile=False)
    cache = engine.new_cache(CONFIG)

    list(engine.stream(cache, PROMPT, SamplingParams(max_tokens=COMPILE_AFTER + 2, ignore_eos=True, lookup=False)))

    assert not engine.backend.compiled.enabled


def test_a_model_that_cannot_be_compiled_warns_once_and_decodes_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise UnsupportedModelError("no working C++ compiler")

    engine = Engine(tiny_model(), compile=False)
    expected = decode_logits(engine)
    monkeypatch.setattr("torch._inductor.compile", broken)
    monkeypatch.setattr(native, "build", broken)
    with caplog.at_level(logging.WARNING):
        engine.backend.start()
        logits = decode_logits(engine)

    assert torch.equal(logits, expected)
    assert engine.backend.disabled_reason is not None
    assert "no working C++ compiler" in caplog.text
    assert caplog.text.count("without compiled layers") == 1


def test_batches_are_not_changed_by_compiled_layers() -> None:
    engine = Engine(tiny_model(), compile=True)
    cache = engine.new_cache(CONFIG, rows=2)
    engine.read_batch(cache, [PROMPT, PROMPT[:5]])
    params = [SamplingParams(max_tokens=20, ignore_eos=True)] * 2

    answers = [list(row) for row in zip(*engine.decode(cache, params, [[], []]), strict=True)]

    for prompt, answer in zip([PROMPT, PROMPT[:5]], answers, strict=True):
        assert list(engine.stream(engine.new_cache(CONFIG), prompt, params[0])) == answer
