"""Compile a traced decoder layer with TorchInductor, and keep what was made on disk for later processes."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsmerge_llm.cpu.trusted_files import INDUCTOR_CACHE, compiler_cache, temporary_folder

log = logging.getLogger(__name__)

OPTIONS = {"size_asserts": False, "allow_buffer_reuse": False, "inplace_buffers": False}
"""TorchInductor's. The inputs of attention stay as they are until later layers have run: the cache may need them."""
PRECOMPILED_HEADERS = "cpp_cache_precompile_headers"
"""An option of newer versions. It looks for headers in the system's temporary folder, where others may write."""

Compiled = Callable[..., Sequence[Tensor]]


def compile_and_keep(graph: GraphModule, inputs: Sequence[Tensor]) -> Compiled:
    """Return the compiled code of a graph, from TorchInductor's cache on disk where it is there.

    Before torch 2.8 nothing can be kept: each process compiles.

    Raises:
        UntrustedFolderError: others may write to the compiler's cache.
    """
    os.environ[INDUCTOR_CACHE] = str(_writable_cache())  # as TorchInductor itself does, but with its default folder
    inductor: Any = torch._inductor
    options = {**OPTIONS, **({PRECOMPILED_HEADERS: False} if hasattr(inductor.config, PRECOMPILED_HEADERS) else {})}
    if not hasattr(inductor, "standalone_compile"):
        alone: Compiled = inductor.compile(graph, list(inputs), options=options)
        return alone
    compiled: Compiled = inductor.standalone_compile(
        graph, list(inputs), dynamic_shapes="from_example_inputs", options={"config_patches": options}
    )
    return compiled


def _writable_cache() -> Path:
    """Return the compiler's cache folder: one for this process where there can be no other."""
    try:
        if os.access(found := compiler_cache(), os.W_OK):
            return found
        reason = f"{found} cannot be written to"
    except OSError as error:
        reason = str(error)
    log.warning("Compiled layers are not kept for later processes: %s.", reason.rstrip("."))
    folder = temporary_folder(None, "zsmerge-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
