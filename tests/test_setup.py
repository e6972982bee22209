"""What a fresh clone is installed by: the Makefile's commands and the three distributions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zsmerge_llm

ROOT = Path(__file__).parents[1]
INTEGRATIONS = ("integrations/langchain-zsmerge", "integrations/llama-index-llms-zsmerge")


def dry_run(target: str, folder: Path, *settings: str) -> str:
    """What `make` would run for a target in a fresh environment."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    command = ["make", "--dry-run", target, f"VENV={folder / 'venv'}", *settings]
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "TORCH", "PYTEST", "PYTHON")  # of a `make test` that runs this
    clean = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("target", "ends"), [("demo", "zsmerge-llm demo"), ("test", "python -m pytest")])
def test_a_command_makes_the_environment_installs_everything_and_runs(target: str, ends: str, tmp_path: Path) -> None:
    printed = dry_run(target, tmp_path)
    assert "-m venv" in printed
    assert all(f"-e {project}" in printed for project in INTEGRATIONS)
    assert printed.strip().endswith(ends)


def test_a_torch_build_is_installed_first(tmp_path: Path) -> None:
    lines = [line for line in dry_run("demo", tmp_path, "TORCH=torch==2.13.0").splitlines() if "pip install" in line]
    assert lines[0].endswith("torch==2.13.0")
    assert "-e ." in lines[1]


def test_the_lowest_versions_are_read_from_the_projects(tmp_path: Path) -> None:
    printed = dry_run("test-floors", tmp_path)
    command = next(line for line in printed.splitlines() if line.startswith("grep"))
    listed = subprocess.run(
        ["sh", "-c", command.rpartition(">")[0]], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"torch", "transformers", "langchain-core", "llama-index-core"} <= {each.split("==")[0] for each in listed}
    assert len(listed) == len({each.split("==")[0] for each in listed}), "two projects have different lowest versions"
    other = dry_run("test-floors", tmp_path, "TORCH=some-torch.whl")
    assert "pip install --quiet some-torch.whl" in other
    assert "grep -v '^torch=='" in other


def test_the_distributions_have_one_version() -> None:
    for folder in (".", *INTEGRATIONS):
        text = (ROOT / folder / "pyproject.toml").read_text(encoding="utf-8")
        assert re.search(r'^version = "(.+)"$', text, re.M)[1] == zsmerge_llm.__version__  # type: ignore[index]


def test_the_roots_extras_name_no_sibling() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text[text.index("[project.optional-dependencies]") : text.index("[project.scripts]")]
    assert "zsmerge" not in extras  # they are not published: pip would look for them in the public index


@pytest.mark.slow
def test_no_test_begins_behind_the_time_limit() -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/test_setup.py", "-k", "one_version"]
    skipped, passed = (
        subprocess.run([*command, "--time-limit", limit], cwd=ROOT, capture_output=True, text=True).stdout
        for limit in ("0", "9")
    )
    assert "1 skipped" in skipped
    assert "no time is left" in skipped
    assert "1 passed" in passed
