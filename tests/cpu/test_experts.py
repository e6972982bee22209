"""Mixtures of experts decode as transformers wrote them, alone and in batches, and one line says so."""

from __future__ import annotations

import logging

import pytest
import torch

from tests.families.checks import tiny_model, tokens
from tests.families.tiny_configs import tiny_config
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.cpu.decoder_layers import decoder_layers
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import UnsupportedModelError

EXPERTS = [
    "aria_text",
    "deepseek_v3",
    "ernie4_5_moe",
    "gpt_oss",
    "granitemoe",
    "jetmoe",
    "mixtral",
    "olmoe",
    "qwen3_moe",
]


@pytest.mark.parametrize("family", EXPERTS)
def test_layers_with_experts_are_not_compiled_whatever_their_config_calls_them(family: str) -> None:
    model = tiny_model(tiny_config(family))
    with pytest.raises(UnsupportedModelError, match="experts"):
        decoder_layers(model, model.config.num_hidden_layers)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_that_should_be_compiled_runs_eagerly_and_says_why_once(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(tiny_config(family))
    with torch.inference_mode():
        expected = model(torch.tensor([tokens(30)])).logits[0, -1].float()
    with caplog.at_level(logging.WARNING):
        engine = Engine(model, CacheConfig.full(), compile=True)
        cache = engine.new_cache(rows=2)
        engine.read_batch(cache, [tokens(29), tokens(12)])
        together = engine.read_batch(cache, [tokens(30)[-1:], [5]])

    torch.testing.assert_close(together[0], expected, atol=1e-4, rtol=1e-4)
    assert engine.backend.decode_step == "eager"
    assert [record.message for record in caplog.records if "without compiled layers" in record.message] == [
        "Decoding goes on without compiled layers: UnsupportedModelError: Layers whose experts are chosen by the data "
        "are not compiled."
    ]
