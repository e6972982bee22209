"""`zsmerge-llm train-gate`: a gate from text files, which later runs use."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.templates import FOLDER, template
from tests.support.texts import STORY
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM
from zsmerge_llm.cli.app import app


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZSMERGE_CACHE_DIR", str(tmp_path / "cache"))
    tokenizer = copy.deepcopy(template("smollm2").tokenizer)
    tokenizer.chat_template = (FOLDER / "smollm2.jinja").read_text(encoding="utf-8")
    tiny_model(vocab=len(tokenizer)).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    (tmp_path / "story.txt").write_text(STORY * 150, encoding="utf-8")
    return tmp_path


def run(place: Path, *options: str) -> Result:
    model = ("--model", str(place / "tiny"), "--device", "cpu")
    return CliRunner().invoke(app, ["train-gate", str(place / "story.txt"), *model, *options])


def test_a_gate_is_trained_and_used_by_the_next_model_that_is_loaded(place: Path) -> None:
    result = run(place, "--tokens", "3000")
    assert result.exit_code == 0, result.output
    assert "Trained on" in result.output
    engine = LLM(str(place / "tiny"), device="cpu", compile=False).engine
    assert all(spec.gate is not None for spec in engine.specs)


def test_too_few_tokens_are_an_error_and_leave_no_gate(place: Path) -> None:
    result = run(place, "--tokens", "10")
    assert result.exit_code == 2
    assert "give more text" in result.output
    assert not list(place.glob("cache/**/*.safetensors"))
