"""The decoder layers of a model, and what is given to each in a pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from zsmerge_llm.attention.call import AttentionHandler
from zsmerge_llm.attention.recurrent import mixers_of
from zsmerge_llm.errors import UnsupportedModelError


def decoder_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """Return the model's decoder layers, in order.

    Raises:
        UnsupportedModelError: layers that cannot be told, or whose weights are not all plain tensors in their place.
    """
    if mixers_of(model):
        raise UnsupportedModelError("Layers that keep a recurrent state are not compiled.")
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    stacks = [stack for stack in stacks if all(_attends(layer) for layer in stack)]
    if len(stacks) != 1:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of its {count} decoder layers.")
    layers = list(stacks[0])
    for layer in layers:
        if _has_experts(layer):
            raise UnsupportedModelError("Layers whose experts are chosen by the data are not compiled.")
        if any(hasattr(module, "_hf_hook") for module in layer.modules()):
            raise UnsupportedModelError("Layers that accelerate moves between devices are not compiled.")
        if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules() if module is not layer):
            raise UnsupportedModelError("Layers with forward hooks are not compiled.")
        kinds = {type(weight) for weight in (*layer.parameters(), *layer.buffers())} - {nn.Parameter, Tensor}
        if kinds:
            raise UnsupportedModelError(f"Weights of type {kinds.pop().__name__} are not compiled.")
    return layers


def named_weights(layer: nn.Module) -> dict[str, Tensor]:
    """Return a layer's parameters and buffers by name."""
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def flatten_call(values: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """Return the tensors among a call's values, those in tuples included, and the other values but the pass."""
    tensors: list[Tensor] = []
    rest: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif is_tensor_tuple(value):
            tensors.extend(value)
        elif not isinstance(value, AttentionHandler):
            rest.append(value)
    return tensors, rest


def is_tensor_tuple(value: Any) -> bool:
    """Return whether a value is a tuple of tensors, such as cosines and sines."""
    return isinstance(value, tuple) and bool(value) and all(isinstance(each, Tensor) for each in value)


def _has_experts(layer: nn.Module) -> bool:
    """Return whether a part of a layer is a mixture of experts: their code loops over those that the data chooses."""
    parts = ((name.lower(), type(module).__name__.lower()) for name, module in layer.named_modules())
    return any("expert" in name or "moe" in name.split(".") or "expert" in kind for name, kind in parts)


def _attends(layer: nn.Module) -> bool:
    return sum(hasattr(module, "layer_idx") for module in layer.children()) == 1
