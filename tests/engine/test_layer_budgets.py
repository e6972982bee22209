"""Layer budgets: measured by a retrieval task once for each model, stored on disk, used for texts that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.support.chat import LARGE_CACHE, SHORT, SMALL_CACHE, make_llm, record_passes
from tests.support.templates import template
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.attention.passes import PASSAGE_TOKENS
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.layer_budgets import FORMAT, STEPS, LayerBudgets, allocate, curve, measure_retrieval
from zsmerge_llm.retrieval.calibration import calibration

LONG = "The cat of the ship is called Bishop, and the captain is called Stone. " * 20


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm(cache=SMALL_CACHE)


def layer_budgets(llm: LLM, path: Path | None = None, progress: mock.Mock | None = None) -> LayerBudgets:
    return LayerBudgets(llm.engine, lambda: calibration(template("smollm2")), path, progress)


def test_layers_with_late_gains_get_more_slots() -> None:
    fraction = torch.linspace(0, 1, STEPS + 1)
    linear, late, early = fraction, fraction**4, fraction.clamp(max=0.1) * 10
    weights = allocate(torch.stack([early, late, early, linear]))
    assert sum(weights) / 4 == pytest.approx(1)
    assert max(weights) == max(weights[1], weights[3])
    assert min(weights) >= 0.4


def test_a_little_noise_changes_no_weight_much() -> None:
    """Where gains hardly decrease, one budget alone would give the rest to the layer of the slightly larger gain."""
    torch.manual_seed(0)
    fraction = torch.linspace(0, 1, STEPS + 1)
    falling = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2])[:, None]
    curves = 1 - (1 - fraction) ** (1 + 3 * (1 - falling))
    weights = allocate(curves)
    for _ in range(20):
        noise = (1 + 0.02 * torch.rand(8, STEPS)).mul(curves.diff(dim=-1)).cumsum(-1)
        noisy = allocate(torch.cat([torch.zeros(8, 1), noise], -1))
        assert max(abs(a - b) for a, b in zip(weights, noisy, strict=True)) < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_curves_that_are_not_finite_or_zero_give_uniform_weights(bad: float) -> None:
    curves = torch.linspace(0, 1, STEPS + 1).repeat(3, 1)
    curves[1] = bad
    assert allocate(curves) == [1.0, 1.0, 1.0]


def test_a_curve_is_the_attention_that_the_highest_scores_would_keep() -> None:
    tokens = 40
    needed = torch.zeros(1, 1, 1, tokens)
    needed[..., 0], needed[..., 30] = 0.5, 0.5  # a sink, which does not count, and one token
    right, wrong = torch.zeros(1, 1, 1, tokens), torch.zeros(1, 1, 1, tokens)
    right[..., 30], wrong[..., 20:30] = 1.0, 1.0
    assert curve(right, needed.clone())[3].item() == pytest.approx(0.25)
    assert curve(wrong, needed.clone())[3].item() == 0
    assert curve(wrong, needed.clone())[STEPS].item() == pytest.approx(0.25)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2-softcap", "gpt_oss-sinks", "gpt_neox"])
def test_models_of_random_weights_have_layer_budgets(family: str) -> None:
    chat_template = template("smollm2")
    model = tiny_model(family, vocab=len(chat_template.tokenizer))
    engine = Engine(model)
    full = sum(spec.window is None for spec in engine.specs)
    curves = measure_retrieval(engine, calibration(chat_template))
    assert curves.shape == (full, STEPS + 1)
    assert (curves.diff(dim=-1) >= 0).all()
    weights = LayerBudgets(engine, lambda: calibration(chat_template)).weights
    assert len(weights) == full
    assert sum(weights) / full == pytest.approx(1)
    engine.new_cache(CacheConfig(layer_budgets=weights))


def test_models_of_short_windows_or_without_full_attention_are_not_measured() -> None:
    chat_template = template("smollm2")
    for family, window, weights in (("llama", 512, (1.0, 1.0)), ("mistral-sliding", 4096, ())):
        model = tiny_model(family, vocab=len(chat_template.tokenizer))
        model.config.max_position_embeddings = window
        engine = Engine(model)
        with record_passes() as passes:
            assert LayerBudgets(engine, lambda: calibration(chat_template)).weights == weights
        assert not passes
        assert LayerBudgets(engine, lambda: calibration(chat_template)).document_config(10**6).slots == 1024


def test_weights_are_measured_once_and_stored_for_the_next_process(llm: LLM, tmp_path: Path) -> None:
    path, progress = tmp_path / "budgets" / "x.json", mock.Mock()
    first = layer_budgets(llm, path, progress)
    weights = first.weights
    with record_passes() as passes:
        assert first.weights == weights
        assert layer_budgets(llm, path).weights == weights
    assert not passes
    progress.assert_called_once()
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 1}',
        '{"format": 0, "shares": [1.0, 1.0]}',
        '{"format": 1, "shares": [1.0, 1.0, 1.0]}',
        '{"format": 1, "shares": [1.0, NaN]}',
        '{"format": 1, "shares": [1.0, 7.0]}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_replaced(llm: LLM, tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    weights = layer_budgets(llm, path).weights
    assert json.loads(path.read_text()) == {"format": FORMAT, "shares": list(weights)}


def test_weights_are_measured_where_their_folder_cannot_be_written(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(layer_budgets(llm, tmp_path / "file" / "x.json").weights) == 2


def test_a_document_that_does_not_fit_gets_the_layer_budgets(llm: LLM) -> None:
    document = llm.read_document(LONG, name="long")
    assert document.cache.config == SMALL_CACHE.query_agnostic().replace(layer_budgets=layer_budgets(llm).weights)
    answer = llm.chat("Who is the captain?", session=document, sampling=SHORT)
    assert answer.usage.cached_tokens > 0


def test_a_document_that_fits_is_kept_whole(llm: LLM) -> None:
    document = llm.read_document("The cat is called Bishop.", name="short")
    assert document.cache.config == SMALL_CACHE.query_agnostic()
    assert document.cache.dropped_tokens == 0


@pytest.mark.parametrize(
    "cache",
    [
        LARGE_CACHE,
        CacheConfig.h2o(96),
        CacheConfig.streaming(96),
        CacheConfig.full(),
        SMALL_CACHE.replace(layer_budgets=(0.9, 1.1)),
    ],
)
def test_other_policies_and_budgets_of_the_users_own_are_left_alone(cache: CacheConfig) -> None:
    llm = make_llm(cache=cache)
    with mock.patch("zsmerge_llm.engine.layer_budgets.measure_retrieval", side_effect=AssertionError):
        assert llm.read_document(LONG).cache.config.layer_budgets == cache.layer_budgets


def test_a_prompt_with_its_question_leaves_every_layer_room_for_a_passage(llm: LLM) -> None:
    engine, chat_template = Engine(llm.engine.model, CacheConfig(slots=256)), template("smollm2")
    budgets = LayerBudgets(engine, lambda: calibration(chat_template))
    budgets._weights = (0.1, 1.9)
    config = budgets.prompt_config(1000)
    assert min(config.layer_slots(2)) >= 4 + 64 + PASSAGE_TOKENS
    assert sum(config.layer_slots(2)) == 512
    assert budgets.document_config(1000).layer_budgets == (0.1, 1.9)
    assert budgets.prompt_config(256).layer_budgets is None
