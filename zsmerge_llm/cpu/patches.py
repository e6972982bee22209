"""Stand-ins for the forward of a model's modules: put in place by the CPU backend, and taken away again as they came.

Decoder layers are replaced by compiled ones, and matrices by kernels for few rows or for chunks, each for the passes it
is made for; every other pass runs the module's own forward. `ForwardPatches` is the only place that changes a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zsmerge_llm.cpu import native
from zsmerge_llm.cpu.quantized_linear import Int4Linear, Int8Linear

Forward = Callable[..., Any]


@dataclass(eq=False)
class _Patch:
    """A stand-in for the forward of a module."""

    module: nn.Module
    forward: Forward


class _Stack(list[_Patch]):
    """The stand-ins of one module, the uppermost last, whoever put them there. The module itself keeps it.

    Attributes:
        original: the forward that the instance had before the first; None: its class's own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.original: Forward | None = vars(module).get("forward")


_STACK = "_zsmerge_stand_ins"


class ForwardPatches:
    """Replace the forward of modules, one over another, and restore them all.

    Several of these may share a module (engines on one model), and are restored in any order. As a context manager it
    restores at its end.
    """

    def __init__(self) -> None:
        self._patches: list[_Patch] = []

    def __len__(self) -> int:
        return len(self._patches)

    def replace(self, module: nn.Module, forward: Forward) -> None:
        """Let `module` call `forward` from now on."""
        patch = _Patch(module, forward)
        vars(module).setdefault(_STACK, _Stack(module)).append(patch)
        self._patches.append(patch)
        module.forward = forward

    @contextmanager
    def suspended(self, module: nn.Module) -> Iterator[None]:
        """Let `module` call the forward that it came with for a while."""
        _set_forward(module, original_forward(module))
        try:
            yield
        finally:
            _show_uppermost(module)

    def restore(self) -> None:
        """Take all stand-ins away. Those of others stay, and so does a forward that somebody else set since."""
        while self._patches:
            patch = self._patches.pop()
            stack = vars(patch.module)[_STACK]
            stack.remove(patch)
            if vars(patch.module).get("forward") is patch.forward:
                _show_uppermost(patch.module)
            if not stack:
                del vars(patch.module)[_STACK]

    def __enter__(self) -> ForwardPatches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def original_forward(module: nn.Module) -> Forward | None:
    """Return the forward that the instance had before any stand-in; None: its class's own."""
    stack = vars(module).get(_STACK)
    return vars(module).get("forward") if stack is None else stack.original


def is_patch_attribute(name: str) -> bool:
    """Return whether stand-ins set such an attribute of a module."""
    return name in ("forward", _STACK)


def _show_uppermost(module: nn.Module) -> None:
    """Let a module call its uppermost stand-in; without one, the forward that it came with."""
    stack = vars(module)[_STACK]
    _set_forward(module, stack[-1].forward if stack else stack.original)


def _set_forward(module: nn.Module, forward: Forward | None) -> None:
    vars(module).pop("forward", None)
    if forward is not None:
        module.forward = forward


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
    """Return whether a module is a plain linear layer that `GemvLinear` can stand in for.

    Not one that computes something else than its weight says: with a forward of its own, or with codes as its weight.
    """
    if type(module) not in (nn.Linear, Int8Linear, Int4Linear) or original_forward(module) is not None:
        return False
    weight = getattr(module, "weight", None)
    codes = type(module) is nn.Linear and isinstance(weight, Tensor) and not weight.is_floating_point()
    return type(weight) in (nn.Parameter, torch.Tensor) and not codes


def covers_model(matrices: Sequence[nn.Module], model: PreTrainedModel) -> bool:
    """Return whether these are all the matrices of a model, and `GemvLinear` takes each: experts have others."""
    token = torch.empty(1, 1, dtype=model.dtype)
    weights = [cast(Tensor, module.weight) for module in matrices]
    covered = {id(weight) for weight in weights if native.can_gemv(token, weight)}
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    known = {id(each) for each in model.parameters() if each.dim() < 2} | covered | looked_up
    return len(covered) == len(set(map(id, weights))) and all(id(each) in known for each in model.parameters())


def _optional(tensor: Any) -> list[Tensor]:
    return [] if tensor is None else [tensor]
