"""The state of a recurrent layer in a static batch: as far as tokens are counted, and with the pending one."""

from __future__ import annotations

import torch
from torch import Tensor

from zsmerge_llm.attention.call import RecurrentCall
from zsmerge_llm.attention.recurrent import MixerCache
from zsmerge_llm.kvcache.recurrent_state import RecurrentSpec, RecurrentState


class StaticState:
    """One layer's state for all rows of a batch, twice: a state cannot forget a token that turns out wrong.

    counted: after the tokens that count. pending: after one more, that of the last step.
    """

    def __init__(self, spec: RecurrentSpec, rows: int) -> None:
        self.counted = RecurrentState(spec, rows)
        self.pending = RecurrentState(spec, rows)

    def load(self, row: int, given: RecurrentState) -> None:
        """Copy the state of a one-row cache into a row."""
        for name, tensor in self.counted.tensors.items():
            tensor[row].copy_(given.tensors[name][0])

    def clear(self, row: int) -> None:
        """Set a row to the state before anything was read."""
        for tensor in self.counted.tensors.values():
            tensor[row].zero_()

    def step(self, call: RecurrentCall) -> Tensor:
        """Mix the next token of the first rows, [B, 1, D]; it is pending then."""
        some = RecurrentState(self.counted.spec, 0)
        for name, tensor in self.pending.tensors.items():
            some.tensors[name] = tensor[: len(call.hidden)].copy_(self.counted.tensors[name][: len(call.hidden)])
        return call.run(call.hidden, MixerCache(some))

    def commit(self, kept: Tensor) -> None:
        """Count the pending tokens of the first rows where `kept`, int64 [B], is 1."""
        for name, tensor in self.counted.tensors.items():
            own = tensor[: len(kept)]
            is_kept = (kept > 0).view(-1, *[1] * (own.dim() - 1))
            own.copy_(torch.where(is_kept, self.pending.tensors[name][: len(kept)], own))
