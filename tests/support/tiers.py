"""A device tier on a machine that has none: copies that stay on the CPU, and are counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from zsmerge_llm.sessions.tiers import DeviceTier
from zsmerge_llm.sessions.transfer import Transfer


class CountedCopies:
    """Copies of tensors that count those down and up. full: whether host memory has no room."""

    def __init__(self) -> None:
        self.down = self.up = 0
        self.full = False

    def to_host(self, tensor: Tensor) -> Tensor:
        if self.full:
            raise MemoryError("no room")
        self.down += 1
        return tensor.clone()

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.up += 1
        return tensor.clone()


def device_tier(limit: int, layers: int, copies: CountedCopies | None = None) -> DeviceTier:
    """Return a device tier of so many bytes for caches of so many layers."""
    return DeviceTier(Transfer([torch.device("cpu")] * layers, copies or CountedCopies()), limit)


@contextmanager
def pretended_device(limit: int) -> Iterator[CountedCopies]:
    """Let every LLM that is loaded meanwhile take the CPU for a device with so many bytes for idle conversations."""
    copies = CountedCopies()

    def tier(engine: Any, *_: Any) -> DeviceTier:
        return device_tier(limit, len(engine.specs), copies)

    with mock.patch("zsmerge_llm.runtime.device_tier", tier):
        yield copies
