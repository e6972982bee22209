"""Compute ZSMerge (arXiv 2503.10714) as pure tensor functions, named by the paper's equations, and rank slots.

Shapes: B rows, H KV heads, G query heads per KV head, n queries, C candidate slots, K kept, L evicted, R residual
slots, D head dimension. Scores, multiplicities and the arithmetic of merging are float32 whatever the model's dtype: in
bfloat16 a multiplicity sticks at 256 and a running mean stops moving.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = float("-inf")
"""The logit of a slot that is not attended to, and the rank of one that is not kept."""


def slot_bias(multiplicity: Tensor, alpha: float) -> Tensor:
    """Return what is added to a slot's logits, α log w (Eq. 8); -inf for an empty slot. float32 [...]."""
    return torch.where(multiplicity > 0, alpha * multiplicity.clamp(min=1).log(), NEVER)


def steps_after(valid: Tensor) -> Tensor:
    """Count the valid tokens that follow each token: bool [B, n] → float32 [B, n]."""
    counted = valid.float()
    return counted.sum(-1, keepdim=True) - counted.cumsum(-1)


def contribution(score: Tensor, attention: Tensor, valid: Tensor, decay: float) -> Tensor:
    """Update contribution scores by n steps at once (Eq. 5): s ← λ s + a per step, a summed over the group's queries.

    Unrolled: s λ^n + Σ_t λ^(n - t) a_t, where only valid tokens count as steps.

    Args:
        score: float32 [B, H, C], before the steps.
        attention: [B, H, G, n, C], attention weights of each query.
        valid: bool [B, n]; a padded query neither counts as a step nor contributes.
    """
    weight = decay ** steps_after(valid) * valid  # [B, n]
    total = decay ** valid.sum(-1).float()  # [B]
    mass = torch.einsum("bhgnc,bn->bhc", attention, weight.to(attention.dtype)).float()
    return score * total[:, None, None] + mass


def mean_attention(attention: Tensor, counts: Tensor) -> Tensor:
    """Average attention over the queries that count and over the group: float32 [B, H, G, n, C] → [B, H, C].

    counts: bool [B, n], which queries count.
    """
    batch, heads, group, queries, slots = attention.shape
    share = counts.float() / (group * counts.sum(-1, keepdim=True)).clamp(min=1)  # [B, n]
    share = share.repeat(1, group)[:, None, None].expand(-1, heads, -1, -1)  # [B, H, 1, G·n]
    return (share @ attention.reshape(batch, heads, group * queries, slots))[:, :, 0]


def max_pool(score: Tensor, width: int) -> Tensor:
    """Take the maximum over `width` neighbouring slots, [B, H, C]: phrases stay whole (SnapKV, arXiv 2404.14469)."""
    return F.max_pool1d(score, width, stride=1, padding=width // 2)


def smooth_votes(votes: Tensor, width: int, length: Tensor | None = None) -> Tensor:
    """Average the votes for the `width` tokens around each token, fewer at both ends: float32 [T] → [T].

    length: int [], where the text ends before T; what is behind it is zero and does not count.
    """
    if length is not None:
        at, half = torch.arange(len(votes), device=votes.device), width // 2
        counted = torch.minimum(at + half, length - 1) - (at - half).clamp(min=0) + 1
        total = F.avg_pool1d(votes[None, None], width, stride=1, padding=half)[0, 0] * width
        return total / counted.clamp(min=1)
    return F.avg_pool1d(votes[None, None], width, stride=1, padding=width // 2, count_include_pad=False)[0, 0]


def value_weighted_score(attention: Tensor, values: Tensor, floor: float) -> Tensor:
    """Score slots by (attention + floor) · ‖value‖: what each can add to an output, also to one not asked for yet.

    attention: float32 [B, H, C]; values: [B, H, C, D].
    """
    return (attention + floor) * torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)


def retention_rank(
    score: Tensor, multiplicity: Tensor, position: Tensor, seen: Tensor, sink: int, recent: int
) -> Tensor:
    """Rank slots: +inf for the first `sink` and the newest `recent` tokens, -inf for empty slots, else the score.

    Args:
        score, multiplicity: float32 [B, H, C]. position: int [B, H, C]. seen: int [B], tokens read by each row.
    """
    protected = (position < sink) | (position >= seen[:, None, None] - recent)
    return torch.where(multiplicity > 0, torch.where(protected, float("inf"), score), NEVER)


def split_ranking(ranking: Tensor, others: Tensor, first: int) -> Tensor:
    """Keep the `first` highest slots of `ranking` (+inf) and rank the others by `others`; float32 [B, H, C].

    Both come from `retention_rank` and agree on which slots are protected or empty.
    """
    chosen = ranking.sort(dim=-1, descending=True, stable=True).indices[..., :first]
    return torch.where(ranking == NEVER, NEVER, others.scatter(-1, chosen, float("inf")))


def evict_indices(ranking: Tensor, keep: int) -> Tensor:
    """Return the indices of all but the `keep` highest, in slot order: [B, H, L]. The older of equals is kept."""
    return ranking.sort(dim=-1, descending=True, stable=True).indices[..., keep:].sort(-1).values


def compaction_order(present: Tensor) -> Tensor:
    """Return indices that put the present slots first, in their order: bool [B, H, C] → int [B, H, C]."""
    return present.float().sort(dim=-1, descending=True, stable=True).indices


def gather_slots(slots: Tensor, index: Tensor) -> Tensor:
    """Gather slots [B, H, C, ...] at index [B, H, K] → [B, H, K, ...]."""
    batch, heads, count = slots.shape[:3]
    start = torch.arange(batch * heads, device=slots.device).view(batch, heads, 1) * count
    flat = slots.reshape(batch * heads * count, *slots.shape[3:])
    return flat.index_select(0, (index + start).flatten()).view(*index.shape, *slots.shape[3:])


def merge(
    residual: tuple[Tensor, Tensor, Tensor], evicted: tuple[Tensor, Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Merge evicted tokens into the residual slots (Eq. 6 and 7).

    The oldest evicted tokens take the residual slots that are still empty, as they are. Every other one goes into the
    slot with the largest k_r · k_t, which becomes the mean of all it ever took: k_r ← k_r + Σ(k_t - k_r)/(w + m).
    For one token this is Eq. 7; several tokens choose against the same slots and enter together.

    Args:
        residual: keys, values float32 [B, H, R, D] and multiplicity float32 [B, H, R].
        evicted: keys, values float32 [B, H, L, D] and multiplicity float32 [B, H, L], in order of position; 0 is
        padding.

    Returns:
        The new residual (keys, values, multiplicity), and the slot each evicted token went to, [B, H, L].
    """
    keys, values, multiplicity = residual
    new_keys, new_values, new_multiplicity = evicted
    slots = multiplicity.shape[-1]
    present, which = new_multiplicity > 0, torch.arange(slots, device=multiplicity.device)
    filled = (multiplicity > 0).sum(-1, keepdim=True)
    free = filled + present.cumsum(-1) - 1  # the empty slot that would be this token's
    seeds = present & (free < slots)
    # `F.one_hot` would check its input on the host.
    seeding = (free.clamp(0, slots - 1)[..., None] == which).float() * seeds[..., None]  # [B, H, L, R]
    keys, values = (old + seeding.mT @ new for old, new in ((keys, new_keys), (values, new_values)))
    multiplicity = multiplicity + seeding.sum(-2)

    likeness = (new_keys @ keys.mT).masked_fill((multiplicity == 0)[..., None, :], NEVER)  # [B, H, L, R]
    chosen = torch.where(seeds, free.clamp(0, slots - 1), likeness.argmax(-1))
    joining = (chosen[..., None] == which).float() * (present & ~seeds)[..., None]
    joined = joining.sum(-2)  # [B, H, R], m
    share = (multiplicity + joined).clamp(min=1)[..., None]
    keys = keys + (joining.mT @ new_keys - joined[..., None] * keys) / share
    values = values + (joining.mT @ new_values - joined[..., None] * values) / share
    return (keys, values, multiplicity + joined), chosen


def attention_weights(
    query: Tensor, key: Tensor, bias: Tensor, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Compute attention weights without expanding the keys over the group.

    Args:
        query: [B, H, G, n, D]. key: [B, H, C, D]. bias: added to the logits, broadcastable to [B, H, G, n, C].
        softcap: logits become softcap · tanh(logits / softcap) (Gemma 2).
        sinks: learned logits [H · G], or [B, H · G], that take part in the softmax and have no value (gpt-oss).

    Returns:
        [B, H, G, n, C] in the query's dtype. A query that sees no slot gets finite weights without meaning.
    """
    batch, heads, group, queries, dim = query.shape
    folded = (query * scaling).reshape(batch, heads, group * queries, dim)
    logits = (folded @ key.mT).view(batch, heads, group, queries, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits += bias.clamp(min=torch.finfo(logits.dtype).min).to(logits.dtype)
    if sinks is not None:
        column = sinks.to(logits.dtype).view(-1, heads, group, 1, 1).expand(batch, -1, -1, queries, 1)
        logits = torch.cat([logits, column], dim=-1)
    weights = logits.softmax(-1)
    return weights[..., :-1] if sinks is not None else weights


def grouped_weights(
    queries: Tensor, keys: Tensor, bias: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Compute `attention_weights` of queries [B, Hq, n, D] to keys [B, H, C, D]: [B, H, G, n, C]."""
    batch, heads, count, dim = queries.shape
    grouped = queries.view(batch, keys.shape[1], heads // keys.shape[1], count, dim)
    return attention_weights(grouped, keys, bias, scaling, softcap, sinks)


def causal_bias(filled: Tensor, new: int, slots: int, dtype: torch.dtype) -> Tensor:
    """Return the causal mask of new tokens: 0 where one may attend, else -inf; [B, new, slots].

    New token j of row b stands in slot filled[b] + j, int [B]. It sees all slots before its own, and its own.
    """
    slot = torch.arange(slots, device=filled.device)
    own = filled[:, None] + torch.arange(new, device=filled.device)
    return torch.zeros(len(filled), new, slots, dtype=dtype, device=filled.device).masked_fill(
        slot > own[..., None], NEVER
    )


def push_ring(
    ring: Tensor, ring_positions: Tensor, queries: Tensor, positions: Tensor, query_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Write new queries into a ring, in which the query of position p has entry p mod W.

    Nothing but tensors decides, so that it can be captured: entry r takes the newest position p = r (mod W) among the
    new ones, if there is one.

    Args:
        ring: [B, Hq, W, D]. ring_positions: int32 [B, W], -1: none.
        queries: [B, Hq, n, D], of consecutive positions int32 [B, n], those of padding aside.
        query_positions: int32 [B, n], -1 for padding.

    Returns:
        The new ring and its positions.
    """
    size = ring.shape[2]
    last = query_positions.amax(1, keepdim=True)  # -1 for a row without new tokens
    newest = last - (last - torch.arange(size, device=last.device)) % size  # [B, W]
    index = newest - positions[:, :1]
    taken = (index >= 0) & (last >= 0)
    given = gather_slots(queries, index.clamp(0, queries.shape[2] - 1)[:, None].expand(-1, ring.shape[1], -1))
    new_positions = torch.where(taken, newest, ring_positions).to(ring_positions.dtype)
    return torch.where(taken[:, None, :, None], given, ring), new_positions


def window_bias(query_position: Tensor, key_position: Tensor, window: int) -> Tensor:
    """Return the mask of sliding-window attention: 0 where 0 <= distance < window, else -inf; float32 [B, n, C].

    query_position: int [B, n]; key_position: int [B, C].
    """
    distance = query_position[:, :, None] - key_position[:, None, :]
    return torch.zeros(distance.shape, device=distance.device).masked_fill((distance < 0) | (distance >= window), NEVER)
