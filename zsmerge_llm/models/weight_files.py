"""The weights of a model folder by the headers of its safetensors files, and whether they can fit into a device.

Headers are a few kilobytes: no weight is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import LoadError
from zsmerge_llm.models.device import is_host, quantizations_on
from zsmerge_llm.models.device_memory import device_memory
from zsmerge_llm.models.footprint import BYTES_PER_WEIGHT, meta_model, weight_nbytes

if TYPE_CHECKING:
    import torch

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}
DTYPES |= {"F8_E4M3": "fp8", "F8_E5M2": "fp8"}
"""Names of dtypes in safetensors files."""
MAX_HEADER = 100 * 2**20
"""Bytes of the largest header that safetensors takes."""


@dataclass(frozen=True)
class StoredWeights:
    """What a folder's files hold: bytes and numbers of elements by dtype."""

    nbytes: dict[str, int]
    elements: dict[str, int]


def stored_weights(folder: Path) -> StoredWeights | None:
    """Return what the safetensors files of a model folder hold; None where it has none, or they cannot be read."""
    files = [file for file in weight_files(folder) if file.suffix == ".safetensors"]
    nbytes: dict[str, int] = {}
    elements: dict[str, int] = {}
    try:
        tensors = [tensor for file in files for tensor in _header(file).values()]
        for tensor in tensors:
            dtype = DTYPES.get(tensor["dtype"], tensor["dtype"].lower())
            start, end = tensor["data_offsets"]
            count = 1
            for size in tensor["shape"]:
                count *= size
            nbytes[dtype] = nbytes.get(dtype, 0) + end - start
            elements[dtype] = elements.get(dtype, 0) + count
    except (OSError, ValueError, KeyError, TypeError):  # a damaged file: loading it says so
        return None
    return StoredWeights(nbytes, elements) if nbytes else None


def check_fits(
    folder: Path, name: str, config: Any, device: torch.device, dtype: torch.dtype, quantization: str | None
) -> None:
    """Refuse weights that alone are more than all memory of a device, before any is read.

    Weights that are mapped from their file are never refused. What may be in doubt passes.

    Raises:
        LoadError: with the quantization that fits, if there is one.
    """
    stored, memory = stored_weights(folder), device_memory(device)
    if stored is None or memory is None or getattr(config, "quantization_config", None) is not None:
        return
    room = memory.total + memory.swap
    elements = dict(stored.elements)
    if is_host(device) and quantization is None:
        elements.pop(str(dtype).removeprefix("torch."), None)  # mapped, not copied
    count = sum(elements.values())
    if count * BYTES_PER_WEIGHT.get(quantization or "", dtype.itemsize) <= room:
        return
    # Files may hold more than the model takes (a vision tower, tied weights twice): only the model's own weights count.
    model = meta_model(config, dtype)
    share = count / sum(stored.elements.values())
    needed = sum(weight_nbytes(model, dtype, quantization).values()) * share
    if needed <= room:
        return
    options = {each: sum(weight_nbytes(model, dtype, each).values()) for each in quantizations_on(device)}
    fitting = [f"quantization={each!r} ({size / 2**30:.1f} GiB)" for each, size in options.items() if size <= room]
    remedy = " or ".join(fitting) if fitting else "a smaller model, or device_map='auto' to spread it"
    raise LoadError(
        f"The weights of {name} need {needed / 2**30:.1f} GiB and {device} has {room / 2**30:.1f} GiB in all: "
        f"use {remedy}."
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads a model folder's weights from; none where an index is damaged."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        if (folder / stem).is_file():
            return [folder / stem]
        if (folder / f"{stem}.index.json").is_file():
            try:
                index = json.loads((folder / f"{stem}.index.json").read_text(encoding="utf-8"))
                return [folder / name for name in sorted(set(index["weight_map"].values()))]
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
                return []
    return []


def _header(file: Path) -> dict[str, Any]:
    """Return a file's tensors by name, each with dtype, shape and data_offsets."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > MAX_HEADER:
            raise ValueError(f"{file} has no header of safetensors")
        tensors = json.loads(stream.read(size))
    tensors.pop("__metadata__", None)
    return tensors
