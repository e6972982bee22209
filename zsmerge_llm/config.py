"""What a user may set: the cache (`CacheConfig`) and one generation (`SamplingParams`). Imports nothing heavy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from zsmerge_llm.errors import ConfigError

Scoring = Literal["attention", "window", "position"]

AHEAD_FLOOR = 0.02
"""`floor` where nobody knows yet what will be asked."""
PINNED = 64
"""Tokens that are kept for their place, beyond the sinks, come in multiples of this."""
ROUNDING = 1e-6
"""What a number of slots may be off by before it counts as another."""


def _integer(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be a whole number of at least {low}, not {value!r}.")


def _number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, not {value!r}.")
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie between {low:g} and {high:g}, not {value!r}.")


@dataclass(frozen=True)
class CacheConfig:
    """The budget of the compressed cache and the rule that decides who stays in it.

    Every KV head of every full-attention layer holds `slots` entries: the first `sink` tokens, the `recent` newest
    ones, `residual` slots into which evicted tokens are merged, and in what is left the tokens of the highest score
    (ZSMerge, arXiv 2503.10714: B_p = recent, B_r = residual, B_c = slots - sink - recent - residual). Up to `slots`
    tokens nothing is lost at all. `stage` more entries take the tokens appended between two compressions.

    `scoring` is the rule:

    - `"attention"`: contribution scores of Eq. 5, s ← decay · s + a, from every query;
    - `"window"`: the attention a paid by the prompt's probe, or by the newest `window` queries where there is none:
      their mean, max-pooled over `pool` neighbours; a slot keeps the best it ever got. Slots rank by
      (a + `floor`) · ‖v‖, ‖v‖ the norm of the slot's value, or by a alone where `floor` is None. `reserve` is the share
      of the context slots that these do not decide about, once a conversation goes on: it goes by (s + 0.02) · ‖v‖,
      where s sums up what the conversation's own queries paid, turn by turn (as H2O, arXiv 2306.14048); and the newest
      tokens have at least `latest` of the slots behind the sinks then: most of what is said next is about them. A turn
      that fits into these is held whole while it is read. While a text longer than `slots` is read with its question,
      `passages` is the share of the slots decided by the question that goes to the passages which all layers together
      look at. In a conversation the sinks are all of its system message and tools (`LLM`);
    - `"position"`: newest first (sliding window with sinks).

    `shares` are weights of the full-attention layers, first layer first, with mean 1: layer i holds about
    shares[i] · `slots` entries a head, all layers together as many as without them, and no layer fewer than its sinks,
    recent and residual slots and one more. Nothing is lost up to the slots of the smallest layer then.

    `slots=None` is the exact, growing cache of `CacheConfig.full()`.

    Raises:
        ConfigError: a value out of range, or parts that do not fit into `slots`.
    """

    slots: int | None = 1024
    sink: int = 4
    recent: int = 64
    residual: int = 0
    alpha: float = 0.6
    decay: float = 1.0
    stage: int = 128
    scoring: Scoring = "window"
    window: int = 32
    pool: int = 5
    floor: float | None = None
    reserve: float = 0.7
    passages: float = 0.7
    latest: float = 0.75
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, low in (("sink", 0), ("recent", 1), ("residual", 0), ("stage", 1), ("window", 1), ("pool", 1)):
            _integer(name, getattr(self, name), low)
        _number("alpha", self.alpha, 0.0, 1.0)  # Theorem 3.1 needs alpha <= 1
        _number("decay", self.decay, 0.0, 1.0)
        _number("reserve", self.reserve, 0.0, 1.0)
        _number("passages", self.passages, 0.0, 1.0)
        _number("latest", self.latest, 0.0, 1.0)
        if self.floor is not None:
            _number("floor", self.floor, 0.0, 1.0)
        if self.scoring not in ("attention", "window", "position"):
            raise ConfigError(f"scoring must be 'attention', 'window' or 'position', not {self.scoring!r}.")
        if self.pool % 2 == 0:
            raise ConfigError(f"pool must be odd (a slot and its neighbours on both sides), not {self.pool}.")
        if self.shares is not None:
            object.__setattr__(self, "shares", _mean_one(self.shares))
        if self.slots is None:
            if self.shares is not None:
                raise ConfigError("The exact cache has no budget to share out: set slots, or leave out shares.")
            return
        _integer("slots", self.slots, 1)
        if self.slots < self._least:
            raise ConfigError(
                f"slots={self.slots} is too small for sink={self.sink} + recent={self.recent} + "
                f"residual={self.residual} + one context slot: give at least {self._least} slots or smaller parts."
            )

    @property
    def anyway(self) -> int:
        """Slots of tokens that are kept for their place: sinks and recent ones."""
        return self.sink + self.recent

    @property
    def context(self) -> int:
        """B_c, the slots of tokens kept for their score. 0 for the exact cache."""
        return 0 if self.slots is None else self.slots - self.anyway - self.residual

    @property
    def asked(self) -> int:
        """Context slots that go by what was asked, rather than by what else may be (`reserve`)."""
        return self.context - round(self.reserve * self.context)

    @property
    def lately(self) -> int:
        """Slots that the newest tokens get of `latest`. 0 for the exact cache."""
        return 0 if self.slots is None else round(self.latest * (self.slots - self.sink))

    def keeping(self, newest: int) -> CacheConfig:
        """This rule where so many of the newest tokens stay, as far as they fit and a window decides."""
        if self.scoring != "window" or self.slots is None:
            return self
        recent = min(newest, self.slots - self._least + self.recent)
        return self if recent <= self.recent else self.replace(recent=recent)

    def pinning(self, guide: int) -> CacheConfig:
        """This rule where the first `guide` tokens stay, what a system message and tools say: as sinks.

        They come in multiples of 64, because only conversations with the same rule decode in one pass. Unchanged where
        they are more than half of the slots, or where no window decides.
        """
        if self.scoring != "window" or self.slots is None or not self.sink < guide <= self.slots // 2:
            return self
        sink = min(-(-guide // PINNED) * PINNED, self.slots // 2)
        recent = min(self.recent, self.slots - sink - self.residual - 1)
        return self.replace(sink=sink, recent=recent) if recent > 0 else self

    @property
    def _least(self) -> int:
        """Slots that any layer needs."""
        return self.anyway + self.residual + 1

    def layer_slots(self, layers: int) -> list[int]:
        """The slots of each of a model's full-attention layers. Not for the exact cache.

        Raises:
            ConfigError: `shares` for another number of layers.
        """
        assert self.slots is not None
        if self.shares is None:
            return [self.slots] * layers
        if len(self.shares) != layers:
            raise ConfigError(
                f"shares has {len(self.shares)} weights and the model {layers} layers of full attention: give one each."
            )
        return divide(self.slots * layers, self.shares, self._least)

    def ahead(self) -> CacheConfig:
        """The same budget for a text that is read before any question about it is known.

        Who asks is then a guess, and the size of what a slot holds tells as much: slots rank by (a + 0.02) · ‖v‖.
        """
        return self.replace(pool=1, floor=AHEAD_FLOOR, reserve=0.0, passages=0.0) if self.scoring == "window" else self

    @classmethod
    def full(cls) -> CacheConfig:
        """Exact and unbounded: what transformers' own cache does. For comparison."""
        return cls(slots=None)

    @classmethod
    def paper(cls, slots: int = 1024) -> CacheConfig:
        """The paper's settings: λ = 0.98, α = 0.6, eviction at every step, half of the budget recent.

        The paper gives no split of the budget; Figure 2 draws 3 : 4 : 2. A few sinks are kept, which it does not do.
        """
        _integer("slots", slots, 8)
        sink = min(4, slots // 8)
        return cls(
            slots=slots,
            sink=sink,
            recent=slots // 2 - sink,
            residual=max(1, slots // 32),
            decay=0.98,
            stage=1,
            scoring="attention",
        )

    @classmethod
    def h2o(cls, slots: int = 1024) -> CacheConfig:
        """Heavy hitters (arXiv 2306.14048): accumulated attention, half of the budget recent, no merging."""
        _integer("slots", slots, 8)
        return cls(slots=slots, sink=min(4, slots // 8), recent=slots // 2, scoring="attention", stage=1)

    @classmethod
    def streaming(cls, slots: int = 1024) -> CacheConfig:
        """Sinks and the newest tokens (StreamingLLM, arXiv 2309.17453)."""
        _integer("slots", slots, 2)
        sink = min(4, slots // 2)
        return cls(slots=slots, sink=sink, recent=max(1, slots - sink - 1), scoring="position")

    @classmethod
    def pyramid(cls, slots: int = 1024, *, layers: int) -> CacheConfig:
        """Slots that fall linearly from 1.9 to 0.1 times the mean over `layers` (PyramidKV, arXiv 2406.02069)."""
        _integer("layers", layers, 2)
        return cls(slots=slots, shares=tuple(1.9 - 1.8 * layer / (layers - 1) for layer in range(layers)))

    def replace(self, **changes: Any) -> CacheConfig:
        """A copy with some settings changed. Raises ConfigError on an unknown name or a bad value."""
        return _replace(self, changes)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> CacheConfig:
        """The inverse of `dataclasses.asdict`. Raises ConfigError on an unknown name or a bad value."""
        return _replace(cls(), settings)


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is drawn.

    `temperature=0` is greedy. `max_tokens=None` goes on until the model ends its answer. `stop` strings end the answer
    and are not part of it, also where they span several tokens. `seed` makes sampling repeatable. `ignore_eos` goes
    on past the model's end token (benchmarks). `lookup` lets a greedy answer that repeats the prompt be decoded several
    tokens at a time; the answer is the same.

    Raises:
        ConfigError: a value out of range.
    """

    max_tokens: int | None = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    lookup: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ConfigError("top_p must be above 0; temperature=0 gives the greedy answer.")
        _integer("top_k", self.top_k, 0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            _integer("seed", self.seed, 0)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop or ()))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError("stop must hold non-empty strings.")
        if self.max_tokens is None and self.ignore_eos and not self.stop:
            raise ConfigError("ignore_eos without max_tokens would never end: set max_tokens.")

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some settings changed. Raises ConfigError on an unknown name or a bad value."""
        return _replace(self, changes)


def divide(total: int, weights: Sequence[float], least: int) -> list[int]:
    """`total` in whole parts that go by `weights` as far as each part has `least`. Needs total >= least · parts."""
    raised: set[int] = set()
    while True:  # what too small a part lacks comes from the others, which may make another too small
        scale = (total - least * len(raised)) / sum(weight for at, weight in enumerate(weights) if at not in raised)
        small = {at for at, weight in enumerate(weights) if at not in raised and weight * scale < least - ROUNDING}
        if not small:
            break
        raised |= small
    exact = [least if at in raised else weight * scale for at, weight in enumerate(weights)]
    parts = [int(part + ROUNDING) for part in exact]
    most_cut = sorted(range(len(parts)), key=lambda at: parts[at] - exact[at])
    for at in most_cut[: total - sum(parts)]:
        parts[at] += 1
    return parts


def parse_bytes(size: int | str) -> int:
    """A number of bytes, or text such as "2GiB", "500 MB" or "1.5G".

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if found:
        base = 1024 if found[3] else 1000
        try:
            return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
        except ValueError:
            pass
    elif isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    raise ConfigError(f"A size is a number of bytes or text such as '2GiB', not {size!r}.")


def _mean_one(shares: Any) -> tuple[float, ...]:
    if not isinstance(shares, (list, tuple)) or not shares:
        raise ConfigError(f"shares must be one weight for each full-attention layer, not {shares!r}.")
    for share in shares:
        _number("Each of shares", share, 0.0, math.inf)
    mean = sum(shares) / len(shares)
    if abs(mean - 1) > 1e-3:
        raise ConfigError(f"shares must have mean 1, not {mean:g}: divide each of them by their mean.")
    return tuple(float(share) for share in shares)


def _replace(settings: Any, changes: dict[str, Any]) -> Any:
    known = {field.name for field in fields(settings)}
    if unknown := sorted(set(changes) - known):
        kind = type(settings).__name__
        raise ConfigError(f"{kind} has no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return replace(settings, **changes)
