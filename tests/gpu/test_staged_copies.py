"""Copies through a pinned buffer, in pieces and in the right order, with a stream that only records."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zsmerge_llm.gpu.staged_copies import DeviceCopies, StagedCopies


class RecordedStream:
    """A stream whose copies are complete at `wait` only; it records what happens."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.sizes: list[int] = []

    def staging(self, size: int) -> Tensor:
        self.sizes.append(size)
        return torch.empty(size, dtype=torch.uint8)

    @contextmanager
    def after_computing(self) -> Iterator[None]:
        self.events.append("queue")
        yield

    def wait(self) -> None:
        self.events.append("wait")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.bool, torch.float16]),
    transposed=st.booleans(),
)
def test_a_copy_there_and_back_is_the_same_bit_for_bit(shape: list[int], dtype: torch.dtype, transposed: bool) -> None:
    stream = RecordedStream()
    copies = StagedCopies(stream, size=64)
    tensor = (torch.randn(shape) * 100).to(dtype)
    if transposed:
        tensor = tensor.permute([*reversed(range(tensor.dim()))])
    down = copies.to_host(tensor)
    up = copies.to_device(down, torch.device("cpu"))

    assert down.dtype == up.dtype == dtype
    assert torch.equal(down, tensor)
    assert torch.equal(up, tensor)
    assert not {down.data_ptr(), up.data_ptr()} & {tensor.data_ptr()} or not tensor.numel()
    pieces = -(-tensor.nbytes // 64)
    assert stream.events == ["queue", "wait"] * 2 * pieces
    assert sum(stream.sizes) <= 64, "one buffer, made when it is needed"


def test_a_buffer_is_used_again_only_when_the_copy_from_it_is_done() -> None:
    stream = RecordedStream()
    copies = StagedCopies(stream, size=16)
    source = torch.arange(32, dtype=torch.int32)
    assert torch.equal(copies.to_device(source, torch.device("cpu")), source)
    assert stream.events == ["queue", "wait"] * 8


def test_a_device_without_streams_copies_plainly() -> None:
    copies, tensor = DeviceCopies([torch.device("cpu")]), torch.randn(3)
    there = copies.to_host(tensor)
    back = copies.to_device(there, torch.device("cpu"))
    assert torch.equal(back, tensor)
    assert len({tensor.data_ptr(), there.data_ptr(), back.data_ptr()}) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_of_a_cuda_device_are_the_same_bit_for_bit() -> None:
    device = torch.device("cuda", 0)
    copies, tensor = DeviceCopies([device]), torch.randn(3_000_017, device=device)
    there = copies.to_host(tensor)
    assert there.device.type == "cpu"
    assert torch.equal(copies.to_device(there, device), tensor)
