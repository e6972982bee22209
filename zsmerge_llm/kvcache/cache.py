"""The cache of a conversation, or of several as rows of a batch: its layers, and how many tokens each row has read.

Everything that reads mutates it in place; `clone`, `trimmed`, `row` and `stack` copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.kvcache import eviction
from zsmerge_llm.kvcache.layer_cache import TENSORS, LayerCache, layer_configs, layer_specs, stack_slots
from zsmerge_llm.kvcache.recurrent_state import RecurrentSpec, RecurrentState
from zsmerge_llm.kvcache.rope import PositionMap, Rotation
from zsmerge_llm.kvcache.slots import PER_SLOT, LayerSpec


class Cache:
    """The cache of one conversation, or of several as rows of a batch.

    Made by `Engine.new_cache`; `Engine.read` and `Engine.stream` change it in place.

    Attributes:
        config: the configuration of the whole cache; each layer has its own (`layer_configs`).
        specs: the shapes of the model's attention layers.
        recurrent_specs: the shapes of its recurrent layers' states.
        layers: one `LayerCache` for each attention layer.
        states: one `RecurrentState` for each recurrent layer.
        lengths: tokens that each row has read.
        position_maps: for each row, which RoPE position its tokens have.
        logits: [B, vocab] in the model's dtype, after each row's last token; None before anything was read.
    """

    def __init__(
        self,
        config: CacheConfig,
        specs: Sequence[LayerSpec],
        rows: int = 1,
        recurrent_specs: Sequence[RecurrentSpec] = (),
    ) -> None:
        self.config = config
        self.specs = tuple(specs)
        self.recurrent_specs = tuple(recurrent_specs)
        each = zip(layer_configs(config, self.specs), layer_specs(config, self.specs), strict=True)
        self.layers = [LayerCache(own, spec, rows) for own, spec in each]
        self.states = [RecurrentState(spec, rows) for spec in self.recurrent_specs]
        self.lengths = [0] * rows
        self.position_maps = [PositionMap()] * rows
        self.logits: Tensor | None = None

    # -- what it holds -----------------------------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """Tokens read so far; for a batch, by its longest row."""
        return max(self.lengths)

    @property
    def rows(self) -> int:
        """Conversations in the batch."""
        return len(self.lengths)

    @property
    def slots(self) -> int | None:
        """The budget in slots per KV head, mean over the full-attention layers; None for the exact cache."""
        return self.config.slots

    @property
    def _full_layers(self) -> list[LayerCache]:
        return [layer for layer in self.layers if layer.spec.window is None]

    @property
    def exact_capacity(self) -> int | None:
        """Tokens up to which no full-attention layer evicts any; None for the exact cache."""
        slots = [layer.config.slots for layer in self._full_layers]
        return min((each for each in slots if each is not None), default=self.config.slots)

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of all layers, and by the logits after the last token."""
        held = sum(layer.nbytes for layer in self.layers) + sum(state.nbytes for state in self.states)
        return held + (0 if self.logits is None else self.logits.nbytes)

    @property
    def dropped_tokens(self) -> int:
        """Tokens read that are no longer held in any form, mean over rows, KV heads and full-attention layers."""
        return self._mean(lambda layer: layer.dropped.mean())

    @property
    def merged_tokens(self) -> int:
        """Tokens read that are held only as a part of a residual slot's mean; mean as for `dropped_tokens`."""
        return self._mean(lambda layer: (layer.multiplicity * (layer.multiplicity > 1)).sum(-1).mean())

    def _mean(self, of: Callable[[LayerCache], Tensor]) -> int:
        full = [of(layer).item() for layer in self._full_layers]
        return round(sum(full) / len(full)) if full else 0

    def holds_any(self, first: int, end: int) -> bool:
        """Return whether a full-attention layer holds any of the tokens from `first` up to `end`."""
        return any(layer.holds_any(first, end) for layer in self._full_layers)

    def full_nbytes(self, tokens: int | None = None) -> int:
        """Return the bytes of an exact cache after `tokens` (default: those read): keys, values, recurrent states."""
        total = sum(self.lengths) if tokens is None else tokens
        return sum(state.nbytes for state in self.states) + sum(
            (min(total, spec.window) if spec.window else total)
            * spec.kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize
            for spec in self.specs
        )  # fmt: skip

    def fits(self, new: int) -> bool:
        """Return whether `new` tokens can be read without any full-attention layer compressing."""
        return all(layer.fits(new) for layer in self._full_layers)

    def fits_all(self, new: int) -> bool:
        """Return whether `new` tokens can be read without any layer compressing."""
        return all(layer.fits(new) for layer in self.layers)

    @property
    def is_trimmed(self) -> bool:
        """Whether it was made by `trimmed` and has no room for new tokens. The exact cache makes room itself."""
        return any(layer.is_trimmed for layer in self.layers)

    # -- changing it -------------------------------------------------------------------------------------------------

    @property
    def needs_compression(self) -> bool:
        """Whether a full-attention layer has tokens in its stage that `compress_stage` would compress."""
        return any(any(layer.needs_compression) for layer in self._full_layers)

    def compress_stage(self) -> None:
        """Empty the stage of every layer, between two turns rather than while the next one is waited for."""
        seen = torch.tensor(self.lengths)
        with torch.inference_mode():
            for layer in self.layers:
                eviction.compress_stage(layer, seen)

    def remap(self, row: int, positions: PositionMap, rotations: Sequence[Rotation]) -> None:
        """Give the tokens of a row other RoPE positions: every layer's keys are rotated to them."""
        old = self.position_maps[row]
        for layer, rotation in zip(self.layers, rotations, strict=True):
            layer.remap(
                row, lambda position: positions.rope_positions(position) - old.rope_positions(position), rotation
            )
        self.position_maps[row] = positions

    def skip_to(self, length: int) -> None:
        """Go on behind the first `length` tokens of a text, as if those that were not read had all been dropped.

        The next token stands directly behind those that are held: the text between has no RoPE positions.
        """
        for row, held in enumerate(self.lengths):
            self.position_maps[row] = PositionMap(((held, float(held)), (length, float(held))))
            for layer in self.layers:
                layer.dropped[row] += length - held
            self.lengths[row] = length

    def replace_with(self, other: Cache) -> None:
        """Take over everything `other` holds; it must not be used any more."""
        self.layers, self.states = other.layers, other.states
        self.lengths, self.logits = other.lengths, other.logits
        self.position_maps = other.position_maps

    # -- copies ------------------------------------------------------------------------------------------------------

    def clone(self) -> Cache:
        """Return an independent copy, with room for new tokens."""
        return Cache.stack([self])

    def trimmed(self) -> Cache:
        """Return an independent copy without free slots: short conversations are kept in few bytes.

        It has no room for new tokens: read into a `clone` of it.
        """
        some = self._empty_like()
        some.lengths, some.position_maps = list(self.lengths), list(self.position_maps)
        some.logits = None if self.logits is None else self.logits.clone()
        some.layers = [layer.trimmed() for layer in self.layers]
        some.states = [state.clone() for state in self.states]
        return some

    def row(self, index: int) -> Cache:
        """Return an independent copy of one row, as a cache of its own."""
        return self.select_rows([index])

    def select_rows(self, rows: Sequence[int]) -> Cache:
        """Return an independent copy of some rows."""
        chosen = list(rows)
        # A slice needs no list of indices on the device.
        part = slice(chosen[0], chosen[-1] + 1) if chosen == list(range(chosen[0], chosen[-1] + 1)) else chosen
        some = self._empty_like()
        some.lengths = [self.lengths[row] for row in chosen]
        some.position_maps = [self.position_maps[row] for row in chosen]
        some.logits = None if self.logits is None else self.logits[chosen]
        for layer, own in zip(some.layers, self.layers, strict=True):
            layer.num_filled = [own.num_filled[row] for row in chosen]
            for name in TENSORS:
                setattr(layer, name, getattr(own, name)[part].clone())
        some.states = [state.select_rows(part) for state in self.states]
        return some

    def copy_to(self, devices: Sequence[torch.device], copy: Callable[[Tensor, torch.device], Tensor]) -> Cache:
        """Return an independent copy on other devices.

        devices: one for each attention layer and, behind them, one for each recurrent layer. copy: copies a tensor to a
        device.
        """
        count = len(self.specs)
        specs = [replace(spec, device=device) for spec, device in zip(self.specs, devices[:count], strict=True)]
        recurrent = zip(self.recurrent_specs, devices[count:], strict=True)
        other = Cache(self.config, specs, 0, [replace(spec, device=device) for spec, device in recurrent])
        other.lengths, other.position_maps = list(self.lengths), list(self.position_maps)
        other.logits = None if self.logits is None else copy(self.logits, specs[-1].device)
        for layer, own in zip(other.layers, self.layers, strict=True):
            layer.num_filled = list(own.num_filled)
            for name in TENSORS:
                setattr(layer, name, copy(getattr(own, name), layer.spec.device))
        for state, given in zip(other.states, self.states, strict=True):
            state.tensors = {name: copy(tensor, state.spec.device) for name, tensor in given.tensors.items()}
        return other

    def _empty_like(self) -> Cache:
        """Return a cache of the same kind without rows."""
        return Cache(self.config, self.specs, 0, self.recurrent_specs)

    @classmethod
    def stack(cls, caches: Sequence[Cache]) -> Cache:
        """Stack caches of the same configuration into one batch; rows are copies and independent of each other.

        Raises:
            ConfigError: caches of different configurations.
        """
        first = caches[0]
        kind = (first.config, first.specs, first.recurrent_specs)
        if any((cache.config, cache.specs, cache.recurrent_specs) != kind for cache in caches):
            raise ConfigError("Only caches of one model and one CacheConfig can be stacked into a batch.")
        batch = first._empty_like()
        batch.lengths = [length for cache in caches for length in cache.lengths]
        batch.position_maps = [positions for cache in caches for positions in cache.position_maps]
        known = [cache.logits for cache in caches if cache.logits is not None]
        batch.logits = torch.cat(known) if len(known) == len(caches) else None
        for index, layer in enumerate(batch.layers):
            parts = [cache.layers[index] for cache in caches]
            layer.num_filled = [filled for part in parts for filled in part.num_filled]
            # More than an empty layer has only where the cache is exact.
            capacity = max(layer.capacity, *layer.num_filled, min(part.capacity for part in parts))
            for name in TENSORS:
                tensors = [getattr(part, name) for part in parts]
                stacked = stack_slots(tensors, capacity) if name in PER_SLOT else torch.cat(tensors)
                setattr(layer, name, stacked)
        batch.states = [RecurrentState.stack([cache.states[at] for cache in caches]) for at in range(len(first.states))]
        return batch
