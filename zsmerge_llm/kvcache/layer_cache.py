"""Store one layer of the compressed cache: static tensors that hold a fixed number of slots per KV head.

P = slots + stage entries per row and KV head, laid out `[residual | verbatim tokens | stage]`. Verbatim tokens stand in
order of position; new tokens are written behind the last used slot of each row (`num_filled`). When a row has used up
the P entries, `eviction` compresses it back to `slots`. A chunk that does not fit is attended beside the held slots and
compressed in the same pass: nothing larger than slots + stage + chunk ever exists, and only for one layer at a time.
What happens to a row depends on nothing but that row. Everything mutates in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import DeviceMemoryError
from zsmerge_llm.kvcache.rope import Rotation
from zsmerge_llm.kvcache.slots import PER_SLOT, AttentionInputs, LayerSpec, Slots

QUERY_STATE = ("queries", "query_positions")
SAVED = (
    *PER_SLOT,
    *("residual_keys", "residual_values", "dropped", "multi_turn", "accumulated_until"),
    *QUERY_STATE,
)
"""The tensors of a layer that are saved."""
TENSORS = (*SAVED, "filled")
"""All tensors of a layer: what is copied and stacked."""
MIN_WINDOW_STAGE = 32
"""Compressing a sliding window at each step gains nothing."""


def layer_configs(config: CacheConfig, specs: Sequence[LayerSpec]) -> list[CacheConfig]:
    """Return each layer's own configuration: a sliding-window layer keeps exactly its window, any other its budget.

    Raises:
        ConfigError: `config.layer_budgets` for another number of full-attention layers.
    """
    if config.slots is None:
        return [config] * len(specs)
    uniform = config if config.layer_budgets is None else config.replace(layer_budgets=None)
    slots = config.layer_slots(sum(spec.window is None for spec in specs))
    by_slots = {each: uniform if each == uniform.slots else uniform.replace(slots=each) for each in set(slots)}
    by_window = {window: _sliding(uniform, window) for window in {spec.window for spec in specs} if window is not None}
    full = iter(slots)
    return [by_slots[next(full)] if spec.window is None else by_window[spec.window] for spec in specs]


def layer_specs(config: CacheConfig, specs: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Return what each layer needs: with its gate only where a text is read before any question is known.

    A user's own settings, and any prompt that comes with its question, are ranked by a probe.
    """
    if not any(spec.gate for spec in specs) or (config.uses_question and config == config.query_agnostic()):
        return list(specs)
    return [replace(spec, gate=None) for spec in specs]


def _sliding(config: CacheConfig, window: int) -> CacheConfig:
    stage = max(config.stage, MIN_WINDOW_STAGE)
    return config.replace(slots=window + 1, sink=0, recent=window, residual=0, stage=stage, policy="recency")


class LayerCache(Slots):
    """The slots of one layer for several rows, by its own configuration (`layer_configs`).

    Besides `Slots` [B, H, P, ...] it holds: filled int32 [B], the used slots of each row, for what must not wait for
    the host, and num_filled, the same on the host; residual_keys and residual_values float32 [B, H, R, D]; dropped
    float32 [B, H], tokens evicted without a trace; a ring of the newest queries [B, Hq, W, D] and their positions int32
    [B, W] (-1: none), where the policy records them; multi_turn bool [B], whether the conversation has been answered
    before; accumulated_until int32 [B], the position of the newest query that is part of `cumulative_attention`.
    """

    def __init__(self, config: CacheConfig, spec: LayerSpec, rows: int) -> None:
        self.config = config
        self.spec = spec
        self.num_filled = [config.residual] * rows
        capacity = self._least_capacity
        heads, device = spec.kv_heads, spec.device

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            try:
                return torch.zeros(rows, *shape, dtype=dtype, device=device)
            except torch.OutOfMemoryError:  # of a device, which its engine explains
                raise
            except RuntimeError as error:  # of host memory
                raise DeviceMemoryError(f"There is no memory for {capacity:,} slots: give fewer.") from error

        self.filled = zeros(dtype=torch.int32) + config.residual
        self.keys = zeros(heads, capacity, spec.key_dim, dtype=spec.dtype)
        self.values = zeros(heads, capacity, spec.value_dim, dtype=spec.dtype)
        self.multiplicity = zeros(heads, capacity)
        self.score = zeros(heads, capacity)
        self.cumulative_attention = zeros(heads, capacity)
        self.position = zeros(heads, capacity, dtype=torch.int32)
        # The means in float32: rounded to bfloat16 at each merge, they would stop moving after some 200 tokens.
        self.residual_keys = zeros(heads, config.residual, spec.key_dim)
        self.residual_values = zeros(heads, config.residual, spec.value_dim)
        self.dropped = zeros(heads)
        self.multi_turn = zeros(dtype=torch.bool)
        self.accumulated_until = zeros(dtype=torch.int32) - 1
        self.queries = zeros(spec.query_heads, config.num_recorded_queries, spec.key_dim, dtype=spec.dtype)
        self.query_positions = zeros(config.num_recorded_queries, dtype=torch.int32) - 1

    # -- how full ----------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """P, the entries there is room for."""
        return self.keys.shape[2]

    @property
    def _least_capacity(self) -> int:
        """The entries of a fresh layer."""
        return self.config.stage if self.config.slots is None else self.config.slots + self.config.stage

    @property
    def is_trimmed(self) -> bool:
        """Whether it has lost its free entries, and cannot grow new ones."""
        return self.config.slots is not None and self.capacity < self._least_capacity

    @property
    def uniform(self) -> bool:
        """Whether all rows have used the same number of slots."""
        return self.num_filled.count(self.num_filled[0]) == len(self.num_filled)

    @property
    def needs_compression(self) -> list[bool]:
        """Which rows have tokens in their stage."""
        return [self.config.slots is not None and filled > self.config.slots for filled in self.num_filled]

    def has_room(self, new: int) -> bool:
        """Return whether every row has `new` free slots."""
        return max(self.num_filled) + new <= self.capacity

    def fits(self, new: int) -> bool:
        """Return whether every row can take `new` tokens without compressing."""
        return self.config.slots is None or max(self.num_filled) + new < self.capacity

    def holds_any(self, first: int, end: int) -> bool:
        """Return whether a slot stands for one of the tokens from `first` up to `end`, or, merged, for more."""
        return bool(((self.position >= first) & (self.position < end) & (self.multiplicity > 0)).any())

    def filled_after(self, inputs: AttentionInputs) -> list[int]:
        """Return the slots that each row has used once these tokens are in."""
        return [filled + new for filled, new in zip(self.num_filled, inputs.num_new_tokens, strict=True)]

    def rows_due(self, inputs: AttentionInputs) -> list[bool]:
        """Return which rows have to compress when these tokens come in."""
        return [self.config.slots is not None and filled >= self.capacity for filled in self.filled_after(inputs)]

    def due(self, inputs: AttentionInputs) -> Tensor:
        """Return `rows_due` as bool [B] on the layer's device. Not for the exact cache."""
        return self.filled + inputs.counts >= self.capacity

    def count(self, num_new_tokens: Sequence[int], counts: Tensor) -> None:
        """Count tokens that stand in their slots already: of each row, on the host, and int32 [B] on the device."""
        self.num_filled = [filled + new for filled, new in zip(self.num_filled, num_new_tokens, strict=True)]
        self.filled.add_(counts)

    def set_filled(self, num_filled: Sequence[int], filled: Tensor) -> None:
        """Set how many slots each row uses: on the host, and int [B] on the device."""
        self.num_filled = list(num_filled)
        self.filled.copy_(filled)

    # -- writing -----------------------------------------------------------------------------------------------------

    def append(self, inputs: AttentionInputs, static: bool = False) -> KVView:
        """Write the new tokens behind those of each row, or beside copies of them; return what to attend to.

        static: write keys and values into entries that `reserve` prepared and return all P entries, so that nothing
        depends on numbers of the host.
        """
        if static:
            self._write(self, {"keys": inputs.keys, "values": inputs.values})
            return self.view(self.capacity)
        new, used = inputs.keys.shape[2], max(self.num_filled)
        if self.config.slots is None:
            self._grow(used + new)
        entries = self._entries(inputs)
        if not self.has_room(new):
            return self._view(self._beside(entries, used), used + new, in_place=False)
        if self.uniform:  # slices are faster than indices for many tokens
            for name, entry in entries.items():
                getattr(self, name)[:, :, used : used + new] = entry
        else:
            self._write(self, entries)
        return self.view(used + new)

    def reserve(self, positions: Tensor, valid: Tensor) -> None:
        """Prepare the entries behind each row's slots for new tokens: positions int [B, n], valid bool [B, n]."""
        shape = (len(positions), self.spec.kv_heads, positions.shape[1])
        zero = self.score.new_zeros(()).expand(shape)
        multiplicity, position = (each[:, None].expand(shape) for each in (valid.float(), positions.to(torch.int32)))
        marks = {"multiplicity": multiplicity, "position": position, "score": zero, "cumulative_attention": zero}
        self._write(self, marks)

    def view(self, end: int | None = None) -> KVView:
        """Return the first `end` of the layer's own slots, by default those that some row uses."""
        return self._view(self, max(self.num_filled) if end is None else end, in_place=True)

    def _view(self, slots: Slots, end: int, in_place: bool) -> KVView:
        return KVView(self, slots, end, self.num_filled, in_place)

    def _beside(self, entries: dict[str, Tensor], used: int) -> Slots:
        """Copy the first `used` slots, with the new tokens behind those of each row.

        No empty slots between: pooling over neighbours would see them, and a row in a batch differ from one alone.
        """
        held = {name: getattr(self, name)[:, :, :used] for name in PER_SLOT}
        if self.uniform:
            return Slots(**{name: torch.cat([held[name], entries[name]], dim=2) for name in PER_SLOT})
        both = Slots(**{name: torch.cat([held[name], torch.zeros_like(entries[name])], dim=2) for name in PER_SLOT})
        self._write(both, entries)
        return both

    def _write(self, slots: Slots, entries: dict[str, Tensor]) -> None:
        """Write entries [B, H, n, ...] into slots [B, H, P, ...], for each row from its own fill on."""
        row = torch.arange(len(self.filled), device=self.filled.device)[:, None]
        new = next(iter(entries.values())).shape[2]
        place = self.filled[:, None] + torch.arange(new, device=self.filled.device)
        for name, entry in entries.items():
            getattr(slots, name)[row, :, place] = entry.transpose(1, 2)

    def _entries(self, inputs: AttentionInputs) -> dict[str, Tensor]:
        """Return the new tokens as slots: multiplicity 1 (0 for padding), scores 0."""
        shape = inputs.keys.shape[:3]
        multiplicity, position = (each[:, None].expand(shape) for each in (inputs.valid.float(), inputs.positions))
        zero = self.score.new_zeros(()).expand(shape)
        return dict(zip(PER_SLOT, (inputs.keys, inputs.values, multiplicity, zero, zero, position), strict=True))

    def _grow(self, needed: int) -> None:
        """Double the room until `needed` entries fit. The exact cache only."""
        if needed <= self.capacity:
            return
        extra = max(needed, 2 * self.capacity) - self.capacity
        for name in PER_SLOT:
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(*old.shape[:2], extra, *old.shape[3:])], dim=2))

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerCache:
        """Return a layer whose tensors are `change` of this one's. Its host numbers are not set."""
        other = LayerCache(self.config, self.spec, 0)
        for name in TENSORS:
            setattr(other, name, change(getattr(self, name)))
        return other

    def select_rows(self, rows: Tensor) -> LayerCache:
        """Return an independent copy of some rows, int [K] on the layer's device. Its host numbers are not set."""
        return self.map(lambda tensor: tensor.index_select(0, rows))

    def put_rows(self, rows: Tensor, some: LayerCache) -> None:
        """Write the tensors of a layer of K rows, of the same shapes, into rows int [K] of this one."""
        for name in TENSORS:
            getattr(self, name).index_copy_(0, rows, getattr(some, name))

    def grow_to(self, needed: int) -> None:
        """Make room for `needed` entries. Only the exact cache grows."""
        if self.config.slots is None:
            self._grow(needed)

    def newest_queries(self, row: int, count: int) -> Tensor:
        """Return a row's newest recorded queries in order of position: [Hq, count, D]."""
        return self.queries[row, :, self.query_positions[row].argsort()[-count:]]

    def remap(self, row: int, shift: Callable[[Tensor], Tensor], rotation: Rotation) -> None:
        """Rotate the keys of one row, and its recorded queries, to other RoPE positions.

        A residual slot is rotated by its first token's position: nearly right for the others that it merged.

        shift: int [...], positions → float [...], by how many positions each moves.
        """
        step = shift(self.position[row])
        self.keys[row] = rotation.rotate(self.keys[row], step)
        if size := self.config.residual:
            self.residual_keys[row] = rotation.rotate(self.residual_keys[row], step[:, :size])
            self.keys[row, :, :size] = self.residual_keys[row].to(self.keys.dtype)
        if self.queries.shape[2]:
            self.queries[row] = rotation.rotate(self.queries[row], shift(self.query_positions[row])[None])

    def trimmed(self) -> LayerCache:
        """Return an independent copy without the entries that no row uses, to be kept and not read into."""
        used = max(1, *self.num_filled)
        other = LayerCache(self.config, self.spec, 0)
        for name in TENSORS:
            tensor = getattr(self, name)
            setattr(other, name, (tensor[:, :, :used] if name in PER_SLOT else tensor).clone())
        other.num_filled = list(self.num_filled)
        return other

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, name).nbytes for name in TENSORS)


def stack_slots(tensors: Sequence[Tensor], capacity: int) -> Tensor:
    """Stack tensors of slots [B, H, C, ...] along their rows: [all B, H, capacity, ...].

    What has more entries is cut off, and what has fewer (`LayerCache.trimmed`) is filled up with empty ones.
    """
    rows, first = [len(tensor) for tensor in tensors], tensors[0]
    stacked = first.new_empty(sum(rows), first.shape[1], capacity, *first.shape[3:])
    for part, tensor in zip(stacked.split(rows), tensors, strict=True):
        held = min(capacity, tensor.shape[2])
        part[:, :, :held] = tensor[:, :, :held]
        part[:, :, held:] = 0
    return stacked


@dataclass(frozen=True)
class KVView:
    """What a layer attends to in one pass: the first `end` of its slots, or of copies with the new tokens behind them.

    Every tensor is [B, H, end, ...] and may be written to. The new tokens of row b begin at slot `base[b]`. in_place:
    whether these are the layer's own slots.
    """

    layer: LayerCache
    slots: Slots
    end: int
    base: list[int]
    in_place: bool

    @property
    def config(self) -> CacheConfig:
        """The layer's own configuration."""
        return self.layer.config

    @property
    def spec(self) -> LayerSpec:
        """The layer's shape."""
        return self.layer.spec

    @property
    def keys(self) -> Tensor:
        return self.slots.keys[:, :, : self.end]

    @property
    def values(self) -> Tensor:
        return self.slots.values[:, :, : self.end]

    @property
    def multiplicity(self) -> Tensor:
        return self.slots.multiplicity[:, :, : self.end]

    @property
    def score(self) -> Tensor:
        return self.slots.score[:, :, : self.end]

    @property
    def cumulative_attention(self) -> Tensor:
        return self.slots.cumulative_attention[:, :, : self.end]

    @property
    def position(self) -> Tensor:
        return self.slots.position[:, :, : self.end]
