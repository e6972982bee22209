"""A cache as tensors by name and facts as JSON values, and back: what is saved of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.layer_cache import SAVED, LayerCache
from zsmerge_llm.kvcache.recurrent_state import RecurrentSpec, StateTensor
from zsmerge_llm.kvcache.rope import PositionMap
from zsmerge_llm.kvcache.slots import PER_SLOT, LayerSpec


def state_key(index: int, name: str) -> str:
    """Return the name under which a tensor of a recurrent layer's state is saved. index: of the state in its cache."""
    return f"state.{index}.{name}"


def recurrent_facts(specs: Sequence[RecurrentSpec]) -> list[dict[str, Any]]:
    """Return descriptions of recurrent layers as JSON values. On which devices they are is not saved."""
    return [
        {
            "layer": spec.layer,
            "tensors": [[each.name, list(each.shape), _name(each.dtype)] for each in spec.tensors],
        }
        for spec in specs
    ]


def recurrent_specs(facts: Sequence[Mapping[str, Any]], device: torch.device) -> tuple[RecurrentSpec, ...]:
    """Invert `recurrent_facts`."""
    return tuple(
        RecurrentSpec(
            each["layer"],
            tuple(StateTensor(name, tuple(shape), getattr(torch, dtype)) for name, shape, dtype in each["tensors"]),
            device,
        )
        for each in facts
    )


def cache_state(cache: Cache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything there is to save: tensors by name (the cache's own), and facts as JSON values."""
    tensors = {f"{index}.{name}": getattr(layer, name) for index, layer in enumerate(cache.layers) for name in SAVED}
    for index, state in enumerate(cache.states):
        tensors |= {state_key(index, name): tensor for name, tensor in state.tensors.items()}
    if cache.logits is not None:
        tensors["logits"] = cache.logits
    facts = {
        "config": cache.config.to_dict(),
        "specs": [
            {**spec.facts, "dtype": _name(spec.dtype), "device": str(spec.device)} for spec in cache.specs
        ],
        "recurrent_specs": recurrent_facts(cache.recurrent_specs),
        "lengths": list(cache.lengths),
        "position_maps": [positions.knots for positions in cache.position_maps],
        "num_filled": [layer.num_filled for layer in cache.layers],
    }  # fmt: skip
    return tensors, facts


def restore_cache(
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    policy: Any = None,
    specs: Sequence[LayerSpec] | None = None,
    recurrent: Sequence[RecurrentSpec] | None = None,
) -> Cache:
    """Invert `cache_state`. The tensors are taken over, and moved to each layer's device where they are elsewhere.

    Args:
        tensors: those without elements may be left out. Slots of a cache that was trimmed stay so: read into a clone.
        policy: the `EvictionPolicy` object whose name the facts hold, if they hold no built-in one.
        specs, recurrent: the model's layers; None takes those of the facts.

    Raises:
        ValueError, KeyError: tensors that do not fit the facts. ConfigError: facts of an unknown configuration.
    """
    specs = specs or [
        LayerSpec(**{**spec, "dtype": getattr(torch, spec["dtype"]), "device": torch.device(spec["device"])})
        for spec in facts["specs"]
    ]
    if recurrent is None:
        recurrent = recurrent_specs(facts.get("recurrent_specs", ()), specs[-1].device)
    cache = Cache(CacheConfig.from_dict(facts["config"], policy), specs, 0, recurrent)
    cache.lengths = list(facts["lengths"])
    cache.position_maps = [PositionMap(tuple((at, to) for at, to in knots)) for knots in facts["position_maps"]]
    logits = tensors.get("logits")
    cache.logits = logits.to(specs[-1].device) if logits is not None and specs else logits
    for index, (layer, num_filled) in enumerate(zip(cache.layers, facts["num_filled"], strict=True)):
        layer.num_filled = list(num_filled)
        layer.filled = torch.tensor(layer.num_filled, dtype=torch.int32, device=layer.spec.device)
        restored: dict[str, Tensor] = {}  # put in together: the layer's capacity is that of its keys
        for name in SAVED:
            empty = getattr(layer, name)
            shape = (cache.rows, *empty.shape[1:])
            given = tensors.get(f"{index}.{name}")
            tensor = empty.new_zeros(shape) if given is None and 0 in shape else tensors[f"{index}.{name}"]
            if name in PER_SLOT:
                shape = (*shape[:2], _num_entries(tensor, layer), *shape[3:])
            _check(f"{index}.{name}", tensor, empty.dtype, shape)
            restored[name] = tensor.to(layer.spec.device)
        for name, tensor in restored.items():
            setattr(layer, name, tensor)
    for index, state in enumerate(cache.states):
        for name, empty in state.tensors.items():
            tensor = tensors[state_key(index, name)]
            _check(state_key(index, name), tensor, empty.dtype, (cache.rows, *empty.shape[1:]))
            state.tensors[name] = tensor.to(state.spec.device)
    return cache


def _num_entries(tensor: Tensor, layer: LayerCache) -> int:
    """Return the entries of slots [B, H, C, ...]: those that are used at least, and at most those of a fresh layer.

    The exact cache has any number.
    """
    given = tensor.shape[2] if tensor.dim() > 2 else 0
    most = given if layer.config.slots is None else layer.capacity
    return min(max(given, 1, *layer.num_filled), most)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """Check a tensor's dtype and shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {tensor.dtype}{list(tensor.shape)}, not {dtype}{tuple(shape)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
