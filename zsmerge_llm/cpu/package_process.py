"""Start the process that makes a package, and see what became of it.

The process goes on when this one ends: the package is for the next one, and a program that runs for some seconds only
would never have one otherwise. It ends by itself.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zsmerge_llm.cpu import package_builder
from zsmerge_llm.cpu.builder_lock import MAX_SECONDS, lock_package, unlock
from zsmerge_llm.cpu.decoder_layers import named_weights
from zsmerge_llm.cpu.package_builder import LayerKind, PackageJob
from zsmerge_llm.cpu.package_key import describe_layer
from zsmerge_llm.cpu.patches import is_patch_attribute, original_forward
from zsmerge_llm.cpu.step_capture import StepForm, capture_step
from zsmerge_llm.cpu.step_package import Manifest, packaged_form
from zsmerge_llm.cpu.trusted_files import INDUCTOR_CACHE, compiler_cache, writable_folder
from zsmerge_llm.errors import PackageError, UnsupportedModelError
from zsmerge_llm.paths import private_folder

log = logging.getLogger(__name__)

LOW_PRIORITY = 5
"""Nice value beside a conversation: with a much higher one it would hardly run while tokens are decoded."""


def package_job(
    model: PreTrainedModel, layers: Sequence[nn.Module], forms: Sequence[StepForm], key: str, folder: Path, nice: int
) -> PackageJob:
    """Describe the package of a model, for another process. Runs the model once for each form.

    Raises:
        UnsupportedModelError: the layers cannot be compiled.
    """
    steps = [capture_step(model, layers, form) for form in forms]
    names: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        shapes = [[(each.shape, each.dtype) for each in step.calls[index].tensors] for step in steps]
        names.setdefault(f"{describe_layer(layer)}\n{shapes}", []).append(index)
    kinds = [0] * len(layers)
    members = list(names.values())
    for number, indices in enumerate(members):
        for index in indices:
            kinds[index] = number
    weights = [list(named_weights(layers[each[0]]).values()) for each in members]
    packaged = [packaged_form(step, steps[0], weights) for step in steps]
    jobs = []
    for each in members:
        first = _without_weights(layers[each[0]])
        last = first if len(each) == 1 else _without_weights(layers[each[-1]])
        jobs.append(LayerKind(first, last, [step.calls[each[0]] for step in steps]))
    return PackageJob(folder, Manifest(key, kinds, packaged, {}), jobs, nice)


class PackageProcess:
    """A process that makes a package. It holds the package's lock until it ends.

    Raises:
        UnsupportedModelError: the layers cannot be given to another process.
        BlockingIOError: another process makes the same package.
        OSError: it cannot be started.
    """

    def __init__(self, job: PackageJob) -> None:
        try:
            content = pickle.dumps(job)
        except Exception as error:  # whatever a module holds
            raise UnsupportedModelError(f"Layers that cannot be pickled are not compiled: {error}") from error
        lock = lock_package(job.folder)
        try:
            self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by `check`
            self._process = _started(content, _compiler_cache(job.folder.parent), self._errors, lock)
        finally:
            unlock(lock)

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self._process.poll() is not None

    def wait(self) -> None:
        """Wait until it has ended; end it if it takes too long."""
        try:
            self._process.wait(MAX_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """Check that it has worked.

        Raises:
            PackageError: it has not; the message quotes it.
        """
        with self._errors as file:
            if self._process.returncode == 0:
                return
            file.seek(0)
            lines = file.read().decode(errors="replace").strip().splitlines()
        said = next((line for line in reversed(lines) if not line.startswith(" ")), "")
        raise PackageError(f"Compiling failed: {said or f'exit code {self._process.returncode}'}")


def _started(content: bytes, folder: Path, errors: IO[bytes], lock: int | None) -> subprocess.Popen[bytes]:
    """Start a process on a pickled job. folder: for what the compiler keeps. lock: what it inherits."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "OMP_NUM_THREADS": "1",
        INDUCTOR_CACHE: str(folder),
        "TMPDIR": str(folder),  # TorchInductor looks for precompiled headers there, whatever its own variable says
    }
    with tempfile.TemporaryFile() as file:  # a pipe would hold this process up until the other one reads
        file.write(content)
        file.seek(0)
        return subprocess.Popen(
            [sys.executable, "-m", package_builder.__name__],
            cwd=str(folder),  # Python would import what is in the current folder before what is installed
            stdin=file,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            pass_fds=() if lock is None else (lock,),
        )


def _compiler_cache(packages: Path) -> Path:
    """Return a folder of the user's own for what the compiler keeps: among the packages where there is no other."""
    folder = writable_folder(compiler_cache, "What is compiled on the way to a package is not kept")
    return folder or private_folder(packages / "inductor")


def _without_weights(layer: nn.Module) -> nn.Module:
    """Copy a layer's structure: as it came from transformers, with weights that hold nothing."""
    copies: dict[int, Any] = {}
    for module in layer.modules():
        stand_ins = [value for name, value in vars(module).items() if is_patch_attribute(name)]
        copies |= {id(each): _Nothing for each in stand_ins if each is not None}
    for tensor in named_weights(layer).values():
        copies[id(tensor)] = _empty(tensor)
    copied = copy.deepcopy(layer, copies)
    for module, original in zip(copied.modules(), layer.modules(), strict=True):
        own = original_forward(original)
        for name in [name for name in vars(module) if is_patch_attribute(name)]:
            del vars(module)[name]
        if own is not None:
            module.forward = copy.deepcopy(own, copies)
    return copied


class _Nothing:
    """In place of a stand-in, while a layer is copied."""


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
