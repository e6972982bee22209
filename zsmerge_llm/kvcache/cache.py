"""The cache of a conversation, or of several as rows of a batch: its layers, and how many tokens each row has read.

Everything that reads mutates it in place; `clone`, `row` and `stack` copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.kvcache import eviction
from zsmerge_llm.kvcache.layer_cache import SAVED, TENSORS, LayerCache, layer_configs
from zsmerge_llm.kvcache.rope import PositionMap, Rotation
from zsmerge_llm.kvcache.slots import PER_SLOT, LayerSpec


class Cache:
    """The cache of one conversation, or of several as rows of a batch.

    Made by `Engine.new_cache`; `Engine.read` and `Engine.stream` change it in place.

    Attributes:
        config: the configuration of the whole cache; each layer has its own (`layer_configs`).
        specs: the shapes of the model's layers.
        layers: one `LayerCache` each.
        lengths: tokens that each row has read.
        position_maps: for each row, which RoPE position its tokens have.
        logits: [B, vocab] in the model's dtype, after each row's last token; None before anything was read.
    """

    def __init__(self, config: CacheConfig, specs: Sequence[LayerSpec], rows: int = 1) -> None:
        self.config = config
        self.specs = tuple(specs)
        configs = layer_configs(config, self.specs)
        self.layers = [LayerCache(own, spec, rows) for own, spec in zip(configs, self.specs, strict=True)]
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
        return sum(layer.nbytes for layer in self.layers) + (0 if self.logits is None else self.logits.nbytes)

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

    def full_nbytes(self, tokens: int | None = None) -> int:
        """Return the bytes of keys and values of an exact cache after `tokens` (default: those read)."""
        total = sum(self.lengths) if tokens is None else tokens
        return sum(
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

    def replace_with(self, other: Cache) -> None:
        """Take over everything `other` holds; it must not be used any more."""
        self.layers, self.lengths, self.logits = other.layers, other.lengths, other.logits
        self.position_maps = other.position_maps

    # -- copies ------------------------------------------------------------------------------------------------------

    def clone(self) -> Cache:
        """Return an independent copy."""
        return Cache.stack([self])

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
        return some

    def copy_to(self, devices: Sequence[torch.device], copy: Callable[[Tensor, torch.device], Tensor]) -> Cache:
        """Return an independent copy whose layers are on `devices`, one each. copy: copies a tensor to a device."""
        specs = [replace(spec, device=device) for spec, device in zip(self.specs, devices, strict=True)]
        other = Cache(self.config, specs, rows=0)
        other.lengths, other.position_maps = list(self.lengths), list(self.position_maps)
        other.logits = None if self.logits is None else copy(self.logits, specs[-1].device)
        for layer, own in zip(other.layers, self.layers, strict=True):
            layer.num_filled = list(own.num_filled)
            for name in TENSORS:
                setattr(layer, name, copy(getattr(own, name), layer.spec.device))
        return other

    def _empty_like(self) -> Cache:
        """Return a cache of the same kind without rows."""
        return Cache(self.config, self.specs, rows=0)

    @classmethod
    def stack(cls, caches: Sequence[Cache]) -> Cache:
        """Stack caches of the same configuration into one batch; rows are copies and independent of each other.

        Raises:
            ConfigError: caches of different configurations.
        """
        first = caches[0]
        if any(cache.config != first.config or cache.specs != first.specs for cache in caches):
            raise ConfigError("Only caches of one model and one CacheConfig can be stacked into a batch.")
        batch = first._empty_like()
        batch.lengths = [length for cache in caches for length in cache.lengths]
        batch.position_maps = [positions for cache in caches for positions in cache.position_maps]
        known = [cache.logits for cache in caches if cache.logits is not None]
        batch.logits = torch.cat(known) if len(known) == len(caches) else None
        for index, layer in enumerate(batch.layers):
            parts = [cache.layers[index] for cache in caches]
            layer.num_filled = [filled for part in parts for filled in part.num_filled]
            for part in parts:
                part.grow_to(max(layer.num_filled))
            room = min(part.capacity for part in parts)
            for name in TENSORS:
                tensors = [getattr(part, name) for part in parts]
                if name in PER_SLOT:
                    tensors = [tensor[:, :, :room] for tensor in tensors]
                setattr(layer, name, torch.cat(tensors))
        return batch

    # -- saving ------------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything there is to save: tensors by name (the cache's own), and facts as JSON values."""
        tensors = {f"{index}.{name}": getattr(layer, name) for index, layer in enumerate(self.layers) for name in SAVED}
        if self.logits is not None:
            tensors["logits"] = self.logits
        specs = [
            {**asdict(spec), "dtype": str(spec.dtype).removeprefix("torch."), "device": str(spec.device)}
            for spec in self.specs
        ]
        facts = {
            "config": self.config.to_dict(),
            "specs": specs,
            "lengths": list(self.lengths),
            "position_maps": [positions.knots for positions in self.position_maps],
            "num_filled": [layer.num_filled for layer in self.layers],
        }
        return tensors, facts

    @classmethod
    def from_state(
        cls,
        tensors: dict[str, Tensor],
        facts: dict[str, Any],
        policy: Any = None,
        specs: Sequence[LayerSpec] | None = None,
    ) -> Cache:
        """Invert `state`. The tensors are taken over, and moved to each layer's device where they are elsewhere.

        Args:
            tensors: those without elements may be left out.
            policy: the `EvictionPolicy` object whose name the facts hold, if they hold no built-in one.
            specs: the model's layers; None takes those of the facts.

        Raises:
            ValueError, KeyError: tensors that do not fit the facts. ConfigError: facts of an unknown configuration.
        """
        specs = specs or [
            LayerSpec(**{**spec, "dtype": getattr(torch, spec["dtype"]), "device": torch.device(spec["device"])})
            for spec in facts["specs"]
        ]
        cache = cls(CacheConfig.from_dict(facts["config"], policy), specs, rows=0)
        cache.lengths = list(facts["lengths"])
        cache.position_maps = [PositionMap(tuple((at, to) for at, to in knots)) for knots in facts["position_maps"]]
        logits = tensors.get("logits")
        cache.logits = logits.to(specs[-1].device) if logits is not None and specs else logits
        for index, (layer, num_filled) in enumerate(zip(cache.layers, facts["num_filled"], strict=True)):
            layer.num_filled = list(num_filled)
            layer.filled = torch.tensor(layer.num_filled, dtype=torch.int32, device=layer.spec.device)
            for name in SAVED:
                empty = getattr(layer, name)
                shape = (cache.rows, *empty.shape[1:])
                given = tensors.get(f"{index}.{name}")
                tensor = empty.new_zeros(shape) if given is None and 0 in shape else tensors[f"{index}.{name}"]
                if tensor.dtype != empty.dtype or not _fits(tensor.shape, shape, layer.config.slots is None):
                    raise ValueError(f"{index}.{name} is {tensor.dtype}{list(tensor.shape)}, not {empty.dtype}{shape}")
                setattr(layer, name, tensor.to(layer.spec.device))
        return cache


def _fits(shape: Sequence[int], wanted: Sequence[int], grows: bool) -> bool:
    """Return whether a tensor has the shape of a fresh cache; the exact cache's slots (dimension 2) may be more."""
    if grows and len(shape) > 2:
        shape, wanted = (*shape[:2], *shape[3:]), (*wanted[:2], *wanted[3:])
    return tuple(shape) == tuple(wanted)
