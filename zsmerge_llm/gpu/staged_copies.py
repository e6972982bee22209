"""Copy tensors between a device and the host beside everything that the device computes.

Pinned memory is what a device copies by itself, but the system cannot move it, and allocators round it up. So there is
one small pinned buffer for each direction, through which tensors of any size go in pieces; what is kept on the host is
ordinary memory. The copies run on a stream of their own, and only the thread that wants them waits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

STAGING_NBYTES = 16 * 2**20
"""Bytes of a pinned buffer."""


class CopyStream(Protocol):
    """A queue of copies beside the work of a device."""

    def staging(self, size: int) -> Tensor:
        """Return a host buffer of bytes, uint8 [size], that the device can copy from and to by itself."""

    def after_computing(self) -> AbstractContextManager[None]:
        """Queue copies behind all work that the device has been given so far."""

    def wait(self) -> None:
        """Wait, in this thread, until all queued copies are done."""


class CudaStream:
    """A `CopyStream` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def staging(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    @contextmanager
    def after_computing(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def wait(self) -> None:
        self._stream.synchronize()


class StagedCopies:
    """Copies through a staging buffer. Safe to use from several threads.

    Args:
        stream: where the copies of one direction are queued.
        size: bytes of the buffer.
    """

    def __init__(self, stream: CopyStream, size: int = STAGING_NBYTES) -> None:
        self._stream, self._size = stream, size
        self._buffer: Tensor | None = None
        self._lock = Lock()

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a copy in host memory."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        with self._lock:
            for source, target, staged in self._pieces(tensor.contiguous(), copy):
                with self._stream.after_computing():
                    staged.copy_(source, non_blocking=True)
                self._stream.wait()
                target.copy_(staged)
        return copy

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a copy of a host tensor. It belongs to the stream on which the caller computes."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        with self._lock:
            for source, target, staged in self._pieces(tensor.contiguous(), copy):
                staged.copy_(source)
                with self._stream.after_computing():
                    target.copy_(staged, non_blocking=True)
                self._stream.wait()
        return copy

    def _pieces(self, source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield source, target and buffer as bytes, as much of them as the buffer takes at once."""
        if self._buffer is None:
            self._buffer = self._stream.staging(self._size)
        parts = (each.view(-1).view(torch.uint8).split(self._size) for each in (source, target))
        for one, other in zip(*parts, strict=True):
            if len(one):
                yield one, other, self._buffer[: len(one)]


class DeviceCopies:
    """Copies between the host and the devices of a model, each CUDA device with streams of its own."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._down: dict[torch.device, Any] = {}
        self._up: dict[torch.device, Any] = {}
        for device in set(devices):
            if device.type == "cuda":
                self._down[device], self._up[device] = (StagedCopies(CudaStream(device)) for _ in range(2))

    def to_host(self, tensor: Tensor) -> Tensor:
        """Return a copy in host memory."""
        staged = self._down.get(tensor.device)
        return tensor.to("cpu", copy=True) if staged is None else staged.to_host(tensor)

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return a copy of a host tensor."""
        staged = self._up.get(device)
        return tensor.to(device, copy=True) if staged is None else staged.to_device(tensor, device)
