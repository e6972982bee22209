"""Compile a traced decoder layer with TorchInductor, and keep what was made on disk for later processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from zsmerge_llm.cpu.compiled_layers import OPTIONS, compile_graph


def compile_and_keep(graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """Return the compiled code of a graph, from TorchInductor's cache on disk where it is there.

    Before torch 2.8 nothing can be kept: each process compiles.
    """
    inductor: Any = torch._inductor
    if not hasattr(inductor, "standalone_compile"):
        return compile_graph(graph, inputs)
    options = {"config_patches": OPTIONS}
    compiled: Callable[..., Sequence[Tensor]] = inductor.standalone_compile(
        graph, list(inputs), dynamic_shapes="from_example_inputs", options=options
    )
    return compiled
