"""ZSMerge (arXiv 2503.10714) as pure tensor functions, by the paper's equation numbers, and how tokens are ranked.

Shapes: B rows, H KV heads, G query heads per KV head, n queries, C candidate slots, K kept, L lost, R residual slots,
D head dimension. Scores, counts and the arithmetic of merging are float32 whatever the model's dtype: in bfloat16 a
count sticks at 256 and a running mean stops moving.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

NEVER = float("-inf")


def slot_bias(count: Tensor, alpha: float) -> Tensor:
    """Eq. 8: what is added to a slot's logits, α log w; -inf for an empty slot. float32, shape of `count`."""
    return torch.where(count > 0, alpha * count.clamp(min=1).log(), NEVER)


def steps_after(valid: Tensor) -> Tensor:
    """[B, n] bool → float32 [B, n]: how many valid tokens follow each token."""
    counted = valid.float()
    return counted.sum(-1, keepdim=True) - counted.cumsum(-1)


def contribution(score: Tensor, attention: Tensor, valid: Tensor, decay: float) -> Tensor:
    """Eq. 5 for n steps at once: s ← λ s + a per step, a summed over the queries of a KV head's group.

    Args:
        score: float32 [B, H, C], before the steps.
        attention: [B, H, G, n, C], weights each query paid each slot.
        valid: bool [B, n]; a padded query neither counts as a step nor contributes.
    """
    weight = decay ** steps_after(valid) * valid  # [B, n]
    total = decay ** valid.sum(-1).float()  # [B]
    paid = torch.einsum("bhgnc,bn->bhc", attention, weight.to(attention.dtype)).float()
    return score * total[:, None, None] + paid


def mean_paid(attention: Tensor, asking: Tensor) -> Tensor:
    """What a window of queries makes of each slot: its mean attention over the queries of a KV head.

    Args:
        attention: float32 [B, H, G, n, C].
        asking: bool [B, n], which queries count.

    Returns:
        float32 [B, H, C].
    """
    batch, heads, group, queries, slots = attention.shape
    share = asking.float() / (group * asking.sum(-1, keepdim=True)).clamp(min=1)  # [B, n]
    share = share.repeat(1, group)[:, None, None].expand(-1, heads, -1, -1)  # [B, H, 1, G·n]
    return (share @ attention.reshape(batch, heads, group * queries, slots))[:, :, 0]


def pooled(paid: Tensor, pool: int) -> Tensor:
    """[B, H, C], the most within `pool` neighbouring slots: it keeps whole phrases together (SnapKV, 2404.14469)."""
    return F.max_pool1d(paid, pool, stride=1, padding=pool // 2)


def passages(votes: Tensor, width: int) -> Tensor:
    """float32 [T] → [T]: the mean of the `width` votes around each token, as far as there are so many tokens."""
    return F.avg_pool1d(votes[None, None], width, stride=1, padding=width // 2, count_include_pad=False)[0, 0]


def worth(attention: Tensor, values: Tensor, floor: float) -> Tensor:
    """(a + floor) · ‖v‖: what a slot can add to an answer, even one that nobody has asked for yet.

    Args:
        attention: float32 [B, H, C], what the slot was paid; values: [B, H, C, D].
    """
    return (attention + floor) * torch.linalg.vector_norm(values, dim=-1, dtype=torch.float32)


def priority(score: Tensor, count: Tensor, position: Tensor, seen: Tensor, sink: int, recent: int) -> Tensor:
    """Who stays, as a number: +inf for sinks and the `recent` newest tokens, -inf for empty slots, else the score.

    Args:
        score, count: float32 [B, H, C]; position: integer [B, H, C]; seen: integer [B], tokens read by each row.
    """
    kept = (position < sink) | (position >= seen[:, None, None] - recent)
    return torch.where(count > 0, torch.where(kept, float("inf"), score), NEVER)


def multi_turn(ranking: Tensor, others: Tensor, first: int) -> Tensor:
    """Two rankings as one: the `first` highest of `ranking` stay, and the rest goes by `others`.

    Args:
        ranking, others: float32 [B, H, C] from `priority`: they agree on who stays anyway.
    """
    chosen = ranking.sort(dim=-1, descending=True, stable=True).indices[..., :first]
    return torch.where(ranking == NEVER, NEVER, others.scatter(-1, chosen, float("inf")))


def lowest(ranking: Tensor, keep: int) -> Tensor:
    """Indices of all but the `keep` highest, in slot order: [B, H, L]. Older wins a tie."""
    return ranking.sort(dim=-1, descending=True, stable=True).indices[..., keep:].sort(-1).values


def compact(present: Tensor) -> Tensor:
    """[B, H, C] bool → indices that put the present slots first, in their order."""
    return present.float().sort(dim=-1, descending=True, stable=True).indices


def take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, H, C, ...] at index [B, H, K] → [B, H, K, ...]."""
    batch, heads, slots = rows.shape[:3]
    start = torch.arange(batch * heads, device=rows.device).view(batch, heads, 1) * slots
    flat = rows.reshape(batch * heads * slots, *rows.shape[3:])
    return flat.index_select(0, (index + start).flatten()).view(*index.shape, *rows.shape[3:])


def merge(
    residual: tuple[Tensor, Tensor, Tensor], lost: tuple[Tensor, Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Eq. 6 and 7: evicted tokens enter the residual slots.

    The oldest evicted tokens take the residual slots that are still empty, as they are. Every other one goes into the
    slot with the largest k_r · k_t, which becomes the mean of all it ever took: k_r ← k_r + Σ(k_t - k_r)/(w + m).
    For one token this is Eq. 7; several tokens choose against the same slots and enter together.

    Args:
        residual: keys, values float32 [B, H, R, D] and count float32 [B, H, R].
        lost: keys, values float32 [B, H, L, D] and count float32 [B, H, L], in order of position; count 0 is padding.

    Returns:
        The new residual (keys, values, count), and the slot each lost token went to, [B, H, L].
    """
    keys, values, count = residual
    lost_keys, lost_values, lost_count = lost
    slots = count.shape[-1]
    present = lost_count > 0
    filled = (count > 0).sum(-1, keepdim=True)
    free = filled + present.cumsum(-1) - 1  # the empty slot that would be this token's
    seeds = present & (free < slots)
    seeding = F.one_hot(free.clamp(0, slots - 1), slots).float() * seeds[..., None]  # [B, H, L, R]
    keys, values = (old + seeding.mT @ new for old, new in ((keys, lost_keys), (values, lost_values)))
    count = count + seeding.sum(-2)

    likeness = (lost_keys @ keys.mT).masked_fill((count == 0)[..., None, :], NEVER)  # [B, H, L, R]
    chosen = torch.where(seeds, free.clamp(0, slots - 1), likeness.argmax(-1))
    joining = F.one_hot(chosen, slots).float() * (present & ~seeds)[..., None]
    arrived = joining.sum(-2)  # [B, H, R], m
    share = (count + arrived).clamp(min=1)[..., None]
    keys = keys + (joining.mT @ lost_keys - arrived[..., None] * keys) / share
    values = values + (joining.mT @ lost_values - arrived[..., None] * values) / share
    return (keys, values, count + arrived), chosen


def weights(
    query: Tensor, key: Tensor, bias: Tensor, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Attention weights by the book, never expanding the keys over the group.

    Args:
        query: [B, H, G, n, D]; key: [B, H, C, D]; bias: additive, broadcastable to [B, H, G, n, C].
        softcap: logits become softcap · tanh(logits / softcap) (Gemma 2).
        sinks: learned logits [H · G] that take part in the softmax and have no value (gpt-oss).

    Returns:
        [B, H, G, n, C] in the query's dtype. What a query that may look at nothing pays is finite and means nothing.
    """
    batch, heads, group, queries, dim = query.shape
    folded = (query * scaling).reshape(batch, heads, group * queries, dim)
    logits = (folded @ key.mT).view(batch, heads, group, queries, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits += bias.clamp(min=torch.finfo(logits.dtype).min).to(logits.dtype)
    if sinks is not None:
        column = sinks.to(logits.dtype).view(1, heads, group, 1, 1).expand(batch, -1, -1, queries, 1)
        logits = torch.cat([logits, column], dim=-1)
    paid = logits.softmax(-1)
    return paid[..., :-1] if sinks is not None else paid


def causal_bias(filled: Tensor, base: Tensor, new: int, slots: int, dtype: torch.dtype) -> Tensor:
    """[B, new, slots]: 0 where a new token may look, else -inf. New token j of row b stands in slot base[b] + j.

    It may look at the first filled[b] slots, and at new tokens up to itself.
    """
    slot = torch.arange(slots, device=base.device)
    own = base[:, None] + torch.arange(new, device=base.device)
    hidden = (slot > own[..., None]) | ((slot >= filled[:, None]) & (slot < base[:, None]))[:, None]
    return torch.zeros(len(base), new, slots, dtype=dtype, device=base.device).masked_fill(hidden, NEVER)


def window_bias(query_position: Tensor, key_position: Tensor, window: int) -> Tensor:
    """[B, n], [B, C] → float32 [B, n, C]: 0 where 0 <= distance < window, else -inf (sliding-window attention)."""
    distance = query_position[:, :, None] - key_position[:, None, :]
    return torch.zeros(distance.shape, device=distance.device).masked_fill((distance < 0) | (distance >= window), NEVER)
