"""The profile: found by a recital, once for each model, kept on disk, used for documents that do not fit."""

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


def profile(llm: LLM, path: Path | None = None, say: mock.Mock | None = None) -> LayerBudgets:
    return LayerBudgets(llm.engine, lambda: calibration(template("smollm2")), path, say)


def test_layers_that_look_things_up_get_more() -> None:
    fraction = torch.linspace(0, 1, STEPS + 1)
    steady, sudden, quick = fraction, fraction**4, fraction.clamp(max=0.1) * 10
    shares = allocate(torch.stack([quick, sudden, quick, steady]))
    assert sum(shares) / 4 == pytest.approx(1)
    assert max(shares) == max(shares[1], shares[3])
    assert min(shares) >= 0.4


def test_a_little_noise_moves_no_layer_far() -> None:
    """Of layers whose gain hardly falls, one budget alone gives what is left to whichever is ahead by a hair."""
    torch.manual_seed(0)
    fraction = torch.linspace(0, 1, STEPS + 1)
    falling = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.5, 0.4, 0.3, 0.2])[:, None]
    curves = 1 - (1 - fraction) ** (1 + 3 * (1 - falling))
    shares = allocate(curves)
    for _ in range(20):
        noise = (1 + 0.02 * torch.rand(8, STEPS)).mul(curves.diff(dim=-1)).cumsum(-1)
        moved = allocate(torch.cat([torch.zeros(8, 1), noise], -1))
        assert max(abs(a - b) for a, b in zip(shares, moved, strict=True)) < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_without_figures_all_layers_get_the_same(bad: float) -> None:
    curves = torch.linspace(0, 1, STEPS + 1).repeat(3, 1)
    curves[1] = bad
    assert allocate(curves) == [1.0, 1.0, 1.0]


def test_a_curve_counts_what_a_guess_would_keep() -> None:
    tokens = 40
    needed = torch.zeros(1, 1, 1, tokens)
    needed[..., 0], needed[..., 30] = 0.5, 0.5  # a sink, which does not count, and one token
    right, wrong = torch.zeros(1, 1, 1, tokens), torch.zeros(1, 1, 1, tokens)
    right[..., 30], wrong[..., 20:30] = 1.0, 1.0
    assert curve(right, needed.clone())[3].item() == pytest.approx(0.25)
    assert curve(wrong, needed.clone())[3].item() == 0
    assert curve(wrong, needed.clone())[STEPS].item() == pytest.approx(0.25)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2-softcap", "gpt_oss-sinks", "gpt_neox"])
def test_random_weights_have_a_profile_too(family: str) -> None:
    words = template("smollm2")
    model = tiny_model(family, vocab=len(words.tokenizer))
    engine = Engine(model)
    full = sum(spec.window is None for spec in engine.specs)
    curves = measure_retrieval(engine, calibration(words))
    assert curves.shape == (full, STEPS + 1)
    assert (curves.diff(dim=-1) >= 0).all()
    shares = LayerBudgets(engine, lambda: calibration(words)).weights
    assert len(shares) == full
    assert sum(shares) / full == pytest.approx(1)
    engine.new_cache(CacheConfig(layer_budgets=shares))


def test_models_without_room_or_without_full_attention_recite_nothing() -> None:
    words = template("smollm2")
    for family, window, shares in (("llama", 512, (1.0, 1.0)), ("mistral-sliding", 4096, ())):
        model = tiny_model(family, vocab=len(words.tokenizer))
        model.config.max_position_embeddings = window
        engine = Engine(model)
        with record_passes() as passes:
            assert LayerBudgets(engine, lambda: calibration(words)).weights == shares
        assert not passes
        assert LayerBudgets(engine, lambda: calibration(words)).document_config(10**6).slots == 1024


def test_it_is_found_once_and_kept_for_the_next_process(llm: LLM, tmp_path: Path) -> None:
    path, say = tmp_path / "profiles" / "x.json", mock.Mock()
    first = profile(llm, path, say)
    shares = first.weights
    with record_passes() as passes:
        assert first.weights == shares
        assert profile(llm, path).weights == shares
    assert not passes
    say.assert_called_once()
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
def test_a_damaged_file_is_made_again(llm: LLM, tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    shares = profile(llm, path).weights
    assert json.loads(path.read_text()) == {"format": FORMAT, "shares": list(shares)}


def test_a_folder_that_cannot_be_written_is_no_obstacle(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(profile(llm, tmp_path / "file" / "x.json").weights) == 2


def test_a_document_that_does_not_fit_is_kept_by_the_profile(llm: LLM) -> None:
    document = llm.read_document(LONG, name="long")
    assert document.cache.config == SMALL_CACHE.query_agnostic().replace(layer_budgets=profile(llm).weights)
    answer = llm.chat("Who is the captain?", session=document, sampling=SHORT)
    assert answer.usage.cached_tokens > 0


def test_a_document_that_fits_loses_nothing(llm: LLM) -> None:
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
def test_a_rule_or_shares_of_the_users_own_are_left_alone(cache: CacheConfig) -> None:
    llm = make_llm(cache=cache)
    with mock.patch("zsmerge_llm.engine.layer_budgets.measure_retrieval", side_effect=AssertionError):
        assert llm.read_document(LONG).cache.config.layer_budgets == cache.layer_budgets


def test_a_prompt_with_its_question_leaves_every_layer_room_for_a_passage(llm: LLM) -> None:
    engine, words = Engine(llm.engine.model, CacheConfig(slots=256)), template("smollm2")
    uneven = LayerBudgets(engine, lambda: calibration(words))
    uneven._weights = (0.1, 1.9)
    config = uneven.prompt_config(1000)
    assert min(config.layer_slots(2)) >= 4 + 64 + PASSAGE_TOKENS
    assert sum(config.layer_slots(2)) == 512
    assert uneven.document_config(1000).layer_budgets == (0.1, 1.9)
    assert uneven.prompt_config(256).layer_budgets is None
