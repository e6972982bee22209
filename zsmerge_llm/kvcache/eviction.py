"""Update a layer after attention, and compress it: evict what the policy ranks lowest, merge or drop it.

The policy ranks (`kvcache.policies`); everything here is the same for all of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.layer_cache import KVView, LayerCache
from zsmerge_llm.kvcache.policies import policy_of
from zsmerge_llm.kvcache.policies.base import RankingContext
from zsmerge_llm.kvcache.slots import PER_SLOT, AttentionInputs, Slots


def update(view: KVView, inputs: AttentionInputs) -> None:
    """Observe a pass after its attention, and compress the rows that have used up their room."""
    if view.config.slots is not None:
        policy_of(view.config).observe(view, inputs)
    compress_if_full(view, inputs)


def update_first(count: int, view: KVView, inputs: AttentionInputs) -> None:
    """`update` with the first `count` tokens of one row, as if the others had never come. They must all fit."""
    layer, new = view.layer, inputs.keys.shape[2]
    used = layer.num_filled[0]
    layer.multiplicity[:, :, used + count : used + new] = 0
    update(replace(view, end=used + count), inputs.first(count))


def compress_if_full(view: KVView, inputs: AttentionInputs, votes: Tensor | None = None) -> None:
    """Count the new tokens, and compress the rows that have used up their room; scores are up to date.

    votes: float32 [T], what all layers together make of the surroundings of each token read (`ObservationWindow`).
    """
    layer = view.layer
    filled, due = layer.filled_after(inputs), layer.rows_due(inputs)
    layer.num_filled = [layer.config.slots or 0 if is_due else end for is_due, end in zip(due, filled, strict=True)]
    if any(due) or not view.in_place:
        _compress(view, due, inputs.seen, votes, inputs.pinned_recent)


def compress_stage(layer: LayerCache, seen: Tensor) -> None:
    """Compress rows with tokens in their stage now, rather than while the next tokens are waited for.

    seen: int [B], tokens read by each row.
    """
    slots, due = layer.config.slots, layer.needs_compression
    if slots is None or not any(due):
        return
    view = layer.view()
    policy_of(layer.config).observe_between_turns(view, due)
    layer.num_filled = [slots if is_due else end for is_due, end in zip(due, layer.num_filled, strict=True)]
    _compress(view, due, seen.to(layer.spec.device))


def only_records(layer: LayerCache, new: int) -> bool:
    """Return whether `update` does nothing for `new` tokens but count them and record their queries."""
    if layer.config.slots is None:
        return True
    policy = policy_of(layer.config)
    recorded = not policy.records_queries or new <= layer.config.observation_window
    return layer.fits(new) and not policy.observes_every_pass and recorded


def records_queries(layer: LayerCache) -> bool:
    """Return whether the newest queries are recorded for scoring."""
    return layer.queries.shape[2] > 0


def _compress(view: KVView, due: list[bool], seen: Tensor, votes: Tensor | None = None, pinned_recent: int = 0) -> None:
    """Alg. 1: of each row that is due keep the highest ranks, and merge or drop the others. Other rows keep all.

    Where the new tokens stand beside the slots, this also moves them in, for all rows.
    """
    layer, config, residual = view.layer, view.config, view.config.residual
    assert config.slots is not None  # the exact cache never compresses
    rows = [row for row, is_due in enumerate(due) if is_due or not view.in_place]
    index = torch.tensor(rows, device=seen.device)
    all_rows = len(rows) == len(due)
    slots = {name: getattr(view, name)[:, :, residual:] for name in PER_SLOT}
    if not all_rows:
        slots = {name: tensor[index] for name, tensor in slots.items()}
    evicts = torch.tensor([due[row] for row in rows], device=seen.device)[:, None, None]
    context = RankingContext(seen[index], layer.multi_turn[index], votes, pinned_recent)
    verbatim = replace(view, slots=Slots(**slots), end=view.end - residual, in_place=False)
    ranking = equations.retention_rank(
        policy_of(config).rank(verbatim, context),
        verbatim.multiplicity,
        verbatim.position,
        context.seen,
        config.sink,
        config.recent,
    )
    evicted = equations.evict_indices(ranking, config.slots - residual)
    multiplicity = verbatim.multiplicity
    gone = equations.gather_slots(multiplicity, evicted) * evicts
    merged = {name: equations.gather_slots(slots[name], evicted) for name in ("keys", "values", "position") if residual}
    # A row that is not due keeps its lowest ranks too: it is here only because its new tokens have to move in.
    kept = torch.ones_like(multiplicity).scatter(2, evicted, (~evicts).float().expand(evicted.shape)) * multiplicity
    order = equations.compaction_order(kept > 0)[..., : layer.capacity - residual]
    place = slice(None) if all_rows else index
    for name, tensor in {**slots, "multiplicity": kept}.items():
        survivors = equations.gather_slots(tensor, order)
        getattr(layer, name)[place, :, residual : residual + survivors.shape[2]] = survivors
    if residual:
        _merge_evicted(layer, place, {**merged, "multiplicity": gone})
        layer.score[:, :, :residual] = view.score[:, :, :residual]
        layer.cumulative_attention[:, :, :residual] = view.cumulative_attention[:, :, :residual]
    else:
        layer.dropped[place] += gone.sum(-1)


def _merge_evicted(layer: LayerCache, rows: slice | Tensor, evicted: dict[str, Tensor]) -> None:
    """Merge evicted tokens into the residual slots of some rows."""
    size = layer.config.residual
    before = layer.multiplicity[rows, :, :size]
    residual = (layer.residual_keys[rows], layer.residual_values[rows], before)
    entering = (evicted["keys"].float(), evicted["values"].float(), evicted["multiplicity"])
    (keys, values, multiplicity), chosen = equations.merge(residual, entering)
    # A residual slot has the position of its first token; evicted entries of multiplicity 0 are padding.
    position = evicted["position"].masked_fill(evicted["multiplicity"] == 0, torch.iinfo(torch.int32).max)
    first = layer.position[rows, :, :size].scatter_reduce(2, chosen, position, "amin", include_self=False)
    layer.position[rows, :, :size] = torch.where(before == 0, first, layer.position[rows, :, :size])
    layer.residual_keys[rows] = keys
    layer.residual_values[rows] = values
    layer.keys[rows, :, :size] = keys.to(layer.keys.dtype)
    layer.values[rows, :, :size] = values.to(layer.values.dtype)
    layer.multiplicity[rows, :, :size] = multiplicity
