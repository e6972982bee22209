"""Compile a traced decoder layer with TorchInductor, and keep what was made on disk for later processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

OPTIONS = {"size_asserts": False, "allow_buffer_reuse": False, "inplace_buffers": False}
"""TorchInductor's. The inputs of attention stay as they are until later layers have run: the cache may need them."""

Compiled = Callable[..., Sequence[Tensor]]


def compile_and_keep(graph: GraphModule, inputs: Sequence[Tensor]) -> Compiled:
    """Return the compiled code of a graph, from TorchInductor's cache on disk where it is there.

    Before torch 2.8 nothing can be kept: each process compiles.
    """
    inductor: Any = torch._inductor
    if not hasattr(inductor, "standalone_compile"):
        alone: Compiled = inductor.compile(graph, list(inputs), options=OPTIONS)
        return alone
    options = {"config_patches": OPTIONS}
    compiled: Compiled = inductor.standalone_compile(
        graph, list(inputs), dynamic_shapes="from_example_inputs", options=options
    )
    return compiled
