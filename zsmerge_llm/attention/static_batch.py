"""A batch of conversations in fixed memory, and its decode step as tensor functions that can be captured as a graph.

The tensors of all layers of one shape and budget are stacked, [rows, layers, ...], so that what is small is done for
all of them in one kernel. Nothing in a step depends on a number of the host or waits for it: no list, no copy between
devices, no new host tensor. The host foresees how full each row is, and decides between steps when one has to be
compressed.

A step's tokens are *pending* when it has run: attended to, and not counted. The next step, or `commit`, counts as many
of them as were right. So a rejected draft, an answer that was closed or a cancelled step leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zsmerge_llm.attention.backend import AttentionBackend
from zsmerge_llm.attention.call import AttentionCall, RecurrentCall
from zsmerge_llm.attention.interface import forward
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.attention.passes import ForwardPass
from zsmerge_llm.attention.static_states import StaticState
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.kvcache import eviction
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.layer_cache import TENSORS, LayerCache
from zsmerge_llm.kvcache.policies import policy_of
from zsmerge_llm.kvcache.recurrent_state import RecurrentSpec
from zsmerge_llm.kvcache.rope import PositionMap
from zsmerge_llm.kvcache.scoring import TensorScoring
from zsmerge_llm.kvcache.slots import PER_SLOT, AttentionInputs, LayerSpec

COMPRESSED_BYTES = 2**25
"""Bytes of slots that are compressed at once: as many layers of a row. Temporary memory is some ten times that."""


@dataclass(eq=False)
class LayerGroup:
    """Layers of one shape and budget. stacked: a layer cache whose rows are the rows · layers of the batch, row-major.

    indices: of the layers in the model. queries [rows · layers, Hq, N, D], sinks [rows · layers, Hq]: of the pending
    tokens, where the policy uses them.
    """

    indices: list[int]
    stacked: LayerCache
    queries: Tensor | None
    sinks: Tensor | None = None

    @property
    def config(self) -> CacheConfig:
        """The layers' configuration."""
        return self.stacked.config

    def first_rows(self, rows: int) -> LayerCache:
        """Return views of all layers' tensors in the first rows of the batch: [rows · layers, ...]."""
        return self.stacked.map(lambda tensor: tensor[: rows * len(self.indices)])

    def layer(self, at: int, rows: int) -> LayerCache:
        """Return views of one layer's tensors in the first rows of the batch: [rows, ...]."""
        return self.stacked.map(lambda tensor: self.of_layer(tensor, at, rows))

    def of_layer(self, tensor: Tensor, at: int, rows: int) -> Tensor:
        """Return a view of one layer's part of a stacked tensor, for the first rows: [rows, ...]."""
        return tensor.unflatten(0, (-1, len(self.indices)))[:rows, at]

    def of_row(self, tensor: Tensor, row: int) -> Tensor:
        """Return a view of one row's part of a stacked tensor: [layers, ...]."""
        return tensor.unflatten(0, (-1, len(self.indices)))[row]

    def repeated(self, tensor: Tensor) -> Tensor:
        """Repeat a tensor [rows, ...] for each layer: [rows · layers, ...]."""
        return tensor.repeat_interleave(len(self.indices), dim=0, output_size=len(tensor) * len(self.indices))

    @property
    def parts(self) -> list[tuple[int, int]]:
        """The layers that are compressed together, as first and end index within the group."""
        size = sum(getattr(self.stacked, name)[0].nbytes for name in PER_SLOT)
        step = max(1, COMPRESSED_BYTES // size)
        return [(start, min(start + step, len(self.indices))) for start in range(0, len(self.indices), step)]


@dataclass(eq=False)
class StepInputs:
    """What the host gives each step, in one tensor int64 [rows, 3 + N]: offset, kept, count and tokens of each row.

    offset: text position minus RoPE position. kept: how many pending tokens were right. count: how many of the tokens
    are real; 0 for a free row, or one that waits.
    """

    packed: Tensor

    @classmethod
    def empty(cls, rows: int, num_tokens: int, device: torch.device | None = None) -> StepInputs:
        """Return inputs of zeros, on the host by default."""
        return cls(torch.zeros(rows, 3 + num_tokens, dtype=torch.long, device=device))

    def first(self, rows: int, num_tokens: int) -> StepInputs:
        """Return a view of the first rows and tokens."""
        return StepInputs(self.packed[:rows, : 3 + num_tokens])

    @property
    def offset(self) -> Tensor:
        return self.packed[:, 0]

    @property
    def kept(self) -> Tensor:
        return self.packed[:, 1]

    @property
    def count(self) -> Tensor:
        return self.packed[:, 2]

    @property
    def tokens(self) -> Tensor:
        return self.packed[:, 3:]


class StaticBatch:
    """Fixed tensors of a batch of conversations of one cache configuration.

    Args:
        specs: of the model's layers. rows: conversations that there is memory for. num_tokens: most tokens of a step.
        capacity: entries of each layer of the exact cache, which has no size of its own. recurrent: of the layers that
            keep a state: steps of several tokens have one row then.

    Attributes:
        states: of the recurrent layers.
        lengths: int64 [rows], tokens that each row has read, pending ones not counted.
        logits: [rows, num_tokens, vocab], after each token of the last step.
    """

    def __init__(
        self,
        config: CacheConfig,
        specs: Sequence[LayerSpec],
        vocab_size: int,
        dtype: torch.dtype,
        rows: int,
        num_tokens: int,
        capacity: int = 0,
        recurrent: Sequence[RecurrentSpec] = (),
    ) -> None:
        self.config, self.specs = config, tuple(specs)
        self.num_rows, self.num_tokens = rows, num_tokens
        device = specs[-1].device
        own = Cache(config, specs, rows=0).layers
        self.groups = [self._group(own, indices, capacity) for indices in _alike(own)]
        self.states = [StaticState(spec, rows, num_tokens) for spec in recurrent]
        self.inputs = StepInputs.empty(rows, num_tokens, device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.logits = torch.zeros(rows, num_tokens, vocab_size, dtype=dtype, device=device)
        self.pending_positions = torch.zeros(rows, num_tokens, dtype=torch.int32, device=device)
        self._views: dict[int, Cache] = {}
        self.cache = self.first_rows(rows)

    def _group(self, layers: list[LayerCache], indices: list[int], capacity: int) -> LayerGroup:
        """Allocate the stacked tensors of alike layers."""
        config, spec = layers[indices[0]].config, layers[indices[0]].spec
        stacked = LayerCache(config, spec, self.num_rows * len(indices))
        stacked.grow_to(capacity)
        queries = sinks = None
        if config.slots is not None and _needs_queries(config):
            shape = (len(stacked.filled), spec.query_heads, self.num_tokens, spec.key_dim)
            queries = torch.zeros(shape, dtype=spec.dtype, device=spec.device)
        return LayerGroup(indices, stacked, queries, sinks)

    def first_rows(self, rows: int) -> Cache:
        """Return a cache whose layers are views of the first rows. Only that of all rows has host numbers."""
        if rows not in self._views:
            cache = Cache(self.config, self.specs, rows=0)
            for group in self.groups:
                for at, index in enumerate(group.indices):
                    cache.layers[index] = group.layer(at, rows)
                    cache.layers[index].num_filled = [group.config.residual] * rows
            cache.lengths = [0] * rows
            cache.position_maps = [PositionMap()] * rows
            cache.states = [state.counted for state in self.states]
            self._views[rows] = cache
        return self._views[rows]

    # -- conversations -----------------------------------------------------------------------------------------------

    def load(self, row: int, cache: Cache) -> None:
        """Copy a one-row cache into a row. It must have room there."""
        for group in self.groups:
            for name in TENSORS:
                target = group.of_row(getattr(group.stacked, name), row)
                given = [getattr(cache.layers[index], name)[0] for index in group.indices]
                if name in PER_SLOT and given[0].shape[1] < target.shape[2]:  # the exact cache
                    target[:, :, given[0].shape[1] :] = 0
                    target = target[:, :, : given[0].shape[1]]
                for own, other in zip(target, given, strict=True):
                    own.copy_(other[:, : own.shape[1]] if name in PER_SLOT else other)
        for state, other_state in zip(self.states, cache.states, strict=True):
            state.load(row, other_state)
        self.lengths[row] = cache.lengths[0]
        self.cache.lengths[row], self.cache.position_maps[row] = cache.lengths[0], cache.position_maps[0]
        for layer, own in zip(self.cache.layers, cache.layers, strict=True):
            layer.num_filled[row] = own.num_filled[0]

    def clear(self, row: int) -> None:
        """Empty a row, so that whatever a step writes there has room."""
        for group in self.groups:
            group.of_row(group.stacked.filled, row).fill_(group.config.residual)
        for state in self.states:
            state.clear(row)
        self.lengths[row] = 0
        self.cache.lengths[row], self.cache.position_maps[row] = 0, PositionMap()
        for layer in self.cache.layers:
            layer.num_filled[row] = layer.config.residual

    def unload(self, row: int) -> Cache:
        """Return an independent copy of a row, as a cache of its own, without logits. Nothing of it is pending."""
        return self.cache.select_rows([row])

    # -- the step ----------------------------------------------------------------------------------------------------

    def commit(self, rows: int, num_tokens: int) -> None:
        """Count those tokens of a step of the first rows that were right, and forget the others."""
        kept = self.inputs.kept[:rows]
        valid = torch.arange(num_tokens, device=kept.device) < kept[:, None]
        self.lengths[:rows] += kept
        for state in self.states:
            state.commit(kept, num_tokens)
        for group in self.groups:
            eviction.commit(group.first_rows(rows), self._pending(group, self.pending_positions[:rows], valid))

    def _pending(self, group: LayerGroup, positions: Tensor, valid: Tensor) -> AttentionInputs:
        """Return the pending tokens of all layers of a group. Their keys and values are in their slots."""
        (rows, new), size = valid.shape, len(valid) * len(group.indices)
        empty = self.logits.new_empty(0)
        positions, valid = group.repeated(positions[:, :new]), group.repeated(valid)
        return AttentionInputs(
            queries=empty if group.queries is None else group.queries[:size, :, :new],
            keys=empty,
            values=empty,
            positions=positions,
            valid=valid,
            query_positions=positions.masked_fill(~valid, -1),
            counts=valid.sum(-1, dtype=torch.int32),
            num_new_tokens=[],
            seen=group.repeated(self.lengths[:rows]),
            ops=TensorScoring(),
            sinks=None if group.sinks is None else group.sinks[:size],
        )

    def step(self, model: PreTrainedModel, backend: AttentionBackend, rows: int, num_tokens: int) -> None:
        """Commit, then run the model over the next tokens of the first rows; `logits` are those after each of them."""
        self.commit(rows, num_tokens)
        given = self.inputs.first(rows, num_tokens)
        steps = torch.arange(num_tokens, device=given.packed.device)
        # Padding repeats the last position: it must not reach beyond the model's window.
        last = (given.count - 1).clamp(min=0)[:, None]
        positions, valid = self.lengths[:rows, None] + torch.minimum(steps, last), steps < given.count[:, None]
        self.pending_positions[:rows, :num_tokens] = positions
        for group in self.groups:
            group.first_rows(rows).reserve(group.repeated(positions), group.repeated(valid))
        layout = PassLayout(num_tokens, positions, valid, [], self.lengths[:rows] + given.count, static=True)
        handler = StaticPass(self.first_rows(rows), layout, backend, batch=self)
        logits = forward(
            model,
            handler,
            input_ids=given.tokens,
            position_ids=(positions - given.offset[:, None]).clamp(min=0),
            logits_to_keep=num_tokens,
        )
        self.logits[:rows, :num_tokens] = logits

    def compress(self, group: LayerGroup, row: Tensor, keep: Callable[..., None] | None = None) -> None:
        """Compress all layers of a group in one row, int64 [1] on the device, which is full there."""
        for start, end in group.parts:
            which = row * len(group.indices) + torch.arange(start, end, device=row.device)
            seen = self.lengths.index_select(0, row).expand(end - start)
            some = eviction.compressed_rows(group.stacked, which, seen)
            (keep or group.stacked.put_rows)(which, some)


@dataclass
class StaticPass(ForwardPass):
    """A pass over a static batch: its tokens stay pending."""

    batch: StaticBatch | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        """Write the tokens, attend, and keep the queries until they are counted: [rows, Hq, n, D]."""
        output = super().attend(call)
        assert self.batch is not None
        group = next(group for group in self.batch.groups if call.layer in group.indices)
        at, rows, new = group.indices.index(call.layer), *call.query.shape[::2]
        if group.queries is not None:
            group.of_layer(group.queries, at, rows)[:, :, :new] = call.query
            if call.sinks is not None:
                if group.sinks is None:
                    group.sinks = group.queries.new_zeros(group.queries.shape[:2])
                group.of_layer(group.sinks, at, self.batch.num_rows)[:] = call.sinks
        return output

    def mix(self, call: RecurrentCall) -> Tensor:
        """Mix the tokens into copies of the layer's state, one behind each, which are kept until they are counted."""
        assert self.batch is not None
        return self.batch.states[call.index].step(call)

    def _update(self, view: object, inputs: AttentionInputs) -> None:
        """Count nothing yet."""


def _alike(layers: Sequence[LayerCache]) -> list[list[int]]:
    """Return the indices of layers in groups of one specification and configuration."""
    kinds: dict[object, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault((layer.spec, layer.config), []).append(index)
    return list(kinds.values())


def _needs_queries(config: CacheConfig) -> bool:
    policy = policy_of(config)
    return policy.records_queries or policy.observes_every_pass
