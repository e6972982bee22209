"""Packages of compiled decode steps on disk: a folder of AOTInductor's packages and a manifest that describes them.

A folder is made elsewhere and renamed to its place when it is whole. Nothing in it reaches native code before the
folder's owner, the manifest and the content of every file have been checked.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsmerge_llm.cpu.step_capture import HIDDEN, CapturedStep, StepForm
from zsmerge_llm.cpu.trusted_files import digest
from zsmerge_llm.errors import PackageError
from zsmerge_llm.paths import cache_folder, check_folder, check_owner

MANIFEST = "manifest.json"
FILE_NAME = re.compile(r"[a-z]+-\d+\.pt2")


def packages_folder() -> Path:
    """Return the folder of all packages."""
    return cache_folder() / "decode-steps"


def package_folder(key: str) -> Path:
    """Return the folder of one package."""
    return packages_folder() / key[:32]


def file_name(form: str, kind: int) -> str:
    """Return the name of the file with the code of one kind of layer in one form of step."""
    return f"{form}-{kind}.pt2"


@dataclass(frozen=True)
class TensorShape:
    """What an input has to be. rows: whether its first dimension is the step's rows."""

    shape: list[int]
    stride: list[int]
    dtype: str
    rows: bool

    @classmethod
    def of(cls, tensor: Tensor, rows: bool = False) -> TensorShape:
        """Describe a tensor."""
        return cls(list(tensor.shape), list(tensor.stride()), str(tensor.dtype), rows)

    def fits(self, tensor: Tensor) -> bool:
        """Return whether compiled code may be given a tensor."""
        skip = int(self.rows)
        return (
            tensor.dim() == len(self.shape)
            and list(tensor.shape[skip:]) == self.shape[skip:]
            and (list(tensor.stride()) == self.stride or (tensor.is_contiguous() and _is_contiguous(self)))
            and str(tensor.dtype) == self.dtype
            and tensor.device.type == "cpu"
        )


@dataclass(frozen=True)
class PackagedForm:
    """One form of step. sources, for each layer, as in `LayerCall`; weights, for each kind of layer."""

    form: StepForm
    sources: list[list[int]]
    inputs: list[TensorShape]
    weights: list[list[TensorShape]]
    num_results: int | None


@dataclass(frozen=True)
class Manifest:
    """What a package holds. kinds: for each layer, which code it has. files: SHA-256 of each."""

    key: str
    kinds: list[int]
    forms: list[PackagedForm]
    files: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder."""
        folder.joinpath(MANIFEST).write_text(json.dumps(asdict(self)), encoding="utf-8")


def packaged_form(captured: CapturedStep, single: CapturedStep, weights: Sequence[Sequence[Tensor]]) -> PackagedForm:
    """Describe a captured step. single: the same model's step of one row, which tells what depends on the rows."""
    inputs = [
        TensorShape.of(tensor, captured.form.batch and len(tensor) != len(other))
        for tensor, other in zip(captured.inputs, single.inputs, strict=True)
    ]
    shapes = [[TensorShape.of(weight) for weight in each] for each in weights]
    sources = [call.sources for call in captured.calls]
    return PackagedForm(captured.form, sources, inputs, shapes, captured.num_results)


def read_manifest(folder: Path, key: str, num_layers: int) -> Manifest | None:
    """Read and check a package; None where there is none.

    Raises:
        PackageError: it is damaged, made for something else, or not the user's own.
    """
    try:
        if not folder.exists():
            return None
        check_folder(folder.parent)
        check_folder(folder)
        check_owner(folder / MANIFEST)
        manifest = _parse(json.loads(folder.joinpath(MANIFEST).read_text(encoding="utf-8")))
        _check(manifest, key, num_layers)
        for name, expected in manifest.files.items():
            path = folder / name
            check_owner(path)
            if digest(path) != expected:
                raise PackageError(f"{path} is damaged; it is made anew.")
    except PackageError:
        raise
    except Exception as error:  # whatever a file can hold
        raise PackageError(f"The package in {folder} cannot be read ({type(error).__name__}: {error}).") from error
    return manifest


def remove_package(folder: Path) -> None:
    """Remove a package, as far as that is allowed."""
    with suppress(OSError):
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def mismatches_path(folder: Path) -> Path:
    """Return the file that says how often a package was thrown away because it computed something else."""
    return folder.with_suffix(".mismatches")


def add_mismatch(folder: Path, reason: str) -> int:
    """Write down why a package is thrown away, as far as that is allowed; return how often that has happened."""
    with suppress(OSError), mismatches_path(folder).open("a", encoding="utf-8") as file:
        file.write(f"{reason}\n")
    return num_mismatches(folder)


def num_mismatches(folder: Path) -> int:
    """Return how often a package was thrown away because it computed something else."""
    try:
        return mismatches_path(folder).read_bytes().count(b"\n")
    except OSError:
        return 0


def _parse(content: Any) -> Manifest:
    def shape(each: Any) -> TensorShape:
        return TensorShape(**each)

    forms = [
        PackagedForm(
            StepForm(**each["form"]),
            [[int(source) for source in layer] for layer in each["sources"]],
            [shape(tensor) for tensor in each["inputs"]],
            [[shape(tensor) for tensor in kind] for kind in each["weights"]],
            each["num_results"],
        )
        for each in content["forms"]
    ]
    return Manifest(content["key"], [int(kind) for kind in content["kinds"]], forms, dict(content["files"]))


def _check(manifest: Manifest, key: str, num_layers: int) -> None:
    """Check that a manifest is whole and for this model."""
    kinds = set(manifest.kinds)
    whole = (
        manifest.key == key
        and len(manifest.kinds) == num_layers
        and kinds == set(range(len(kinds)))
        and set(manifest.files) == {file_name(each.form.name, kind) for each in manifest.forms for kind in kinds}
        and all(FILE_NAME.fullmatch(name) for name in manifest.files)
    )
    for each in manifest.forms:
        whole = whole and len(each.sources) == num_layers and len(each.weights) == len(kinds)
        whole = whole and all(HIDDEN <= source < len(each.inputs) for layer in each.sources for source in layer)
        whole = whole and HIDDEN not in each.sources[0]
    if not whole:
        raise PackageError("The package is for another model, or not whole.")


def _is_contiguous(shape: TensorShape) -> bool:
    return torch.empty(shape.shape, device="meta").stride() == tuple(shape.stride)
