"""`quantization="int4"` and `"fp8"` on a GPU: settings of torchao, or a refusal that names the remedy.

No GPU computes here: the machine is pretended, and only the decisions are tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from zsmerge_llm.errors import ConfigError, MissingDependencyError
from zsmerge_llm.models.device import packed_bits, quantization_config
from zsmerge_llm.models.loader import load

GPU = torch.device("cuda")
BF16 = torch.bfloat16


def pretend(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """Let torch report GPUs of these compute capabilities."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[_index(device)])


def _index(device: Any) -> int:
    return 0 if device is None else torch.device(device).index or 0


@pytest.mark.parametrize(
    ("quantization", "capability", "reason"),
    [
        ("int4", (7, 5), r"'int4' needs a GPU of compute capability 8\.0 or more, and cuda has 7\.5: use 'nf4'"),
        ("fp8", (8, 0), r"'fp8' needs a GPU of compute capability 8\.9 or more, and cuda has 8\.0: use 'nf4'"),
    ],
)
def test_a_gpu_that_cannot_multiply_them_is_refused(
    monkeypatch: pytest.MonkeyPatch, quantization: str, capability: tuple[int, int], reason: str
) -> None:
    pretend(monkeypatch, capability)
    with pytest.raises(ConfigError, match=reason):
        quantization_config(quantization, BF16, GPU, None)


def test_every_gpu_that_a_device_map_may_use_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), (8, 0))
    with pytest.raises(ConfigError, match=r"cuda:1 has 8\.0"):
        quantization_config("fp8", BF16, GPU, "auto")


@pytest.mark.parametrize("place", ["cpu", "disk", torch.device("cpu")])
def test_layers_outside_the_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, place: Any) -> None:
    pretend(monkeypatch, (9, 0))
    with pytest.raises(ConfigError, match="leave cpu and disk out of device_map"):
        quantization_config("int4", BF16, GPU, {"model": 0, "lm_head": place})


@pytest.mark.parametrize("quantization", ["int4", "fp8"])
def test_another_dtype_than_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch, quantization: str) -> None:
    pretend(monkeypatch, (9, 0))
    with pytest.raises(ConfigError, match=r"bfloat16, not torch\.float16: set dtype='auto'"):
        quantization_config(quantization, torch.float16, GPU, None)


@pytest.mark.parametrize("quantization", ["int4", "fp8"])
def test_a_missing_torchao_is_named(monkeypatch: pytest.MonkeyPatch, quantization: str) -> None:
    pretend(monkeypatch, (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=f"'{quantization}' needs torchao: pip install torchao"):
        quantization_config(quantization, BF16, GPU, None)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization": "fp8", "device": "cpu"}, r"'fp8' needs an NVIDIA GPU, not on cpu: use 'int8' or 'int4'"),
        ({"quantization": "fp8", "device_map": {"": "cpu"}}, r"'fp8' needs an NVIDIA GPU, not spread by device_map"),
        ({"quantization": "int4", "device_map": {"": "cpu"}}, r"'int4' needs one CPU or an NVIDIA GPU.*device='cpu'"),
    ],
)
def test_a_cpu_is_refused_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], reason: str
) -> None:
    if torch.cuda.is_available():
        pytest.skip("device='auto' is this machine's GPU")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=reason):
        load(folder, **settings)


def test_the_cpu_keeps_its_own_kernels() -> None:
    cpu = torch.device("cpu")
    assert [packed_bits(name, cpu, None) for name in ("int4", "int8", "nf4", "fp8", None)] == [4, 8, None, None, None]
    assert packed_bits("int4", GPU, None) is None


def test_the_settings_for_transformers_say_what_torchao_is_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    pretend(monkeypatch, (9, 0))
    int4 = quantization_config("int4", BF16, GPU, None).quant_type
    assert (int4.group_size, int4.int4_packing_format) == (32, "tile_packed_to_4d")
    fp8 = quantization_config("fp8", BF16, GPU, None).quant_type
    assert type(fp8).__name__ == "Float8DynamicActivationFloat8WeightConfig"
    assert {type(each).__name__ for each in fp8.granularity} == {"PerRow"}
    assert not any(each.set_inductor_config for each in (int4, fp8))
