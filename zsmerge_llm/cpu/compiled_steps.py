"""The compiled decode steps of a model: found on disk, or made by another process, once for a machine and a model.

A model that cannot be compiled goes on as it was, and `disabled_reason` says why.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from zsmerge_llm.cpu import native
from zsmerge_llm.cpu.builder_lock import AwaitedPackage
from zsmerge_llm.cpu.decoder_layers import decoder_layers
from zsmerge_llm.cpu.package_builder import PackageJob
from zsmerge_llm.cpu.package_key import package_key
from zsmerge_llm.cpu.package_process import LOW_PRIORITY, PackageProcess, package_job
from zsmerge_llm.cpu.packaged_layers import PackagedLayers
from zsmerge_llm.cpu.step_capture import step_forms
from zsmerge_llm.cpu.step_package import (
    add_mismatch,
    mismatches_path,
    num_mismatches,
    package_folder,
    packages_folder,
    read_manifest,
    remove_package,
)
from zsmerge_llm.cpu.trusted_files import temporary_folder, writable_folder
from zsmerge_llm.errors import PackageError, UnsupportedModelError
from zsmerge_llm.paths import private_folder

log = logging.getLogger(__name__)

COMPILE_AFTER = 8
"""Decode steps before a package is made of its own accord: a process that decodes nothing needs none."""
MAX_MISMATCHES = 2
"""Packages that may compute something else before no process makes another one."""
POLL_SECONDS = 0.5
"""How often a step looks whether the package is there."""


class CompiledSteps:
    """Finds, makes and loads the package of one model.

    Args:
        prepare: loads the kernels and returns whether there are any; called before a package is loaded.

    Attributes:
        folder: of the package.
        seconds: spent on loading and on waiting for a package.
    """

    def __init__(
        self, model: PreTrainedModel, num_layers: int, num_draft_tokens: int, prepare: Callable[[], bool]
    ) -> None:
        self.disabled_reason: str | None = None
        self.seconds = 0.0
        self._model = model
        self._num_layers = num_layers
        self._forms = step_forms(num_draft_tokens)
        self._prepare = prepare
        self._steps_left: int | None = None
        self._process: PackageProcess | AwaitedPackage | None = None
        self._next_look = 0.0
        self._layers: PackagedLayers | None = None
        self._decoders: list[nn.Module] = []
        self._key = ""
        self.folder = Path()
        self._rebuilt = False

    @property
    def enabled(self) -> bool:
        """Whether decode steps go through a package."""
        return self._layers is not None and self._layers.enabled

    @property
    def layers(self) -> PackagedLayers | None:
        """The layers that run through a package; None before it has been looked for."""
        return self._layers

    @property
    def steps_left(self) -> int | None:
        """Decode steps after which a package is made; 0: it is being made; None: never, or it has been tried."""
        return None if self.enabled or self.disabled_reason is not None else self._steps_left

    def watch(self) -> None:
        """Use the package that an earlier process made; else make one once some steps have been decoded."""
        self._steps_left = None if self.load() else COMPILE_AFTER

    def load(self) -> bool:
        """Use the package that an earlier process made; return whether there is one."""
        if self.enabled or self.disabled_reason is not None or not self._find():
            return self.enabled
        return self._install(self.folder)

    def start(self) -> None:
        """Use a package, and make one first if there is none, which takes up to a minute."""
        started = time.perf_counter()
        if not self.load() and self.disabled_reason is None:
            self._begin(0)
            while self._process is not None:
                self._process.wait()
                self._finish()
        self.seconds += time.perf_counter() - started

    def on_step(self, num_tokens: int) -> None:
        """Count a pass of so many tokens; make a package when that is due, and use it when it is there."""
        if self._process is not None:
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + POLL_SECONDS
                if self._process.finished:
                    self._finish()
        elif self._steps_left and num_tokens in {form.rows * form.tokens for form in self._forms if not form.batch}:
            self._steps_left -= 1
            if self._steps_left == 0 and not self.enabled and self.disabled_reason is None and not self.load():
                log.info("Compiling decode steps in the background, once for this machine; it takes up to a minute.")
                self._begin(LOW_PRIORITY)

    def disable(self, why: Exception) -> None:
        """Run every layer as transformers wrote it, and log why once."""
        self.close()
        self.disabled_reason = f"{type(why).__name__}: {why}"
        log.warning("Decoding goes on without compiled layers: %s", self.disabled_reason)

    def close(self) -> None:
        """Give every layer its own forward back."""
        if self._layers is not None:
            self._layers.remove()

    # -- finding and loading -----------------------------------------------------------------------------------------

    def _find(self) -> bool:
        """Find the layers and the package's name; return whether they can be compiled."""
        if self._layers is None:
            try:
                self._decoders = decoder_layers(self._model, self._num_layers)
                self._key = package_key(self._model, self._decoders, self._forms)
            except (UnsupportedModelError, OSError) as error:
                self.disable(error)
                return False
            self.folder = package_folder(self._key)
            self._layers = PackagedLayers(self._model, self._decoders, self._on_mismatch)
            if num_mismatches(self.folder) >= MAX_MISMATCHES:
                self.disable(_wrong_package(self.folder))
        return self.disabled_reason is None

    def _install(self, folder: Path) -> bool:
        """Load the package in a folder; return whether that worked. One that does not load is removed."""
        assert self._layers is not None
        try:
            manifest = read_manifest(folder, self._key, self._num_layers)
            if manifest is None or not native.is_built(native.DECODE_SOURCES) or not self._prepare():
                return False
            self._layers.install(folder, manifest)
        except (PackageError, RuntimeError) as error:
            log.warning("A package of compiled decode steps is not used: %s", str(error).splitlines()[0])
            self._layers.remove()
            remove_package(folder)
        return self.enabled

    def _on_mismatch(self, reason: str) -> None:
        """Throw a package away, and make another one, if it is the first that this process or others found wrong."""
        self.close()
        remove_package(self.folder)
        if add_mismatch(self.folder, reason) >= MAX_MISMATCHES or self._rebuilt:
            self.disable(_wrong_package(self.folder, f" ({reason})"))
            return
        self._rebuilt = True
        log.warning("The package of compiled decode steps is made again: %s.", reason)
        self._steps_left = COMPILE_AFTER

    # -- making ------------------------------------------------------------------------------------------------------

    def _begin(self, nice: int) -> None:
        """Start the process that makes the package, or wait for one that does."""
        try:
            folder = self.folder = _writable_packages_folder() / self.folder.name
            self._make(package_job(self._model, self._decoders, self._forms, self._key, folder, nice))
        except (UnsupportedModelError, OSError) as error:
            self.disable(error)

    def _make(self, job: PackageJob) -> None:
        """Start a process for a job, unless another one does the same."""
        try:
            self._process = PackageProcess(job)
        except BlockingIOError:
            self._process = AwaitedPackage(job)

    def _finish(self) -> None:
        """Load what the process has made. Where another one has ended without it, it is made here."""
        process, self._process, self._steps_left = self._process, None, None
        if process is None or self.disabled_reason is not None:
            return
        try:
            process.check()
            if not self._install(self.folder):
                if not isinstance(process, AwaitedPackage):
                    raise PackageError("The package that was made cannot be loaded.")
                self._steps_left = 0
                self._make(process.job)
                return
        except (PackageError, UnsupportedModelError, OSError) as error:
            self.disable(error)
        if self.folder.parent != packages_folder():  # of this process alone
            remove_package(self.folder.parent)


def _wrong_package(folder: Path, reason: str = "") -> PackageError:
    return PackageError(
        f"Compiled decode steps gave other logits than the model's layers{reason}, and once made again still did. "
        f"To try once more, delete {mismatches_path(folder)}."
    )


def _writable_packages_folder() -> Path:
    """Return the folder for packages, or a temporary one of this process where that cannot be written to."""
    find = partial(private_folder, packages_folder())
    folder = writable_folder(find, "Compiled decode steps are not kept for later processes")
    return folder or temporary_folder(None, "zsmerge-")
