"""Stand-ins for the forward of a model's modules: put in place by the CPU backend, and taken away again as they came.

Decoder layers are replaced by compiled ones, and matrices by kernels for few rows or for chunks, each for the passes it
is made for; every other pass runs the module's own forward. `ForwardPatches` is the only place that changes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from zsmerge_llm.cpu import native
from zsmerge_llm.cpu.quantized_linear import Int4Linear, Int8Linear

Forward = Callable[..., Any]


class ForwardPatches:
    """Replace the forward of modules, one over another, and restore them all in the opposite order.

    As a context manager it restores them at its end.
    """

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Forward | None]] = []  # None: the class's own forward

    def __len__(self) -> int:
        return len(self._before)

    def replace(self, module: nn.Module, forward: Forward) -> None:
        """Let `module` call `forward` from now on."""
        self._before.append((module, module.__dict__.get("forward")))
        module.forward = forward

    @contextmanager
    def suspended(self, module: nn.Module) -> Iterator[None]:
        """Let `module` call its class's own forward for a while."""
        patched = module.__dict__.pop("forward")
        try:
            yield
        finally:
            module.forward = patched

    def restore(self) -> None:
        """Take all stand-ins away."""
        while self._before:
            module, forward = self._before.pop()
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward

    def __enter__(self) -> ForwardPatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


class GemvLinear:
    """Multiply few rows by a matrix through the kernels; more rows go through the layer's own forward."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.eager: Forward = layer.forward

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        weight = cast(Tensor, self.layer.weight)
        scales, biases = _optional(getattr(self.layer, "scales", None)), _optional(self.layer.bias)
        if not native.can_gemv(x, weight) or any(each.dtype != x.dtype for each in (*scales, *biases)):
            return self.eager(x)
        (output,) = native.gemv(x.reshape(-1, x.shape[-1]), [weight], scales, biases)
        return output.view(*x.shape[:-1], -1)


class GemmLinear:
    """Multiply the rows of a chunk by a matrix of 4 or 8 bits through the kernels; few rows as the layer has it."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = cast("Int4Linear | Int8Linear", layer)
        self.eager: Forward = layer.forward

    def __call__(self, x: Tensor) -> Tensor:
        """Map [..., K] to [..., N]."""
        own = self.layer
        if not native.can_gemm(x, own.weight, own.scales):
            return self.eager(x)
        return native.quantized_gemm(x, own.weight, own.scales, own.bias)


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module is a plain linear layer that `GemvLinear` can stand in for."""
    plain = type(module) in (nn.Linear, Int8Linear, Int4Linear) and not hasattr(module, "_hf_hook")
    return plain and type(module.weight) in (nn.Parameter, torch.Tensor)


def _optional(tensor: Any) -> list[Tensor]:
    return [] if tensor is None else [tensor]
