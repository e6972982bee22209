"""Copies of conversations in host memory, and back on the devices of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.models.device import HOST


class TensorCopies(Protocol):
    """Copies tensors between a device and the host. A copy is complete when it is returned; no other work waits."""

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a copy in host memory."""

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a copy of a tensor in host memory."""


@dataclass(frozen=True)
class Transfer:
    """Copies caches of a model between its devices and the host.

    devices: those of the model's layers, in order.
    """

    devices: Sequence[torch.device]
    copies: TensorCopies

    def to_host(self, cache: Cache) -> Cache:
        """Return a copy in host memory. Raises MemoryError or RuntimeError where there is no room."""
        host = [torch.device(HOST)] * len(self.devices)
        return cache.copy_to(host, lambda tensor, _: self.copies.to_host(tensor))

    def to_device(self, cache: Cache) -> Cache:
        """Return a copy where the model computes. Raises RuntimeError where there is no room."""
        return cache.copy_to(self.devices, self.copies.to_device)
