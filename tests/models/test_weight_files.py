"""Weights that cannot fit into a device are refused before any is read, and no others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.models.tiny_folders import load_tiny
from tests.support.tiny_models import tiny_model
from zsmerge_llm.errors import LoadError
from zsmerge_llm.models import device_memory, loader, weight_files
from zsmerge_llm.models.device_memory import DeviceMemory, host_memory
from zsmerge_llm.models.weight_files import StoredWeights, check_fits, stored_weights

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(vocab=4096).save_pretrained(tmp_path)
    return tmp_path


def with_memory(patch: pytest.MonkeyPatch, total: int, swap: int = 0) -> None:
    patch.setattr(weight_files, "device_memory", lambda device: DeviceMemory(total, total, swap))


def check(folder: Path, device: torch.device, dtype: torch.dtype, quantization: str | None = None) -> None:
    check_fits(folder, "tiny", loader.read_config(folder, "tiny"), device, dtype, quantization)


def test_headers_tell_bytes_and_elements_by_dtype(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(2, 2)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert stored_weights(tmp_path) == StoredWeights({"float32": 64, "bfloat16": 10}, {"float32": 16, "bfloat16": 5})


def test_shards_are_summed_up(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = stored_weights(tmp_path)
    assert found is not None
    assert found.nbytes == {"float32": sum(weight.nbytes for weight in model.parameters())}


def test_a_damaged_file_is_not_judged(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert stored_weights(tmp_path) is None


def test_weights_beyond_a_gpus_memory_are_refused_with_the_quantization_that_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_memory(monkeypatch, 900_000)
    check(folder, CUDA, torch.float16)
    with_memory(monkeypatch, 560_000)
    with pytest.raises(LoadError, match=r"tiny need .* use quantization='int8' .* or quantization='nf4'"):
        check(folder, CUDA, torch.float16)
    with_memory(monkeypatch, 1000)
    with pytest.raises(LoadError, match="a smaller model"):
        check(folder, CUDA, torch.float16)


def test_weights_that_stay_in_their_file_are_never_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_memory(monkeypatch, 1000)
    check(folder, CPU, torch.float32)
    with pytest.raises(LoadError):
        check(folder, CPU, torch.bfloat16)
    with_memory(monkeypatch, 1000, swap=10**6)
    check(folder, CPU, torch.bfloat16)


def test_tensors_that_the_model_does_not_take_are_not_held_against_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    save_file({**state, "vision_tower.weight": torch.zeros(10**6)}, folder / "model.safetensors")
    with_memory(monkeypatch, 1_500_000)
    check(folder, CUDA, torch.float32)


def test_the_loader_refuses_before_it_reads_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("weights were read")

    with_memory(monkeypatch, 1000)
    monkeypatch.setattr(loader, "_read_weights", never)
    with pytest.raises(LoadError, match="GiB in all"):
        load_tiny(folder, dtype="bfloat16")
    with pytest.raises(AssertionError, match="weights were read"):
        load_tiny(folder, dtype="float32")


def test_a_containers_limit_counts_before_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8000 kB\nMemFree: 1000 kB\nMemAvailable: 5000 kB\nSwapTotal: 100 kB\n")
    monkeypatch.setattr(device_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(device_memory, "CGROUP", tmp_path)
    assert host_memory() == DeviceMemory(8000 * 1024, 5000 * 1024, 100 * 1024)
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory() == DeviceMemory(8000 * 1024, 5000 * 1024, 100 * 1024)
    (tmp_path / "memory.max").write_text("4096000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 2000000\n")
    assert host_memory() == DeviceMemory(4_096_000, 3_096_000, 100 * 1024)
