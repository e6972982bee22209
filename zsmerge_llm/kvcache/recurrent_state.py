"""The state of a recurrent layer (gated delta net, state space, short convolution): its size never depends on the text.

It stands beside the slots of the attention layers in a `Cache`, and is copied, stacked and saved with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state: its name, its shape for one row, and its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class RecurrentSpec:
    """What one recurrent layer keeps between two passes, as seen in a one-token forward pass.

    layer: its index in the model. tensors: "conv" holds the newest inputs of a convolution, oldest first; "recurrent"
    holds a sum over all tokens. Behind the name stands which of several it is.
    """

    layer: int
    tensors: tuple[StateTensor, ...]
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of the state of one row."""
        return sum(prod(each.shape) * each.dtype.itemsize for each in self.tensors)


class RecurrentState:
    """The state of one recurrent layer for several rows.

    tensors: by name, [B, ...]; zeros before anything was read.
    """

    def __init__(self, spec: RecurrentSpec, rows: int) -> None:
        self.spec = spec
        self.tensors = {
            each.name: torch.zeros(rows, *each.shape, dtype=each.dtype, device=spec.device) for each in spec.tensors
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def select_rows(self, rows: list[int] | slice) -> RecurrentState:
        """Return an independent copy of some rows."""
        some = RecurrentState(self.spec, 0)
        some.tensors = {name: tensor[rows].clone() for name, tensor in self.tensors.items()}
        return some

    def clone(self) -> RecurrentState:
        """Return an independent copy."""
        return self.select_rows(slice(None))

    def put_rows(self, rows: list[int], some: RecurrentState) -> None:
        """Overwrite some rows with those of another state."""
        for name, tensor in self.tensors.items():
            tensor[rows] = some.tensors[name]

    @classmethod
    def stack(cls, states: list[RecurrentState]) -> RecurrentState:
        """Return the rows of several states of one layer as one; they are copies."""
        stacked = cls(states[0].spec, 0)
        for name in stacked.tensors:
            stacked.tensors[name] = torch.cat([state.tensors[name] for state in states])
        return stacked
