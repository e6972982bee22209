"""Choice of device, dtype, quantization backend and placement. torch is imported inside the functions only."""

from __future__ import annotations

import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import ConfigError, MissingDependencyError, shown

if TYPE_CHECKING:
    import torch

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
HOST = "cpu"
"""The device that every machine has, whatever else computes."""
QUANTIZATIONS = ("nf4", "int8", "int4", "fp8")
TORCHAO = {"int4": (8, 0), "fp8": (8, 9)}
"""What torchao quantizes to on a GPU, and the compute capability that its kernels need."""
_DEVICE = re.compile(r"(cpu|cuda|mps|xpu)(:\d+)?")


def validate_settings(dtype: Any, device: Any, device_map: Any, quantization: Any) -> None:
    """Refuse settings that cannot work on any machine, without importing torch.

    Raises:
        ConfigError: an unknown dtype, device or quantization, or `device` together with `device_map`.
    """
    known = isinstance(dtype, str) and (dtype == "auto" or dtype in DTYPES)
    if not known and type(dtype).__name__ != "dtype":
        raise ConfigError(f"dtype must be 'auto', {_either(DTYPES)} or a torch.dtype, not {shown(dtype)}.")
    named = isinstance(device, str) or type(device).__name__ == "device"
    if device != "auto" and not (named and _DEVICE.fullmatch(str(device))):
        raise ConfigError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:N', 'mps' or 'xpu', not {shown(device)}.")
    if device_map is not None and device != "auto":
        raise ConfigError("Give either device (one device for the whole model) or device_map, not both.")
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ConfigError(f"quantization must be None, {_either(QUANTIZATIONS)}, not {shown(quantization)}.")


def pick_device(device: Any) -> torch.device:
    """Return the device. `"auto"` is cuda, else mps, else cpu.

    Raises:
        ConfigError: a device that this machine or this build of torch does not have.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    chosen = torch.device(device)
    backend = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}.get(chosen.type)
    count = torch.cuda.device_count() if chosen.type == "cuda" else 1
    if (backend is not None and not backend.is_available()) or (chosen.index or 0) >= count:
        raise ConfigError(f"device={str(device)!r} is not available to torch here: use device='auto' or 'cpu'.")
    return chosen


def pick_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights.

    `"auto"` is bfloat16 if the device computes in it, else float16 on a GPU and float32 on a CPU.

    Raises:
        ConfigError: a torch dtype that is not a floating-point one of 16 or 32 bits.
    """
    import torch

    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, not {dtype}.")
        return dtype
    if dtype != "auto":
        return getattr(torch, DTYPES[dtype])
    if device.type == "cpu":
        return torch.bfloat16 if cpu_computes_in_bf16() else torch.float32
    return torch.bfloat16 if _gpu_computes_in_bf16(device) else torch.float16


def cpu_computes_in_bf16() -> bool:
    """Return whether this CPU has bfloat16 instructions (AVX512-BF16, AMX, Arm BF16). Emulation is slow."""
    import torch

    names = {"avx512_bf16", "amx_bf16", "bf16"}
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch >= 2.10
    if capabilities is not None:
        return any(capabilities().get(name, False) for name in names)
    if platform.system() == "Linux":  # "flags" on x86, "Features" on Arm
        return not names.isdisjoint(Path("/proc/cpuinfo").read_text(errors="replace").split())
    return False


def _gpu_computes_in_bf16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        # is_bf16_supported() also says yes to slow emulation on cards before Ampere
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


def packed_bits(quantization: str | None, device: torch.device, device_map: Any) -> int | None:
    """Return 4 or 8 if torch's packed kernels hold the weights (on one CPU), else None."""
    on_one_cpu = device.type == "cpu" and device_map is None
    return {"int4": 4, "int8": 8}.get(quantization or "") if on_one_cpu else None


def placement(device: torch.device, device_map: Any, quantizes: bool) -> Any:
    """Return the `device_map` for transformers; None on a CPU, where it maps the weight files into memory instead.

    bitsandbytes needs one on a CPU too.
    """
    if device_map is not None:
        return device_map
    return {"": device} if quantizes or device.type != "cpu" else None


def quantization_config(quantization: str | None, dtype: torch.dtype, device: torch.device, device_map: Any) -> Any:
    """Return the settings with which transformers quantizes while loading: of bitsandbytes or torchao; None for none.

    Raises:
        MissingDependencyError: the package is not installed.
        ConfigError: a device or dtype that it does not support.
    """
    if quantization is None:
        return None
    if quantization in TORCHAO:
        return _torchao_config(quantization, dtype, device, device_map)
    _need_package("bitsandbytes", quantization)
    if device.type == "mps":
        raise ConfigError("quantization needs a CPU or a CUDA device: set device='cpu' or quantization=None.")
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _torchao_config(quantization: str, dtype: torch.dtype, device: torch.device, device_map: Any) -> Any:
    """Return torchao's settings. "int4": weights in groups of 32, as on a CPU; "fp8": weights and inputs, by row.

    Raises:
        MissingDependencyError, ConfigError: as `quantization_config`.
    """
    import torch

    _check_torchao_device(quantization, device, device_map)
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"quantization={quantization!r} on a GPU computes in bfloat16, not {dtype}: set dtype='auto'."
        )
    _need_package("torchao", quantization)
    from transformers import TorchAoConfig

    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int4WeightOnlyConfig, PerRow

        # set_inductor_config would change TorchInductor's settings and float32's precision for the whole process
        if quantization == "fp8":
            return TorchAoConfig(
                Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
            )
        packing: Any = "tile_packed_to_4d"
        return TorchAoConfig(
            Int4WeightOnlyConfig(group_size=32, int4_packing_format=packing, set_inductor_config=False)
        )
    except (ImportError, TypeError, ValueError) as error:  # a version that transformers or these settings do not take
        raise MissingDependencyError(
            f"quantization={quantization!r} needs torchao 0.15 or newer ({error}): pip install --upgrade torchao"
        ) from error


def _check_torchao_device(quantization: str, device: torch.device, device_map: Any) -> None:
    import torch

    needed = TORCHAO[quantization]
    instead = "use 'int8' or 'int4' on device='cpu'" if quantization == "fp8" else "set device='cpu', or use 'nf4'"
    if device.type != "cuda" or torch.version.hip is not None:
        here = "spread by device_map without one" if device_map is not None else f"on {device.type}"
        one_cpu = "" if quantization == "fp8" else "one CPU or "
        raise ConfigError(f"quantization={quantization!r} needs {one_cpu}an NVIDIA GPU, not {here}: {instead}.")
    if isinstance(device_map, dict) and {"cpu", "disk"} & {str(place) for place in device_map.values()}:
        raise ConfigError(
            f"quantization={quantization!r} needs all layers on GPUs: leave cpu and disk out of device_map."
        )
    devices = [device] if device_map is None else [torch.device("cuda", at) for at in range(torch.cuda.device_count())]
    for each in devices:
        if (found := torch.cuda.get_device_capability(each)) < needed:
            raise ConfigError(
                f"quantization={quantization!r} needs a GPU of compute capability {needed[0]}.{needed[1]} or more, and "
                f"{each} has {found[0]}.{found[1]}: use 'nf4' or 'int8'."
            )


def _need_package(package: str, quantization: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingDependencyError(f"quantization={quantization!r} needs {package}: pip install {package}")


def planned_placement(device: Any, dtype: Any, elsewhere: bool) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of weights that are not loaded here.

    Args:
        elsewhere: plan for another machine: a device that this one lacks is taken too, and said to compute in bfloat16.

    Raises:
        ConfigError: as `pick_device` and `pick_dtype`.
    """
    import torch

    try:
        target = pick_device(device)
    except ConfigError:
        if not elsewhere:
            raise
        target = torch.device(device)
        return target, pick_dtype("bfloat16" if dtype == "auto" else dtype, target)
    return target, pick_dtype(dtype, target)


def is_host(device: torch.device) -> bool:
    """Return whether a device computes in the host's memory, on its processor."""
    return device.type == HOST


def accelerator_memory(device: torch.device) -> tuple[int, int] | None:
    """Return the free and the total bytes of a device other than the host; None where it cannot be told."""
    import torch

    try:
        if device.type == "mps":
            total = torch.mps.recommended_max_memory()
            return total - torch.mps.driver_allocated_memory(), total
        backend = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
        return None if backend is None or not backend.is_available() else backend.mem_get_info(device)
    except (RuntimeError, AttributeError, AssertionError):  # no such device here, or an older torch
        return None


def quantizations_on(device: torch.device) -> tuple[str, ...]:
    """Return the quantizations that a device takes, the most exact first."""
    return {HOST: ("int8", "int4"), "cuda": ("int8", "fp8", "int4", "nf4"), "xpu": ("int8", "nf4")}.get(device.type, ())


def _either(names: Any) -> str:
    *others, last = (repr(name) for name in names)
    return f"{', '.join(others)} or {last}" if others else last
