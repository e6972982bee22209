"""Describe everything that changes the code of a packaged decode step, so that another one has another name."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zsmerge_llm.cpu import native
from zsmerge_llm.cpu.decoder_layers import named_weights
from zsmerge_llm.cpu.patches import is_patch_attribute, original_forward
from zsmerge_llm.cpu.step_capture import StepForm
from zsmerge_llm.types import CONFIG_ORIGIN

SOURCES = ("package_builder", "step_capture", "step_package", "graph_passes", "patches", "quantized_linear")
"""The modules of this folder whose text decides about the code."""
MAX_DEPTH = 6
PEFT_NAME = "target_name"
"""Under this key an adapter of peft notes the name of its module: another in each layer, without effect on its code."""


def package_key(model: PreTrainedModel, layers: Sequence[nn.Module], forms: Sequence[StepForm]) -> str:
    """Return a hexadecimal name for the packages of a model on this machine."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in CONFIG_ORIGIN}
    kinds: set[Any] = {type(module) for layer in layers for module in layer.modules()}
    parts = [
        *(torch.__version__, version("transformers"), version("zsmerge-llm")),
        native.library_name(native.DECODE_SOURCES),
        *(files("zsmerge_llm.cpu").joinpath(f"{name}.py").read_text(encoding="utf-8") for name in SOURCES),
        *(json.dumps(config, sort_keys=True, default=str), type(model).__qualname__, str(list(forms))),
        *sorted({_source_digest(kind) for kind in kinds}),
        *(describe_layer(layer) for layer in layers),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def describe_layer(layer: nn.Module) -> str:
    """Describe a layer but for its index: modules, constants, and the shapes of its weights. Not their values."""
    lines = []
    for name, module in layer.named_modules():
        kind = type(module)
        own = original_forward(module)
        constants = {
            attribute: _describe(value, MAX_DEPTH)
            for attribute, value in sorted(vars(module).items())
            if not attribute.startswith(("_forward", "_backward", "_load", "_state")) and not _is_aside(attribute)
        }
        lines.append(f"{name} {kind.__module__}.{kind.__qualname__} {_describe(own, 1)} {constants}")
    lines += [
        f"{name} {tuple(each.shape)} {each.stride()} {each.dtype} {type(each).__name__}"
        for name, each in named_weights(layer).items()
    ]
    return "\n".join(lines)


def _is_aside(attribute: str) -> bool:
    """Return whether an attribute of a module is described elsewhere, or says only which layer it is in."""
    return attribute in ("_parameters", "_buffers", "_modules", "config", "layer_idx") or is_patch_attribute(attribute)


def _describe(value: Any, depth: int) -> str:
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{tuple(value.shape)} {value.dtype} {hashlib.sha256(content).hexdigest()}"
    if isinstance(value, dict) and depth:
        return str({str(key): _describe(each, depth - 1) for key, each in value.items() if key != PEFT_NAME})
    if isinstance(value, list | tuple | set | frozenset) and depth:
        described = [_describe(each, depth - 1) for each in value]
        return str(sorted(described) if isinstance(value, set | frozenset) else described)
    if isinstance(value, FunctionType | MethodType | type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, bool | int | float | str | type(None) | torch.dtype | torch.device):
        return repr(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"


@cache
def _source_digest(kind: Any) -> str:
    """Return the digest of the file that a class is from; its name alone where there is no such file."""
    try:
        content = Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):
        content = b""
    return f"{kind.__module__}.{kind.__qualname__} {hashlib.sha256(content).hexdigest()}"
