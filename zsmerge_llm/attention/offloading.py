"""Models whose weights accelerate keeps elsewhere and brings in for each module's pass (hooks, meta tensors).

accelerate is never imported here: where nobody has imported it, no weights are offloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def input_device(model: Any) -> torch.device:
    """Return the device that token ids must be on."""
    embedding = model.get_input_embeddings()
    if embedding.weight.is_meta and is_offloaded(embedding):
        return torch.device(embedding._hf_hook.execution_device)
    device: torch.device = embedding.weight.device
    return device


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate brings in a module's own weights when it runs."""
    utils: Any = sys.modules.get("accelerate.utils")
    return utils is not None and bool(utils.has_offloaded_params(module))


def names_without_data(model: nn.Module) -> list[str]:
    """Return the names of weights that are nowhere: on the meta device, and not offloaded."""
    return [
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        for own, weight in module.named_parameters(recurse=False)
        if weight.is_meta and not is_offloaded(module)
    ]


@contextmanager
def offloaded_tensor(model: nn.Module, name: str) -> Iterator[Tensor]:
    """Give a weight by its name, brought in for the block where it is offloaded."""
    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    if not is_offloaded(module):
        yield getattr(module, own)
        return
    with sys.modules["accelerate.utils"].align_module_device(module):
        yield getattr(module, own)
