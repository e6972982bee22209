"""RoPE positions as pure functions: which position a token is rotated to, and rotating keys to another one.

A *text position* counts the tokens of the text and grows for ever. A *RoPE position* is what the model is told instead:
it never leaves the window that the model was trained on. Rotations add up, so a key that was rotated to one position is
rotated to another by the difference alone, whatever constant scales the frequencies or the cosines (linear, llama3,
YaRN).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PositionMap:
    """Map text positions to RoPE positions: monotone, linear between its knots, and of slope 1 behind the last.

    knots: (text position, RoPE position), ascending; (0, 0) is understood. Two may have one RoPE position where no
    token is held between them. The last RoPE position is a whole number. Without knots both positions are the same.
    """

    knots: tuple[tuple[int, float], ...] = ()

    @property
    def offset(self) -> int:
        """Text position minus RoPE position of every token behind the last knot."""
        return self.knots[-1][0] - int(self.knots[-1][1]) if self.knots else 0

    def rope_positions(self, positions: Tensor) -> Tensor:
        """Map text positions >= 0 (any shape) to RoPE positions: float64 of the same shape, on the CPU."""
        at, to = torch.tensor([(0, 0.0), *self.knots], dtype=torch.float64).T.contiguous()
        slope = torch.cat([to.diff() / at.diff(), torch.ones(1, dtype=torch.float64)])
        wanted = positions.cpu().double().contiguous()
        knot = (torch.searchsorted(at, wanted, right=True) - 1).clamp(min=0)
        return to[knot] + (wanted - at[knot]) * slope[knot]

    def squeezed(self, head: int, near: int, to: int, segments: int) -> PositionMap:
        """Return the map in which text position `near`, and all behind it, moves down to RoPE position `to`.

        The first `head` positions stay, up to the first knot at most. Distances behind `near` stay, and what is between
        moves together in proportion. Of its linear parts at most `segments` remain; the oldest become one.
        """
        head = min([head, *(at for at, _ in self.knots[:1])])
        end = float(self.rope_positions(torch.tensor(near)))
        scale = (to - head) / (end - head)
        between = [(at, head + (position - head) * scale) for at, position in self.knots if head < at < near]
        between = between[max(0, len(between) + 1 - segments) :]
        first = [(head, float(head))] if head else []
        return PositionMap((*first, *between, (near, float(to))))


@dataclass(frozen=True, eq=False)
class Rotation:
    """How a layer's keys carry their position: pairs of dimensions, each rotated by position · frequency.

    frequencies: float64 [r / 2] on the CPU, empty for a layer without positions. The r dimensions from `start` on are
    rotated, as pairs (i, i + r / 2) or, `interleaved`, as pairs (2i, 2i + 1).
    """

    frequencies: Tensor
    start: int = 0
    interleaved: bool = False

    def rotate(self, keys: Tensor, by: Tensor) -> Tensor:
        """Rotate keys [..., D] by so many positions each ([...], broadcastable), in float32; keeps the dtype."""
        if not len(self.frequencies):
            return keys
        angle = by.cpu().double()[..., None] * self.frequencies
        cos, sin = (wave.to(keys.device, torch.float32) for wave in (angle.cos(), angle.sin()))
        first, second = (part.float() for part in self.pairs(keys))
        rotated = first * cos - second * sin, second * cos + first * sin
        mixed = torch.stack(rotated, dim=-1).flatten(-2) if self.interleaved else torch.cat(rotated, dim=-1)
        end = self.start + 2 * len(self.frequencies)
        return torch.cat([keys[..., : self.start], mixed.to(keys.dtype), keys[..., end:]], dim=-1)

    def pairs(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return both members of every rotated pair of keys [..., D]: twice [..., r / 2]."""
        size = len(self.frequencies)
        part = keys[..., self.start : self.start + 2 * size]
        return (part[..., ::2], part[..., 1::2]) if self.interleaved else (part[..., :size], part[..., size:])

    def unrotated(self, keys: Tensor) -> Tensor:
        """Return the dimensions of keys [..., D] that are not rotated: [..., D - r]."""
        return torch.cat([keys[..., : self.start], keys[..., self.start + 2 * len(self.frequencies) :]], dim=-1)


def fit_rotation(origin: Tensor, moved: Mapping[int, Tensor], frequencies: Sequence[Tensor]) -> Rotation | None:
    """Find the rotation that takes keys at position 0 to the model's keys of the same tokens at other positions.

    Args:
        origin: [N, H, D], keys of some tokens at position 0. moved: by position, their keys there.
        frequencies: the candidates, each [r / 2].

    Returns:
        None where no candidate explains every pair of dimensions at every position.
    """
    dim = origin.shape[-1]
    candidates = [Rotation(torch.empty(0, dtype=torch.float64))]
    for given in frequencies:
        known, size = given.detach().cpu().double().flatten(), 2 * given.numel()
        starts = {0, dim - size} if 0 < size <= dim else set()
        candidates += [Rotation(known, start, mixed) for start in sorted(starts) for mixed in (False, True)]
    errors = [_misfit(candidate, origin.float(), moved) for candidate in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    return candidates[best] if errors[best] < 1 else None


def _misfit(rotation: Rotation, origin: Tensor, moved: Mapping[int, Tensor]) -> float:
    """Return the largest error of any rotated pair or unrotated dimension, in units of what rounding explains.

    Each is relative to its own size: a large bias in some dimensions must not hide that others are wrong.
    """
    worst = 0.0
    for position, keys in moved.items():
        rounding = (
            max(1e-3, 8 * torch.finfo(keys.dtype).eps) + 4 * position * 2.0**-24
        )  # the model's angles are float32
        off = rotation.rotate(origin, torch.tensor(float(position))) - keys.float()
        for part in (_pair_sizes, _rest_sizes):
            error, size = part(rotation, off), part(rotation, origin)
            if error.numel():
                worst = max(worst, float((error / size.clamp(min=1e-6)).max()) / rounding)
    return worst


def _pair_sizes(rotation: Rotation, keys: Tensor) -> Tensor:
    first, second = (part.flatten(0, -2) for part in rotation.pairs(keys))
    return (first.square() + second.square()).sum(0).sqrt()


def _rest_sizes(rotation: Rotation, keys: Tensor) -> Tensor:
    return rotation.unrotated(keys).flatten(0, -2).norm(dim=0)
