"""Conversions that were interrupted: what is half made is made again, and what is left behind is deleted."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.gguf_writer import random_model, write_gguf
from zsmerge_llm.models import gguf, hub
from zsmerge_llm.models.converted import is_complete
from zsmerge_llm.models.file_locks import locked
from zsmerge_llm.models.loader import load_tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", random_model("llama"), "llama")


@pytest.fixture(scope="module")
def whole(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf.convert_once(file, tmp_path_factory.mktemp("whole") / "tiny", lambda step: None)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    *((name, damage) for name in ("model.safetensors", "config.json", "tokenizer.json") for damage in (cut, zero)),
    *((name, Path.unlink) for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_half_made_folder_is_made_again(
    file: Path, whole: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    target = tmp_path / "tiny"
    shutil.copytree(whole, target)
    assert is_complete(target)
    damage(target / name)
    assert not is_complete(target)
    steps: list[str] = []
    assert gguf.convert_once(file, target, steps.append) == target

    assert steps == ["Converting GGUF (once)"]
    assert is_complete(target)
    assert load_tokenizer(str(target)).encode("a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
    gguf.convert_once(file, target, steps.append)
    assert len(steps) == 1


def test_leftovers_of_killed_conversions_are_deleted_and_not_those_that_are_being_made(
    file: Path, tmp_path: Path
) -> None:
    for name in (".partial-dead", ".partial-alive"):
        (tmp_path / name / "model").mkdir(parents=True)
        os.utime(tmp_path / name, (1, 1))
    with locked(tmp_path / ".partial-alive"):
        gguf.convert_once(file, tmp_path / "tiny", lambda step: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-alive", "tiny"]


def test_a_half_made_folder_of_a_built_in_model_does_not_stand_for_the_model(tmp_path: Path) -> None:
    builtin = hub.BUILTINS["smollm2"]
    converted = hub._converted_folder(builtin, tmp_path)
    converted.mkdir(parents=True)
    (converted / "config.json").write_text("{}")
    assert hub.builtin_local(builtin, tmp_path) != converted
