"""Check a saved session before it is used: a file may have been made by anybody, with a right checksum.

Shapes, dtypes and limits come from the model that reads it (`ExpectedCache`). Everything else must agree with itself:
what the facts say with what the tensors hold. All functions raise ValueError, which says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import date
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.cache_state import recurrent_facts, recurrent_specs, state_key
from zsmerge_llm.kvcache.layer_cache import SAVED, LayerCache
from zsmerge_llm.kvcache.recurrent_state import RecurrentSpec
from zsmerge_llm.kvcache.slots import LAYER_FACTS, PER_SLOT, LayerSpec
from zsmerge_llm.models.device import HOST
from zsmerge_llm.retrieval.saved_index import check_index, is_index
from zsmerge_llm.retrieval.section_notes import check_notes
from zsmerge_llm.sessions.file_format import TensorInfo
from zsmerge_llm.sessions.identity import Fingerprint, Kind

FACTS: dict[str, type] = {
    **{"name": str, "named": bool, "forked": bool, "digest": str, "prefix_digests": list, "messages": int},
    **{"tokens": int, "has_document": bool, "is_document": bool, "fingerprint": dict, "today": str, "kind": str},
    **{"notes": dict, "cache": dict},
}
"""What the header says of a session, and its types."""
CACHE_FACTS: dict[str, type] = dict.fromkeys(("specs", "lengths", "position_maps", "num_filled"), list)
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""dtypes of safetensors that keys, values, queries and logits may have."""
DTYPES = {**FLOATS, "I32": torch.int32, "BOOL": torch.bool, "U8": torch.uint8}
LAYER_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""dtypes of layers, by their names in the facts."""
COUNTED = ("multiplicity", "position", "dropped", "multi_turn", "accumulated_until", "query_positions")
"""Tensors of a layer whose numbers must agree with the tokens that were read."""
MAX_TOKENS = 2**31 - 1
"""Positions are int32."""
MAX_SIZE = 2**20
"""Heads, and dimensions of a head, of a model that is not known."""
EXACT = 2**24
"""Float32 counts every number of tokens up to this one."""
ROUNDING = 1e-6
MULTIPLIED = ("keys", "values", "queries", "residual_keys", "residual_values")
"""Tensors whose numbers the model multiplies, by each other and by its weights."""
LARGEST = 2.0**50
"""Size that none of these reaches in a model: far below what overflows float32 once it is squared."""


@dataclass(frozen=True)
class ExpectedCache:
    """What the cache of a saved session must be like: the model that reads it knows.

    config: of new conversations; one that was saved may have other budgets of layers, sinks and recent slots.
    specs, recurrent: of the model's layers, on their devices. vocab_size: number of logits.
    """

    config: CacheConfig
    specs: tuple[LayerSpec, ...]
    recurrent: tuple[RecurrentSpec, ...]
    vocab_size: int


@dataclass(frozen=True)
class SavedCache:
    """The shape of a saved cache, once the header is known to fit. layers: empty, without rows."""

    specs: tuple[LayerSpec, ...]
    recurrent: tuple[RecurrentSpec, ...]
    layers: list[LayerCache]
    seen: int
    num_filled: list[int]
    num_tokens: int
    vocab_size: int


# -- facts -------------------------------------------------------------------------------------------------------------


def check_facts(facts: Mapping[str, Any]) -> None:
    """Check the types and ranges of what a header says of a session, and that its parts agree."""
    _check_types(facts, FACTS)
    _check_strings("prefix_digests", facts["prefix_digests"])
    if set(facts["fingerprint"]) != {field.name for field in fields(Fingerprint)}:
        raise ValueError("has a fingerprint of other parts")
    _check_strings("fingerprint", facts["fingerprint"].values())
    if facts["kind"] not in get_args(Kind):
        raise ValueError(f"ends after a {facts['kind']!r}, which is not known")
    date.fromisoformat(facts["today"])
    if not (0 <= facts["messages"] <= MAX_TOKENS and 0 <= facts["tokens"] <= MAX_TOKENS):
        raise ValueError("has an impossible number of messages or tokens")
    if facts["is_document"] != (facts["has_document"] and facts["kind"] == "document" and not facts["forked"]):
        raise ValueError("contradicts itself about its document")
    check_notes(facts["notes"])
    if facts["notes"] and not facts["has_document"]:
        raise ValueError("has notes about no document")
    cache = facts["cache"]
    _check_types(cache, {"config": dict, **CACHE_FACTS})
    one_row = [cache["lengths"], *cache["num_filled"]]
    if len(cache["num_filled"]) != len(cache["specs"]) or len(cache["position_maps"]) != 1:
        raise ValueError("does not describe one row of every layer")
    if any(not isinstance(row, list) or len(row) != 1 or type(row[0]) is not int for row in one_row):
        raise ValueError("does not describe one row of every layer")
    if not 0 <= cache["lengths"][0] <= facts["tokens"]:
        raise ValueError(f"has read {cache['lengths'][0]} of {facts['tokens']} tokens")
    _check_positions(cache["position_maps"][0], cache["lengths"][0])


def _check_types(facts: Mapping[str, Any], types: Mapping[str, type]) -> None:
    for name, kind in types.items():
        if type(facts.get(name)) is not kind:
            raise ValueError(f"has no {kind.__name__} as {name!r}")


def _check_strings(name: str, values: Any) -> None:
    if not all(type(value) is str for value in values):
        raise ValueError(f"has no strings as {name!r}")


def _check_positions(knots: Any, seen: int) -> None:
    """Check the knots of a `PositionMap`: ascending, within the text, and squeezing it, as `squeezed` makes them."""
    at, to = 0, 0.0
    for knot in knots if isinstance(knots, list) else [None]:
        if not isinstance(knot, list) or [type(number) for number in knot] not in ([int, float], [int, int]):
            raise ValueError("has no numbers as positions")
        if not (at < knot[0] <= seen and to <= knot[1] <= to + (knot[0] - at) * (1 + ROUNDING) + ROUNDING):
            raise ValueError("has positions that do not ascend, or lie outside of the text")
        at, to = knot
    if to != int(to):
        raise ValueError("has positions behind a broken number")


# -- the header --------------------------------------------------------------------------------------------------------


def check_header(
    facts: Mapping[str, Any], tensors: Mapping[str, TensorInfo], expected: ExpectedCache | None
) -> SavedCache:
    """Check names, dtypes and shapes of all tensors, before any is read; `facts` are checked.

    expected: None takes the shapes that the facts announce, in host memory.
    """
    cache = facts["cache"]
    if len(cache["specs"]) > len(tensors):
        raise ValueError("describes more layers than it holds")
    specs, config = _specs(cache["specs"], expected), _config(cache["config"], expected)
    recurrent = _recurrent_specs(cache.get("recurrent_specs", []), expected)
    layers = Cache(config, specs, rows=0).layers
    seen, num_filled = cache["lengths"][0], [row[0] for row in cache["num_filled"]]
    vocab_size = _vocab_size(tensors, expected)
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"tokens": (torch.int32, (facts["tokens"],))}
    for index, layer in enumerate(layers):
        given = tensors.get(f"{index}.multiplicity")
        capacity = layer.capacity if given is None else given.shape[-1]  # free slots need not be saved
        if layer.config.slots is not None:
            capacity = min(capacity, layer.capacity)
        for name in SAVED:
            empty = getattr(layer, name)
            shape = (1, *empty.shape[1:])
            wanted[f"{index}.{name}"] = (empty.dtype, (*shape[:2], capacity, *shape[3:]) if name in PER_SLOT else shape)
        if not layer.config.residual <= num_filled[index] <= capacity or not capacity:
            raise ValueError(f"uses {num_filled[index]} of {capacity} slots in layer {index}")
    for index, spec in enumerate(recurrent):
        wanted |= {state_key(index, each.name): (each.dtype, (1, *each.shape)) for each in spec.tensors}
    wanted = {name: known for name, known in wanted.items() if 0 not in known[1]}
    beside = {name for name, is_there in (("logits", seen), ("document", facts["has_document"])) if is_there}
    if {name for name in tensors if not is_index(name)} != beside | set(wanted):
        raise ValueError("has other tensors than its cache needs")
    for name, (dtype, shape) in wanted.items():
        if DTYPES.get(tensors[name].dtype) != dtype or tensors[name].shape != shape:
            raise ValueError(f"holds {name} as {tensors[name].dtype}{list(tensors[name].shape)}")
    if "document" in tensors and (tensors["document"].dtype != "U8" or len(tensors["document"].shape) != 1):
        raise ValueError("holds no text as its document")
    return SavedCache(specs, recurrent, layers, seen, num_filled, facts["tokens"], vocab_size)


def _specs(saved: list[Any], expected: ExpectedCache | None) -> tuple[LayerSpec, ...]:
    """Return the layers of the model, which must be those that were saved, or those that were saved."""
    if expected is None:
        return tuple(_spec(each) for each in saved)
    names = {dtype: name for name, dtype in LAYER_DTYPES.items()}
    known = [{**spec.facts, "dtype": names.get(spec.dtype), "device": None} for spec in expected.specs]
    if [{**each, "device": None} if isinstance(each, dict) else None for each in saved] != known:
        raise ValueError("describes the attention layers of another model")
    return expected.specs


def _recurrent_specs(saved: Any, expected: ExpectedCache | None) -> tuple[RecurrentSpec, ...]:
    """Return the recurrent layers of the model, which must be those that were saved, or those that were saved."""
    if expected is not None:
        if saved != recurrent_facts(expected.recurrent):
            raise ValueError("describes the recurrent layers of another model")
        return expected.recurrent
    for each in saved if isinstance(saved, list) else [None]:
        if not isinstance(each, dict) or set(each) != {"layer", "tensors"} or type(each["layer"]) is not int:
            raise ValueError("describes recurrent layers in other words")
        for tensor in each["tensors"] if isinstance(each["tensors"], list) else [None]:
            if not isinstance(tensor, list) or len(tensor) != 3 or type(tensor[0]) is not str:
                raise ValueError("describes recurrent layers in other words")
            sizes, dtype = tensor[1:]
            if not isinstance(sizes, list) or any(type(size) is not int or not 0 < size <= MAX_SIZE for size in sizes):
                raise ValueError("describes states of impossible shapes")
            if type(dtype) is not str or dtype not in LAYER_DTYPES:
                raise ValueError("describes an impossible dtype")
    return recurrent_specs(saved, torch.device(HOST))


def _spec(saved: Any) -> LayerSpec:
    """Return a saved description of a layer, in host memory."""
    if not isinstance(saved, dict) or set(saved) != set(LAYER_FACTS):
        raise ValueError("describes attention layers in other words")
    sizes = [saved[name] for name in ("query_heads", "kv_heads", "key_dim", "value_dim")]
    window, factors = saved["window"], [saved[name] for name in ("scaling", "softcap") if saved[name] is not None]
    if any(type(size) is not int or not 0 < size <= MAX_SIZE for size in sizes) or sizes[0] % sizes[1]:
        raise ValueError("describes impossible heads")
    if window is not None and (type(window) is not int or not 0 < window <= MAX_TOKENS):
        raise ValueError("describes an impossible window")
    if any(type(factor) not in (int, float) or not math.isfinite(factor) for factor in factors):
        raise ValueError("describes impossible factors of its logits")
    if type(saved["dtype"]) is not str or saved["dtype"] not in LAYER_DTYPES:
        raise ValueError("describes an impossible dtype")
    return LayerSpec(**{**saved, "dtype": LAYER_DTYPES[saved["dtype"]], "device": torch.device(HOST)})


def _config(saved: dict[str, Any], expected: ExpectedCache | None) -> CacheConfig:
    """Return the configuration of a saved cache: one that the model gives to conversations or documents."""
    if expected is None:
        return CacheConfig.from_dict(saved)
    base = expected.config
    config = CacheConfig.from_dict(saved, base.policy)
    pinned = base if config.sink == base.sink else base.with_pinned_prefix(config.sink)
    known = pinned.with_recent(config.recent)
    if base.uses_question and config.slots is not None:
        known = known.replace(layer_budgets=config.layer_budgets)
    ahead = known.query_agnostic()
    # Up to format 9, documents recorded as many queries as chats.
    if config not in (known, ahead, ahead.replace(observation_window=known.observation_window)):
        raise ValueError("has a cache of another configuration than it says")
    return config


def _vocab_size(tensors: Mapping[str, TensorInfo], expected: ExpectedCache | None) -> int:
    """Return how many tokens there are, which is the number of logits."""
    logits = tensors.get("logits")
    if logits is None:
        return MAX_TOKENS if expected is None else expected.vocab_size
    vocab_size = expected.vocab_size if expected is not None else logits.shape[-1] if logits.shape else 0
    if logits.dtype not in FLOATS or logits.shape != (1, vocab_size):
        raise ValueError(f"holds logits as {logits.dtype}{list(logits.shape)}")
    return vocab_size


# -- the tensors -------------------------------------------------------------------------------------------------------


def check_tensors(saved: SavedCache, tensors: Mapping[str, Tensor]) -> None:
    """Check the numbers in all tensors of a saved cache, which are in host memory and have the shapes of its header."""
    tokens = tensors["tokens"].numpy() if saved.num_tokens else np.zeros(0)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < saved.vocab_size:
        raise ValueError(f"holds token ids outside of the vocabulary of {saved.vocab_size}")
    for name, tensor in tensors.items():
        limit = LARGEST if name.rpartition(".")[2] in MULTIPLIED else math.inf
        if tensor.is_floating_point() and not _all_below(tensor, limit):
            raise ValueError(f"holds {name} that are no finite numbers")
    check_index(tensors, saved.vocab_size)
    for index, (layer, filled) in enumerate(zip(saved.layers, saved.num_filled, strict=True)):
        own = {name: tensors[f"{index}.{name}"][0].numpy() for name in COUNTED if f"{index}.{name}" in tensors}
        _check_slots(own, layer.config, filled, saved.seen, index)
        _check_queries(own, saved.seen, index)


def _all_below(tensor: Tensor, limit: float) -> bool:
    """Return whether all numbers are smaller than a limit. Larger ones and NaN have larger patterns of bits."""
    size = 8 * tensor.element_size()
    signed, unsigned = {16: (torch.int16, np.uint16), 32: (torch.int32, np.uint32)}[size]
    bits = tensor.view(signed).numpy()
    most = int(torch.tensor(limit, dtype=tensor.dtype).view(signed))
    return bool(bits.max() < most and bits.view(unsigned).max() < most + (1 << (size - 1)))


def _check_slots(own: Mapping[str, Any], config: CacheConfig, filled: int, seen: int, index: int) -> None:
    """Check that the slots of a layer hold tokens of the text, in order, and that all tokens are counted."""
    multiplicity, position, residual = own["multiplicity"], own["position"], config.residual
    merged, verbatim = multiplicity[:, :residual], multiplicity[:, residual:filled]
    if (verbatim != 1).any() or multiplicity[:, filled:].any():
        raise ValueError(f"counts other tokens than it holds in layer {index}")
    dropped = own["dropped"]
    if any((count < 0).any() or (count != np.floor(count)).any() for count in (merged, dropped)):
        raise ValueError(f"counts parts of tokens in layer {index}")
    total = merged.sum(1, dtype=np.float64) + (filled - residual) + dropped
    if (np.abs(total - seen) > (0 if seen <= EXACT else seen / EXACT * 1024)).any():
        raise ValueError(f"has read {seen} tokens and counts {total.max():.0f} in layer {index}")
    held = position[:, residual:filled]
    if position.min() < 0 or (held.size and (held[:, -1:] >= seen).any()) or (np.diff(held) <= 0).any():
        raise ValueError(f"holds tokens of other positions than it has read in layer {index}")
    if residual and (position[:, :residual][merged > 0] >= seen).any():
        raise ValueError(f"holds tokens of other positions than it has read in layer {index}")


def _check_queries(own: Mapping[str, Any], seen: int, index: int) -> None:
    """Check the ring of the newest queries: the query of position p has entry p mod W."""
    if own["multi_turn"].view(np.uint8).item() > 1 or not -1 <= own["accumulated_until"].item() < seen:
        raise ValueError(f"has impossible marks of its turns in layer {index}")
    positions = own.get("query_positions")
    if positions is not None:
        used = positions >= 0
        entries = positions[used] % len(positions)
        if positions.min() < -1 or positions.max() >= seen or (entries != np.flatnonzero(used)).any():
            raise ValueError(f"holds queries of other tokens than it has read in layer {index}")
