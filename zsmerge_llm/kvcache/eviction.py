"""Update a layer after attention, and compress it: evict what the policy ranks lowest, merge or drop it.

The policy ranks (`kvcache.policies`); everything here is the same for all of them. Which rows compress is decided on
the host, by numbers that it can foresee; the work itself is tensor functions alone, and can be captured as a graph.
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
    observe(view, inputs)
    if any(view.layer.rows_due(inputs)):
        policy_of(view.config).prepare(view, view.layer.due(inputs), inputs)
    compress_if_full(view, inputs)


def observe(view: KVView, inputs: AttentionInputs) -> None:
    """Let the policy see a pass. The exact cache has none."""
    if view.config.slots is not None:
        policy_of(view.config).observe(view, inputs)


def update_first(num_kept: list[int], view: KVView, inputs: AttentionInputs) -> None:
    """`update` with the first tokens of each row alone, as if the others had never come. They must all fit."""
    layer = view.layer
    kept = inputs.first(torch.tensor(num_kept, device=layer.filled.device), num_kept)
    commit(layer, kept)
    layer.num_filled = layer.filled_after(kept)


def commit(layer: LayerCache, inputs: AttentionInputs) -> None:
    """Count tokens that a pass has written behind the layer's slots, those that are valid; forget the others.

    Tensors only: the caller counts on the host, and compresses the rows that are full before the next pass.
    """
    device, new = layer.filled.device, inputs.valid.shape[1]
    row, place = torch.arange(len(layer.filled), device=device)[:, None], torch.arange(new, device=device)
    multiplicity = inputs.valid.float()[..., None].expand(-1, -1, layer.spec.kv_heads)
    layer.multiplicity[row, :, layer.filled[:, None] + place] = multiplicity
    observe(layer.view(layer.capacity), inputs)
    layer.filled.add_(inputs.counts)


def compress_if_full(view: KVView, inputs: AttentionInputs, votes: Tensor | None = None) -> None:
    """Count the new tokens, and compress the rows that have used up their room; scores are up to date.

    votes: float32 [T], what all layers together make of the surroundings of each token read (`ObservationWindow`).
    """
    layer, slots = view.layer, view.config.slots or 0
    filled, due = layer.filled_after(inputs), layer.rows_due(inputs)
    if view.in_place and not any(due):
        layer.count(inputs.num_new_tokens, inputs.counts)
        return
    evicts = layer.due(inputs)
    layer.set_filled(
        [slots if is_due else end for is_due, end in zip(due, filled, strict=True)],
        torch.where(evicts, slots, layer.filled + inputs.counts),
    )
    if not view.in_place or all(due):
        _compress(view, evicts, RankingContext(inputs.seen, layer.multi_turn, votes, inputs.pinned_recent))
    else:
        some, rows = _select_due(layer, due)
        context = RankingContext(inputs.seen[rows], some.multi_turn, votes, inputs.pinned_recent)
        _compress(some.view(view.end), None, context)
        layer.put_rows(rows, some)


def compress_stage(layer: LayerCache, seen: Tensor) -> None:
    """Compress rows with tokens in their stage now, rather than while the next tokens are waited for.

    seen: int [B], tokens read by each row.
    """
    due = layer.needs_compression
    if not any(due):
        return
    policy_of(layer.config).observe_between_turns(layer.view(), torch.tensor(due, device=layer.filled.device))
    seen = seen.to(layer.spec.device)
    if all(due):
        _score_and_compress(layer.view(), seen)
    else:
        some, rows = _select_due(layer, due)
        _score_and_compress(some.view(), seen[rows])
        layer.put_rows(rows, some)
    slots = layer.config.slots or 0
    layer.num_filled = [slots if is_due else end for is_due, end in zip(due, layer.num_filled, strict=True)]


def compressed_rows(layer: LayerCache, rows: Tensor, seen: Tensor) -> LayerCache:
    """Score and compress copies of rows int [K] of a layer, which are full: a layer of K rows.

    seen: int [K], tokens read by each of these rows. Tensors only: the caller counts on the host.
    """
    some = layer.select_rows(rows)
    _score_and_compress(some.view(some.capacity), seen)
    return some


def only_records(layer: LayerCache, new: int) -> bool:
    """Return whether `update` does nothing for `new` tokens but count them and record their queries."""
    if layer.config.slots is None:
        return True
    return layer.fits(new) and not policy_of(layer.config).observes_every_pass


def records_queries(layer: LayerCache) -> bool:
    """Return whether the newest queries are recorded for scoring."""
    return layer.queries.shape[2] > 0


def _select_due(layer: LayerCache, due: list[bool]) -> tuple[LayerCache, Tensor]:
    """Return a copy of the rows that are due, and their indices int [K]."""
    which = [row for row, is_due in enumerate(due) if is_due]
    rows = torch.tensor(which, device=layer.filled.device)
    some = layer.select_rows(rows)
    some.num_filled = [layer.num_filled[row] for row in which]
    return some, rows


def _score_and_compress(view: KVView, seen: Tensor) -> None:
    """Compress all rows of a layer while no pass is running. seen: int [B]."""
    layer = view.layer
    policy_of(layer.config).prepare(view, torch.ones_like(layer.multi_turn), None)
    layer.filled.fill_(layer.config.slots or 0)
    _compress(view, None, RankingContext(seen, layer.multi_turn))


def _compress(view: KVView, evicts: Tensor | None, context: RankingContext) -> None:
    """Alg. 1: of each row keep the highest ranks, and merge or drop the others.

    evicts: bool [B], rows that do; None: all. Other rows keep all they hold: their new tokens, which stand beside the
    slots, are only moved in.
    """
    layer, config, residual = view.layer, view.config, view.config.residual
    assert config.slots is not None  # the exact cache never compresses
    slots = {name: getattr(view, name)[:, :, residual:] for name in PER_SLOT}
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
    multiplicity, gone = verbatim.multiplicity, equations.gather_slots(verbatim.multiplicity, evicted)
    stays = torch.zeros((), device=gone.device) if evicts is None else (~evicts).float()[:, None, None]
    gone = gone * (1 - stays)
    merged = {name: equations.gather_slots(slots[name], evicted) for name in ("keys", "values", "position") if residual}
    kept = torch.ones_like(multiplicity).scatter(2, evicted, stays.expand(evicted.shape)) * multiplicity
    order = equations.compaction_order(kept > 0)[..., : layer.capacity - residual]
    for name, tensor in {**slots, "multiplicity": kept}.items():
        survivors = equations.gather_slots(tensor, order)
        getattr(layer, name)[:, :, residual : residual + survivors.shape[2]] = survivors
    if residual:
        _merge_evicted(layer, {**merged, "multiplicity": gone})
        layer.score[:, :, :residual] = view.score[:, :, :residual]
        layer.cumulative_attention[:, :, :residual] = view.cumulative_attention[:, :, :residual]
    else:
        layer.dropped += gone.sum(-1)


def _merge_evicted(layer: LayerCache, evicted: dict[str, Tensor]) -> None:
    """Merge evicted tokens into the residual slots."""
    size = layer.config.residual
    before = layer.multiplicity[:, :, :size]
    residual = (layer.residual_keys, layer.residual_values, before)
    entering = (evicted["keys"].float(), evicted["values"].float(), evicted["multiplicity"])
    (keys, values, multiplicity), chosen = equations.merge(residual, entering)
    # A residual slot has the position of its first token; evicted entries of multiplicity 0 are padding.
    position = evicted["position"].masked_fill(evicted["multiplicity"] == 0, torch.iinfo(torch.int32).max)
    first = layer.position[:, :, :size].scatter_reduce(2, chosen, position, "amin", include_self=False)
    layer.position[:, :, :size] = torch.where(before == 0, first, layer.position[:, :, :size])
    layer.residual_keys.copy_(keys)
    layer.residual_values.copy_(values)
    layer.keys[:, :, :size] = keys.to(layer.keys.dtype)
    layer.values[:, :, :size] = values.to(layer.values.dtype)
    layer.multiplicity[:, :, :size] = multiplicity
