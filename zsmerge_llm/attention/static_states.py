"""The state of a recurrent layer in a static batch: as far as tokens are counted, and behind each pending one."""

from __future__ import annotations

import torch
from torch import Tensor

from zsmerge_llm.attention.call import RecurrentCall
from zsmerge_llm.attention.recurrent import MixerCache
from zsmerge_llm.kvcache.recurrent_state import RecurrentSpec, RecurrentState


class StaticState:
    """One layer's state for all rows of a batch. It cannot forget a token, so it is kept behind each pending one, too.

    counted: after the tokens that count. pending: after each token of the last step; the first of all rows, the others
    of one row only: a draft is verified where one conversation decodes.
    """

    def __init__(self, spec: RecurrentSpec, rows: int, num_tokens: int) -> None:
        self.counted = RecurrentState(spec, rows)
        self.pending = [RecurrentState(spec, 1 if token else rows) for token in range(num_tokens)]

    def load(self, row: int, given: RecurrentState) -> None:
        """Copy the state of a one-row cache into a row."""
        for name, tensor in self.counted.tensors.items():
            tensor[row].copy_(given.tensors[name][0])

    def clear(self, row: int) -> None:
        """Set a row to the state before anything was read."""
        for tensor in self.counted.tensors.values():
            tensor[row].zero_()

    def step(self, call: RecurrentCall) -> Tensor:
        """Mix the next tokens of the first rows, [B, T, D]; they are pending then. Several only in a single row."""
        mixed, before = [], self.counted
        for token, after in zip(call.hidden.split(1, dim=1), self.pending, strict=False):
            some = RecurrentState(self.counted.spec, 0)
            for name, tensor in after.tensors.items():
                some.tensors[name] = tensor[: len(token)].copy_(before.tensors[name][: len(token)])
            mixed.append(call.run(token, MixerCache(some)))
            before = after
        return torch.cat(mixed, dim=1)

    def commit(self, kept: Tensor, num_tokens: int) -> None:
        """Count the first `kept`, int64 [B], pending tokens of a step of the first rows."""
        for name, tensor in self.counted.tensors.items():
            own = tensor[: len(kept)]
            count = kept.view(-1, *[1] * (own.dim() - 1))
            for token, after in enumerate(self.pending[:num_tokens]):
                own.copy_(torch.where(count == token + 1, after.tensors[name][: len(kept)], own))
