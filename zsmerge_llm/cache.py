"""The compressed cache: per layer, static tensors that hold a fixed number of slots per KV head.

Slots of a layer, P = slots + stage entries per row and KV head, laid out `[residual | verbatim tokens | stage]`:
verbatim tokens stand in order of position; new tokens are written behind the last used slot (`fill`, the same for all
rows and heads), and when the P entries are used up the layer compresses back to `slots`. A slot with count 0 is empty.
A chunk that does not fit is attended beside the held slots and compressed in the same pass, so that nothing larger
than slots + stage + chunk ever exists, and only for one layer at a time.

`Cache` is a list of layers plus the number of tokens each row has read. Everything mutates in place; `clone` copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from zsmerge_llm import policy
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import ContextLimitError

PER_SLOT = ("keys", "values", "count", "score", "position")
TENSORS = (*PER_SLOT, "residual_keys", "residual_values", "dropped", "queries", "query_position")


@dataclass(frozen=True)
class LayerSpec:
    """What one attention layer needs of its cache, as seen in a one-token forward pass."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Arrival:
    """The tokens of one forward pass as a layer receives them.

    queries [B, Hq, n, D], keys and values [B, H, n, D]: the tokens to keep; position, valid: [B, n]; seen: [B], tokens
    read by each row, these included. probe [B, Hq, m, D], probe_position [B, m]: queries that only look, if any.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    position: Tensor
    valid: Tensor
    seen: Tensor
    probe: Tensor | None
    probe_position: Tensor | None
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


def layer_config(config: CacheConfig, spec: LayerSpec) -> CacheConfig:
    """A sliding-window layer keeps exactly its window, whatever the budget; any other layer keeps `config`."""
    if spec.window is None or config.slots is None:
        return config
    stage = max(config.stage, 32)  # compressing a window at each step gains nothing
    return config.replace(
        slots=spec.window + 1, sink=0, recent=spec.window, residual=0, stage=stage, scoring="position"
    )


class LayerCache:
    """The slots of one layer. See the module's text for the layout and `Arrival` for the shapes."""

    def __init__(self, config: CacheConfig, spec: LayerSpec, rows: int) -> None:
        self.config = layer_config(config, spec)
        self.spec = spec
        self.fill = self.config.residual
        budget = self.config.slots
        capacity = self.config.stage if budget is None else budget + self.config.stage
        heads, device = spec.kv_heads, spec.device
        asked = self.config.window if self.config.scoring == "window" and budget is not None else 0

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.keys = zeros(heads, capacity, spec.key_dim, dtype=spec.dtype)
        self.values = zeros(heads, capacity, spec.value_dim, dtype=spec.dtype)
        self.count = zeros(heads, capacity)
        self.score = zeros(heads, capacity)
        self.position = zeros(heads, capacity, dtype=torch.int32)
        # The means in float32: rounded to bfloat16 at each merge, they would stop moving after some 200 tokens.
        self.residual_keys = zeros(heads, self.config.residual, spec.key_dim)
        self.residual_values = zeros(heads, self.config.residual, spec.value_dim)
        self.dropped = zeros(heads)
        self.queries = zeros(spec.query_heads, asked, spec.key_dim, dtype=spec.dtype)
        self.query_position = zeros(asked, dtype=torch.int32) - 1

    @property
    def capacity(self) -> int:
        """P, the entries there is room for."""
        return self.keys.shape[2]

    def fits(self, new: int) -> bool:
        """Whether `new` tokens can be appended without compressing first."""
        return self.config.slots is None or self.fill + new <= self.capacity

    def candidates(self, arrival: Arrival) -> dict[str, Tensor]:
        """Append the tokens; what to attend to, [B, H, fill + n, ...] each: views where they fit, else copies."""
        new = arrival.keys.shape[2]
        if self.config.slots is None:
            self._grow(self.fill + new)
        entries = self._entries(arrival)
        if self.fits(new):
            end = self.fill + new
            for name, entry in entries.items():
                getattr(self, name)[:, :, self.fill : end] = entry
            self.fill = end
            return {name: getattr(self, name)[:, :, :end] for name in PER_SLOT}
        return {
            name: torch.cat([getattr(self, name)[:, :, : self.fill], entry.to(getattr(self, name).dtype)], dim=2)
            for name, entry in entries.items()
        }

    def settle(self, held: dict[str, Tensor], arrival: Arrival) -> None:
        """After attention: update the scores, and compress if `held` is more than there is room for or uses it up."""
        if self.config.slots is None:
            return
        full = held["keys"].shape[2] >= self.capacity
        if self.config.scoring == "position":
            held["score"].copy_(held["position"])
        elif self.config.scoring == "attention":
            self._contribute(held, arrival)
        else:
            self._remember(arrival)
            if full:
                self._weigh(held, arrival)
        if full:
            self._compress(held, arrival.seen)

    def _entries(self, arrival: Arrival) -> dict[str, Tensor]:
        """The arriving tokens as slots: count 1 (0 for padding), score 0."""
        shape = arrival.keys.shape[:3]
        count = arrival.valid[:, None, :].expand(shape).float()
        position = arrival.position[:, None, :].expand(shape)
        values = (arrival.keys, arrival.values, count, torch.zeros_like(count), position)
        return dict(zip(PER_SLOT, values, strict=True))

    def _grow(self, needed: int) -> None:
        """The exact cache only: double the room until `needed` entries fit."""
        if needed <= self.capacity:
            return
        extra = max(needed, 2 * self.capacity) - self.capacity
        for name in PER_SLOT:
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(*old.shape[:2], extra, *old.shape[3:])], dim=2))

    def _contribute(self, held: dict[str, Tensor], arrival: Arrival) -> None:
        """Eq. 5 from every arriving token's attention."""
        # A constant taken from all keys changes no softmax, and keeps half-precision logits small and exact.
        keys = held["keys"]
        present = held["count"][..., None] > 0
        centre = (keys.float() * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)
        centred = (keys.float() - centre).to(keys.dtype) if arrival.sinks is None and arrival.softcap is None else keys
        bias = policy.slot_bias(held["count"], self.config.alpha)[:, :, None, None, :]
        new = arrival.keys.shape[2]
        causal = policy.causal_bias(keys.shape[2] - new, new, bias.dtype, bias.device)
        paid = _paid(arrival, arrival.queries, centred, bias + causal)
        held["score"].copy_(policy.contribution(held["score"], paid, arrival.valid, self.config.decay))

    def _remember(self, arrival: Arrival) -> None:
        """Keep the newest queries: they decide at the next compression, unless a probe does."""
        room = self.config.window
        asking = arrival.position.masked_fill(~arrival.valid, -1)
        self.queries.copy_(torch.cat([self.queries, arrival.queries], dim=2)[:, :, -room:])
        self.query_position.copy_(torch.cat([self.query_position, asking], dim=1)[:, -room:])

    def _weigh(self, held: dict[str, Tensor], arrival: Arrival) -> None:
        """What the probe, or the newest queries, pay each slot now; a slot keeps the best it ever got."""
        queries, asking = self.queries, self.query_position
        if arrival.probe is not None and arrival.probe_position is not None:
            queries, asking = arrival.probe, arrival.probe_position
        seen = held["position"][:, :, None, :] <= asking[:, None, :, None]  # [B, H, m, C]
        bias = policy.slot_bias(held["count"], self.config.alpha)[:, :, None, :].masked_fill(~seen, policy.NEVER)
        paid = _paid(arrival, queries.float(), held["keys"].float(), bias[:, :, None])
        now = policy.importance(paid, asking >= 0, self.config.pool)
        held["score"].copy_(torch.maximum(held["score"] * self.config.decay, now))

    def _compress(self, held: dict[str, Tensor], seen: Tensor) -> None:
        """Alg. 1: keep what ranks highest, merge or drop the rest, leave the stage empty."""
        config, residual = self.config, self.config.residual
        assert config.slots is not None  # the exact cache never compresses
        main = {name: tensor[:, :, residual:] for name, tensor in held.items()}
        ranking = policy.priority(main["score"], main["count"], main["position"], seen, config.sink, config.recent)
        kept, lost = policy.split(ranking, config.slots - residual)
        evicted = {name: policy.take(main[name], lost) for name in PER_SLOT}
        survivors = {name: policy.take(main[name], kept) for name in PER_SLOT}
        self.count[:, :, config.slots :] = 0
        self.fill = config.slots
        for name, tensor in survivors.items():
            getattr(self, name)[:, :, residual : config.slots] = tensor
        if residual:
            self._absorb(held, evicted)
        else:
            self.dropped += evicted["count"].sum(-1)

    def _absorb(self, held: dict[str, Tensor], evicted: dict[str, Tensor]) -> None:
        size = self.config.residual
        old = (self.residual_keys, self.residual_values, self.count[:, :, :size])
        lost = (evicted["keys"].float(), evicted["values"].float(), evicted["count"])
        (keys, values, count), chosen = policy.merge(old, lost)
        # A residual slot goes by its first token's position.
        position = evicted["position"].masked_fill(evicted["count"] == 0, torch.iinfo(torch.int32).max)
        first = torch.zeros_like(self.position[:, :, :size])
        first = first.scatter_reduce(2, chosen, position, "amin", include_self=False)
        fresh = self.count[:, :, :size] == 0
        self.position[:, :, :size] = torch.where(fresh, first, self.position[:, :, :size])
        self.score[:, :, :size] = held["score"][:, :, :size]
        self.residual_keys.copy_(keys)
        self.residual_values.copy_(values)
        self.keys[:, :, :size] = keys.to(self.keys.dtype)
        self.values[:, :, :size] = values.to(self.values.dtype)
        self.count[:, :, :size] = count

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in TENSORS)


def _paid(arrival: Arrival, queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """Weights [B, H, G, m, C] that queries [B, Hq, m, D] pay to keys [B, H, C, D]."""
    batch, heads, count, dim = queries.shape
    grouped = queries.view(batch, keys.shape[1], heads // keys.shape[1], count, dim)
    return policy.weights(grouped, keys, bias, arrival.scaling, arrival.softcap, arrival.sinks)


class Cache:
    """The cache of one conversation, or of several as rows of a batch.

    `lengths` says how many tokens each row has read. Made by `Engine.new_cache`; `Engine.read` and `Engine.stream`
    change it in place.
    """

    def __init__(self, config: CacheConfig, specs: Sequence[LayerSpec], rows: int = 1) -> None:
        self.config = config
        self.specs = tuple(specs)
        self.layers = [LayerCache(config, spec, rows) for spec in specs]
        self.lengths = [0] * rows
        self.logits: Tensor | None = None  # [B, vocab] in the model's dtype, after each row's last token
        self.ragged = False  # whether some row may have empty slots below `fill`

    @property
    def seen(self) -> int:
        """Tokens read so far; for a batch, by its longest row."""
        return max(self.lengths)

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def slots(self) -> int | None:
        """The budget in slots per KV head; None for the exact cache."""
        return self.config.slots

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors of all layers, and by the logits after the last token."""
        return sum(layer.nbytes for layer in self.layers) + (0 if self.logits is None else self.logits.nbytes)

    @property
    def merged(self) -> int:
        """Tokens no longer held verbatim (merged or dropped), mean over rows, heads and full-attention layers."""
        lost = [
            sum(self.lengths) / self.rows - (layer.count == 1).sum(-1).float().mean().item()
            for layer in self.layers
            if layer.spec.window is None
        ]
        return round(sum(lost) / len(lost)) if lost else 0

    def full_nbytes(self, tokens: int | None = None) -> int:
        """Bytes an exact cache of these layers would hold in keys and values after `tokens` (default: those read)."""
        total = sum(self.lengths) if tokens is None else tokens
        return sum(
            (min(total, spec.window) if spec.window else total)
            * spec.kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize
            for spec in self.specs
        )  # fmt: skip

    def fits(self, new: int) -> bool:
        """Whether `new` tokens can be read without any full-attention layer compressing."""
        return all(layer.fits(new) for layer in self.layers if layer.spec.window is None)

    def clone(self) -> Cache:
        """An independent copy."""
        return Cache.stack([self])

    def row(self, index: int) -> Cache:
        """An independent copy of one row, as a cache of its own."""
        rows = Cache.from_state(*self.state())
        rows.lengths = [self.lengths[index]]
        rows.logits = None if self.logits is None else self.logits[index : index + 1].clone()
        for layer in rows.layers:
            for name in TENSORS:
                setattr(layer, name, getattr(layer, name)[index : index + 1].clone())
        return rows

    @classmethod
    def stack(cls, caches: Sequence[Cache]) -> Cache:
        """One batch of several caches of the same configuration; rows are copies and independent of each other.

        Raises:
            ContextLimitError: caches of different configurations.
        """
        first = caches[0]
        if any(cache.config != first.config or cache.specs != first.specs for cache in caches):
            raise ContextLimitError("Only caches of one model and one CacheConfig can be stacked into a batch.")
        batch = cls(first.config, first.specs, rows=0)
        batch.lengths = [length for cache in caches for length in cache.lengths]
        batch.ragged = any(cache.ragged for cache in caches)
        known = [cache.logits for cache in caches if cache.logits is not None]
        batch.logits = torch.cat(known) if len(known) == len(caches) else None
        for index, layer in enumerate(batch.layers):
            parts = [cache.layers[index] for cache in caches]
            layer.fill = max(part.fill for part in parts)
            batch.ragged |= any(part.fill != layer.fill for part in parts)
            for part in parts:
                if part.config.slots is None:
                    part._grow(layer.fill)
            room = min(part.capacity for part in parts)
            for name in TENSORS:
                tensors = [getattr(part, name) for part in parts]
                if name in PER_SLOT:
                    tensors = [tensor[:, :, :room] for tensor in tensors]
                setattr(layer, name, torch.cat(tensors))
        return batch

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything there is to save: tensors by name, and JSON-able facts. The tensors are the cache's own."""
        tensors = {
            f"{index}.{name}": getattr(layer, name) for index, layer in enumerate(self.layers) for name in TENSORS
        }
        if self.logits is not None:
            tensors["logits"] = self.logits
        specs = [
            {**asdict(spec), "dtype": str(spec.dtype).removeprefix("torch."), "device": str(spec.device)}
            for spec in self.specs
        ]
        facts = {
            "config": asdict(self.config),
            "specs": specs,
            "lengths": list(self.lengths),
            "ragged": self.ragged,
            "fill": [layer.fill for layer in self.layers],
        }
        return tensors, facts

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Cache:
        """The inverse of `state`. The tensors are taken over, moved to each layer's device where they are elsewhere.

        Tensors without elements may be left out.

        Raises:
            ValueError, KeyError: tensors that do not fit the facts.
        """
        specs = [
            LayerSpec(**{**spec, "dtype": getattr(torch, spec["dtype"]), "device": torch.device(spec["device"])})
            for spec in facts["specs"]
        ]
        cache = cls(CacheConfig.from_dict(facts["config"]), specs, rows=0)
        cache.lengths = list(facts["lengths"])
        cache.ragged = facts["ragged"]
        cache.logits = tensors.get("logits")
        for index, (layer, fill) in enumerate(zip(cache.layers, facts["fill"], strict=True)):
            layer.fill = fill
            for name in TENSORS:
                empty = getattr(layer, name)
                shape = (cache.rows, *empty.shape[1:])
                given = tensors.get(f"{index}.{name}")
                tensor = empty.new_zeros(shape) if given is None and 0 in shape else tensors[f"{index}.{name}"]
                if tensor.dtype != empty.dtype or not _fits(tensor.shape, shape, layer.config.slots is None):
                    raise ValueError(f"{index}.{name} is {tensor.dtype}{list(tensor.shape)}, not {empty.dtype}{shape}")
                setattr(layer, name, tensor.to(layer.spec.device))
        return cache


def _fits(shape: Sequence[int], wanted: Sequence[int], grows: bool) -> bool:
    """Whether a tensor has the shape a fresh cache gives it; the exact cache's slots (dimension 2) may be more."""
    if grows and len(shape) > 2:
        shape, wanted = (*shape[:2], *shape[3:]), (*wanted[:2], *wanted[3:])
    return tuple(shape) == tuple(wanted)
