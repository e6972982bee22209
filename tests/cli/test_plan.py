"""`zsmerge-llm plan`: the table, JSON, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.support.tiny_models import tiny_model
from zsmerge_llm.cli.app import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def run(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["plan", "--model", str(folder), "--device", "cpu", "--slots", "256", *options])


def test_it_prints_a_table(folder: Path) -> None:
    result = run(folder, "--sessions", "3")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    labels = ["weights", "runtime", "cache", "sessions", "turn", "workspace", "total", "available", "headroom"]
    assert [line.split()[0] for line in lines[1:-1]] == labels
    assert lines[-1].startswith("decode step")


def test_what_does_not_fit_exits_with_1_and_the_remedy(folder: Path) -> None:
    result = run(folder, "--sessions", "100000", "--memory", "1GiB")
    assert result.exit_code == 1
    assert "sessions of these slots" in result.stdout


def test_json_holds_the_remedy_and_the_exit_code_is_the_same(folder: Path) -> None:
    result = run(folder, "--sessions", "100000", "--memory", "1GiB", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["fits"] is False
    assert "What fits" in found["remedy"]


def test_a_setting_that_cannot_work_exits_with_2(folder: Path) -> None:
    assert run(folder, "--slots", "10").exit_code == 2
    assert run(folder, "--memory", "much").exit_code == 2
