"""Decode conversations in fixed memory by steps that a device may repeat as graphs, one for each shape.

Conversations join a row and leave it again. The decoder keeps the host's numbers in step with the device: how many
tokens each row has read, how full its layers are, and so when a row has to be compressed, between two steps. See
`attention.static_batch` for the steps themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zsmerge_llm.attention.backend import Replay
from zsmerge_llm.attention.interface import ModelLayers
from zsmerge_llm.attention.static_batch import LayerGroup, StaticBatch, StepInputs
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.model_runner import STEP_TOKENS, ModelRunner
from zsmerge_llm.kvcache.cache import Cache


class StaticDecoder:
    """Rows of conversations of one cache configuration that decode in fixed memory.

    Args:
        batch: the memory. Steps have one token, or as many as it is made for.
        sizes: how many rows a step may have, ascending; it has the least that holds all rows in use.

    Attributes:
        caches: of each row, the conversation that decodes there; None for a free row.
    """

    def __init__(self, runner: ModelRunner, batch: StaticBatch, sizes: Sequence[int]) -> None:
        self.batch = batch
        self.caches: list[Cache | None] = [None] * batch.num_rows
        self._runner, self._remapper = runner, runner.remapper
        self._sizes = [size for size in sizes if size < batch.num_rows] + [batch.num_rows]
        self._replays: dict[tuple[object, ...], Replay] = {}
        self._host_inputs = StepInputs.empty(batch.num_rows, batch.num_tokens)
        self._row = torch.zeros(1, dtype=torch.long, device=batch.lengths.device)
        self._pending = [0] * batch.num_rows  # tokens of each row that are pending
        self._pending_shape: tuple[int, int] | None = None  # of the step that they come from
        self._kept = [0] * batch.num_rows  # how many of them were right

    # -- rows --------------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Rows that no conversation uses."""
        return self.caches.count(None)

    @torch.inference_mode()
    def join(self, cache: Cache) -> int:
        """Copy a one-row cache into a free row, the first one, and return the row."""
        row = self.caches.index(None)
        self._commit()  # what is pending in other rows must not be counted with this one's numbers
        self.batch.load(row, cache)
        self.caches[row] = cache
        return row

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """Bring the row's conversation up to date, and free the row. What is pending and not kept is forgotten."""
        self._commit()
        cache = self.caches[row]
        assert cache is not None
        logits = cache.logits
        cache.replace_with(self.batch.unload(row))
        cache.logits = logits
        self.caches[row] = None
        self.batch.clear(row)

    def num_pending(self, row: int) -> int:
        """Return how many of a row's tokens are pending, and not kept yet."""
        return self._pending[row] - self._kept[row]

    def has_room(self, row: int, new: int) -> bool:
        """Return whether every layer has entries for so many tokens of a row, behind the pending ones that are kept."""
        layers = self.batch.cache.layers
        return all(layer.num_filled[row] + self._kept[row] + new <= layer.capacity for layer in layers)

    @property
    def takes_draft(self) -> bool:
        """Whether a step of `num_tokens` fits into every row in use without compressing: all write as many.

        With recurrent layers it has one row: their states are kept behind each token there only.
        """
        if self.batch.states and self._rows() > 1:
            return False
        new = self.batch.num_tokens + (self.batch.config.slots is not None)
        return all(self.has_room(row, new) for row, cache in enumerate(self.caches) if cache is not None)

    def can_load(self, cache: Cache, new: int) -> bool:
        """Return whether a conversation, and so many tokens behind it, have room in a row."""
        layers = zip(cache.layers, self.batch.cache.layers, strict=True)
        return all(max(layer.num_filled) + new <= own.capacity for layer, own in layers)

    # -- steps -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Run the next tokens of some rows; they are pending then. Returns the logits after each, [n, vocab], by row.

        All pending tokens that were not kept are forgotten. One token each, or of one row alone up to `num_tokens`
        where they fit (`takes_draft`). The logits stay valid until the next step.
        """
        self._runner.check_usable()
        num_tokens = 1 if max(map(len, tokens.values())) == 1 else self.batch.num_tokens
        rows = self._rows()
        is_new = ("step", rows, num_tokens) not in self._replays  # capturing overwrites the keys of what is pending
        new = [len(tokens.get(row, ())) for row in range(self.batch.num_rows)]
        ahead = [count + kept if count else 0 for count, kept in zip(new, self._kept, strict=True)]
        is_due = self._remapper.is_due(self.batch.cache, ahead, 0)
        if is_new or is_due or self._pending_shape != (rows, num_tokens) or self._fills_up():
            self._commit()
        replay = self._replay("step", rows, num_tokens)
        self._remapper.ensure_positions(self.batch.cache, new, 0)
        inputs = self._host_inputs
        inputs.packed.zero_()
        for row, ids in tokens.items():
            inputs.count[row] = len(ids)
            inputs.tokens[row, : len(ids)] = torch.tensor(list(ids))
        self._upload()
        self._count_kept()
        replay()
        self._pending_shape = (rows, num_tokens)
        for row, ids in tokens.items():
            self._pending[row] = len(ids)
        return {row: self.batch.logits[row, : len(ids)] for row, ids in tokens.items()}

    def keep(self, row: int, count: int | None = None) -> None:
        """Say how many of a row's pending tokens were right, all by default. They are counted with the next step."""
        self._kept[row] = self._pending[row] if count is None else count
        cache = self.caches[row]
        if cache is not None and self._kept[row]:
            cache.logits = self.batch.logits[row, self._kept[row] - 1][None].clone()

    def _rows(self) -> int:
        """Return the rows of a step: the least size that holds all that are in use."""
        last = max((row for row, cache in enumerate(self.caches) if cache is not None), default=0)
        return next(size for size in self._sizes if size > last)

    def _fills_up(self) -> bool:
        """Return whether counting what is kept fills a row up, so that it has to be compressed before the next step."""
        return any(
            layer.config.slots is not None and layer.num_filled[row] + kept >= layer.capacity
            for row, kept in enumerate(self._kept)
            if kept
            for layer in self.batch.cache.layers
        )

    @torch.inference_mode()
    def _commit(self) -> None:
        """Count what is kept and forget what else is pending; compress the rows that are full then."""
        if self._pending_shape is not None:
            replay = self._small_replay("commit", *self._pending_shape)
            self._host_inputs.packed.zero_()
            self._upload()
            self._count_kept()
            replay()
            self._pending_shape = None
        for group in self.batch.groups:
            layer = self.batch.cache.layers[group.indices[0]]
            for row, filled in enumerate(layer.num_filled):
                if self.caches[row] is not None and layer.config.slots is not None and filled >= layer.capacity:
                    self._compress(group, row)

    def _compress(self, group: LayerGroup, row: int) -> None:
        self._row.fill_(row)
        self._small_replay("compress", self.batch.groups.index(group), 0)()
        for index in group.indices:
            layer = self.batch.cache.layers[index]
            layer.num_filled[row] = layer.config.slots or 0

    def _count_kept(self) -> None:
        """Count on the host what the next run counts on the device."""
        cache = self.batch.cache
        for row, kept in enumerate(self._kept):
            if kept:
                cache.lengths[row] += kept
                for layer in cache.layers:
                    layer.num_filled[row] += kept
        self._kept = [0] * len(self._kept)
        self._pending = [0] * len(self._pending)

    def _upload(self) -> None:
        """Send the inputs of the next run to the device, in one copy."""
        inputs = self._host_inputs
        inputs.kept.copy_(torch.tensor(self._kept))
        inputs.offset.copy_(torch.tensor([positions.offset for positions in self.batch.cache.position_maps]))
        self.batch.inputs.packed.copy_(inputs.packed, non_blocking=True)

    def _replay(self, what: str, rows: int, num_tokens: int) -> Replay:
        """Return what runs a step, a commit or a compression (see `_work`), captured when it first occurs."""
        key = (what, rows, num_tokens)
        if key not in self._replays:
            self._replays[key] = self._captured(what, rows, num_tokens)
        return self._replays[key]

    def _small_replay(self, *key: Any) -> Replay:
        """Return what runs a commit or a compression; where no memory is left to capture it, run it as it is.

        A conversation must be able to leave when memory has run out.
        """
        try:
            return self._replay(*key)
        except torch.OutOfMemoryError:
            return partial(self._work, *key)

    def _captured(self, what: str, rows: int, num_tokens: int) -> Replay:
        def warm_up() -> None:
            self.batch.inputs.packed[:, 1:3] = 0  # nothing kept, nothing new
            self._work(what, rows, num_tokens, trace=False)

        return self._runner.backend.capture(partial(self._work, what, rows, num_tokens), warm_up)

    def _work(self, what: str, which: int, num_tokens: int, trace: bool = True) -> None:
        """Run a step or a commit of the first `which` rows, or compress group `which` in the row of `_row`.

        trace: False to throw away what is compressed.
        """
        if what == "step":
            self.batch.step(self._runner.model, self._runner.backend, which, num_tokens)
        elif what == "commit":
            self.batch.commit(which, num_tokens)
        else:
            self.batch.compress(self.batch.groups[which], self._row, keep=None if trace else lambda rows, layer: None)


def make_decoder(
    runner: ModelRunner, layers: ModelLayers, vocab_size: int, config: CacheConfig, rows: int, capacity: int
) -> StaticDecoder:
    """Allocate memory in which so many conversations of one configuration decode. capacity: see `StaticBatch`."""
    specs, recurrent, dtype = layers.attention, layers.recurrent, runner.model.dtype
    batch = StaticBatch(config, specs, vocab_size, dtype, rows, STEP_TOKENS, capacity, recurrent)
    return StaticDecoder(runner, batch, runner.backend.static_sizes or ())
