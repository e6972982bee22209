"""The weights of a model folder by the headers of its safetensors files, and whether they can fit into a device.

Headers are a few kilobytes: no weight is read.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import CorruptModelError, LoadError
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
MAX_PACKED = 16
"""Weights that one element of a quantized checkpoint holds at most."""
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
"""Settings of a config that are dimensions of weights."""


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
    except (OSError, ValueError):  # a damaged file: loading it says so
        return None
    for tensor in tensors:
        dtype = DTYPES.get(tensor["dtype"], tensor["dtype"].lower())
        start, end = tensor["data_offsets"]
        nbytes[dtype] = nbytes.get(dtype, 0) + end - start
        elements[dtype] = elements.get(dtype, 0) + prod(tensor["shape"])
    return StoredWeights(nbytes, elements) if nbytes else None


def check_claims(folder: Path, name: str, config: Any) -> None:
    """Refuse a config that claims a larger model than the folder's files hold, before memory is taken for it.

    Raises:
        CorruptModelError: it names the setting.
    """
    own = config.get_text_config()
    try:
        tensors = [tensor for file in weight_files(folder) for tensor in _header(file).values()]
    except (OSError, ValueError):  # loading it says so
        return
    if not tensors:
        return
    largest = MAX_PACKED * max(prod(tensor["shape"]) for tensor in tensors)
    limits = {"num_hidden_layers": len(tensors), **dict.fromkeys(WIDTHS, largest)}
    for setting, limit in limits.items():
        for size in _sizes(own, setting):
            if size is not None and not (type(size) is int and 0 <= size <= limit):
                raise CorruptModelError(f"{setting} in the config.json of {name} ({size!r}) does not fit the weights.")
    if own.vocab_size * own.hidden_size > largest:
        raise CorruptModelError(f"The embeddings that the config.json of {name} describes are not in its weights.")


def _sizes(config: Any, setting: str) -> list[Any]:
    """Return a setting's values: one, or one for each layer of a model whose layers differ (Gemma 4's heads)."""
    if setting == "num_hidden_layers" or not getattr(config, "is_heterogeneous", False):
        return [getattr(config, setting, None)]
    return [getattr(layer, setting, None) for layer in config.per_layer_config]


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
    """Return a file's tensors by name, each with dtype, shape and data_offsets.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no safetensors file, or its header does not fit it.
    """
    nbytes = file.stat().st_size
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > min(MAX_HEADER, nbytes - 8):
            raise ValueError(f"{file} has no header of safetensors")
        try:
            tensors = json.loads(stream.read(size))
        except RecursionError as error:
            raise ValueError(f"The header of {file} is nested too deep") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} has no header of safetensors")
    tensors.pop("__metadata__", None)
    if not all(_is_tensor(each, nbytes - 8 - size) for each in tensors.values()):
        raise ValueError(f"The header of {file} does not fit it")
    return tensors


def _is_tensor(entry: Any, room: int) -> bool:
    """Return whether an entry of a header describes a tensor in the bytes behind it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    whole = all(type(size) is int and size >= 0 for size in (*shape, *offsets))
    return whole and offsets[0] <= offsets[1] <= room and prod(shape) <= MAX_PACKED * room
