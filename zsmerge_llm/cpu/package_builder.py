"""Make a package of compiled decode steps, in a process of its own: `python -m zsmerge_llm.cpu.package_builder`.

It is given a pickled `PackageJob` on its standard input, by the process that wants the package, and the lock that keeps
others from making the same one (`builder_lock`). TorchInductor holds Python's lock for long and takes a lot of memory;
here it holds up nobody, and whatever befalls it ends this process only. Layers come without their weights.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

import zsmerge_llm.attention.interface  # noqa: F401  registers the attention that the layers call
from zsmerge_llm.cpu import native
from zsmerge_llm.cpu.decoder_layers import is_tensor_tuple, named_weights
from zsmerge_llm.cpu.graph_passes import fuse_gemvs
from zsmerge_llm.cpu.patches import ForwardPatches, GemvLinear, is_matrix
from zsmerge_llm.cpu.step_capture import LayerCall
from zsmerge_llm.cpu.step_package import Manifest, PackagedForm, file_name, remove_package
from zsmerge_llm.cpu.trusted_files import digest, temporary_folder
from zsmerge_llm.errors import UnsupportedModelError

OPTIONS: dict[str, Any] = {"allow_buffer_reuse": False, "inplace_buffers": False, "cpp.min_chunk_size": 1 << 20}
"""AOTInductor's. The inputs of attention stay as they are until all layers have run: the cache may need them.
Loops over a step's few values run on one thread: others would have their number written into the code."""
BUILDING = ".building-"
STALE_SECONDS = 3600
"""Age at which an unfinished package is removed: its process was ended."""


@dataclass(frozen=True)
class LayerKind:
    """Layers with the same code: the first and the last of them, without weights, and their calls by form.

    Layers are told apart by what they hold, not by their index; comparing two shows whether a layer computes with it.
    """

    first: nn.Module
    last: nn.Module
    calls: list[LayerCall]


@dataclass(frozen=True)
class PackageJob:
    """What a package is made of. folder: where it goes. nice: by how much to lower the priority."""

    folder: Path
    manifest: Manifest
    kinds: list[LayerKind]
    nice: int


def build_package(job: PackageJob) -> None:
    """Compile every kind of layer for every form of step, and put the package in its place."""
    parent = job.folder.parent
    _remove_stale(parent)
    if job.folder.exists():  # another process was faster
        return
    native.build()
    folder = temporary_folder(parent, BUILDING)
    try:
        files = {}
        for number, kind in enumerate(job.kinds):
            with prepared({kind.first, kind.last}):
                for form, call in zip(job.manifest.forms, kind.calls, strict=True):
                    path = folder / file_name(form.form.name, number)
                    _compile(kind, call, form, path)
                    files[path.name] = digest(path)
        replace(job.manifest, files=files).write(folder)
        folder.rename(job.folder)
    finally:
        remove_package(folder)


@contextmanager
def prepared(layers: set[nn.Module]) -> Iterator[None]:
    """Give layers without weights memory for them, which nobody reads, and matrices that run through the kernels."""
    with ForwardPatches() as patches:
        for layer in layers:
            layer.to_empty(device="cpu")
            for module in [module for module in layer.modules() if is_matrix(module)]:
                patches.replace(module, GemvLinear(module))
        yield


class _Function(nn.Module):
    """A layer as a function of its tensors: those of its call, then its weights."""

    def __init__(self, layer: nn.Module, call: LayerCall) -> None:
        super().__init__()
        self._parts = (layer, call)  # in a tuple, so that its weights are not this module's

    def forward(self, tensors: tuple[Tensor, ...]) -> Tensor:
        layer, call = self._parts
        given = iter(tensors)
        args = tuple(_refilled(value, given) for value in call.args)
        kwargs = {name: _refilled(value, given) for name, value in call.kwargs.items()}
        weights = {name: next(given) for name in named_weights(layer)}
        result = torch.func.functional_call(layer, weights, args, kwargs)
        hidden: Tensor = result[0] if isinstance(result, tuple) else result
        return hidden


def _refilled(value: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(value, Tensor):
        return next(tensors)
    return tuple(next(tensors) for _ in value) if is_tensor_tuple(value) else value


def _compile(kind: LayerKind, call: LayerCall, form: PackagedForm, path: Path) -> None:
    program = export_layer(kind.first, call, form)
    if (
        kind.last is not kind.first
        and program.graph_module.code != export_layer(kind.last, call, form).graph_module.code
    ):
        raise UnsupportedModelError(f"{type(kind.first).__name__} computes with the index of the layer.")
    torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=OPTIONS)


def export_layer(layer: nn.Module, call: LayerCall, form: PackagedForm) -> torch.export.ExportedProgram:
    """Export a layer, its products merged."""
    tensors = (*call.tensors, *named_weights(layer).values())
    rows = Dim("rows", min=2, max=native.MAX_ROWS) if form.form.batch else None
    by_rows = [rows is not None and _depends_on_rows(source, form) for source in call.sources]
    dims = [{0: rows} if each else None for each in by_rows] + [None] * (len(tensors) - len(by_rows))
    shapes: Any = (tuple(dims),)
    with torch.no_grad():
        exported = torch.export.export(_Function(layer, call), (tensors,), dynamic_shapes=shapes, strict=False)
        graph: Any = exported.module()
        fuse_gemvs(graph)
        return torch.export.export(graph, (tensors,), dynamic_shapes=shapes, strict=False)


def _depends_on_rows(source: int, form: PackagedForm) -> bool:
    return source < 0 or form.inputs[source].rows


def _remove_stale(parent: Path) -> None:
    for folder in parent.glob(f"{BUILDING}*"):
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(folder)


def main() -> None:
    """Build the package whose job is on the standard input."""
    job: PackageJob = pickle.load(sys.stdin.buffer)
    if hasattr(os, "nice"):
        os.nice(job.nice)
    build_package(job)


if __name__ == "__main__":
    main()
