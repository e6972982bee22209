"""Files of a model's gates: `zsmerge-llm train-gate` writes them to the user's cache folder, and some come with the
package. They are found by the model's norms, which quantization leaves as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from zsmerge_llm.attention.offloading import offloaded_tensor
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.kvcache.gate import Gate, num_features
from zsmerge_llm.kvcache.slots import LayerSpec
from zsmerge_llm.models.atomic_write import write_atomically
from zsmerge_llm.paths import cache_folder, check_folder, private_folder

PARTS = {"weight": torch.float32, "bias": torch.float32, "pairs": torch.int64}
"""The tensors of a gate, and their dtypes."""
SUFFIX = ".gate.safetensors"
MAX_BYTES = 1 << 28
"""Bytes of the largest file that is read."""


def model_key(model: nn.Module) -> str:
    """Return a digest of a model's norms in bfloat16: the same for all its quantizations and file formats.

    All vectors but the biases, which a quantized layer may hold in its own way.
    """
    vectors = (name for name, each in model.named_parameters() if each.ndim == 1 and each.is_floating_point())
    names = [name for name in vectors if not name.endswith("bias")]
    digest = hashlib.sha256(str(len(names)).encode())
    for name in names:
        with offloaded_tensor(model, name) as tensor:
            digest.update(tensor.detach().bfloat16().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()[:32]


def gates_path(key: str) -> Path:
    """Return where the gates that were trained on this machine for a model of this key are kept."""
    return cache_folder() / "profiles" / f"{key}{SUFFIX}"


def save_gates(path: Path, gates: Sequence[Gate | None]) -> None:
    """Write the gates of a model's layers. Raises OSError, UntrustedFolderError: the folder cannot be used."""
    named = {f"{index}.{part}": getattr(gate, part) for index, gate in enumerate(gates) if gate for part in PARTS}
    private_folder(path.parent)
    write_atomically(path, save({name: tensor.cpu().contiguous() for name, tensor in named.items()}))


def with_gates(model: nn.Module, specs: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Return a model's attention layers with their gates, trained here or shipped; as they are where it has none."""
    key = model_key(model)
    for content in _contents(key):
        with suppress(SafetensorError, ValueError, LookupError):
            return _checked(load(content), specs)
    return tuple(specs)


def _contents(key: str) -> Iterable[bytes]:
    """Yield the files of a model's gates, that of this machine first."""
    with suppress(OSError, ConfigError):
        path = gates_path(key)
        if path.stat().st_size <= MAX_BYTES:
            check_folder(path.parent)
            yield path.read_bytes()
    shipped = files("zsmerge_llm").joinpath("data").joinpath(f"{key}{SUFFIX}")
    if shipped.is_file():
        yield shipped.read_bytes()


def _checked(tensors: dict[str, Tensor], specs: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """Return the layers with their gates. Raises ValueError, LookupError: they are of other layers."""
    found = []
    for index, spec in enumerate(specs):
        if spec.window is not None:
            found.append(spec)
            continue
        own = {part: tensors.pop(f"{index}.{part}") for part in PARTS}
        gate = Gate(**own)
        pairs = gate.pairs
        shapes = (spec.kv_heads, num_features(spec.value_dim, pairs.shape[-1])), (spec.kv_heads,), (2, pairs.shape[-1])
        if [*map(tuple, (part.shape for part in own.values()))] != [*shapes]:
            raise ValueError("a gate of another shape")
        if any(own[part].dtype != dtype or not own[part].isfinite().all() for part, dtype in PARTS.items()):
            raise ValueError("a gate of other numbers")
        if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < spec.key_dim:
            raise ValueError("a gate of other keys")
        found.append(replace(spec, gate=gate.to(spec.device)))
    if tensors:
        raise ValueError("gates of other layers")
    return tuple(found)
