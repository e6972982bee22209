"""What a user may set: the cache (`CacheConfig`) and one generation (`SamplingParams`). Imports nothing heavy."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from zsmerge_llm.errors import ConfigError, did_you_mean, shown
from zsmerge_llm.types import NamedSettings

QUERY_AGNOSTIC_FLOOR, QUERY_AGNOSTIC_WINDOW = 0.02, 8
"""`score_floor` and the most `observation_window` where no question is known yet (docs/research/eviction)."""
PREFIX_MULTIPLE = 64
"""A pinned system prompt is rounded up to a multiple of this many slots."""
ROUNDING = 1e-6  # tolerance for a fractional number of slots
OBSERVATION_WINDOW = "observation_window"
POLICIES = (OBSERVATION_WINDOW, "cumulative_attention", "recency")
"""Names of the built-in eviction policies; `kvcache.policies` has one file for each."""
MAX_SIZE = 2**31 - 1
"""Slots and other sizes of a cache: indices into it are 32-bit numbers."""
MAX_SEED = 2**64 - 1  # what torch's generators take


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Raise ConfigError unless a setting is a whole number of at least `low` and, if given, at most `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name} must be a whole number of at least {low}, not {shown(value)}.")
    if high is not None and value > high:
        raise ConfigError(f"{name} must be at most {high:,}, not {shown(value)}.")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raise ConfigError unless a setting is a finite number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -math.inf < value < math.inf:
        raise ConfigError(f"{name} must be a finite number, not {shown(value)}.")
    if not low <= value <= high:
        raise ConfigError(f"{name} must lie between {low:g} and {high:g}, not {shown(value)}.")


@dataclass(frozen=True)
class CacheConfig(NamedSettings):
    """Set the budget of the compressed KV cache and the policy that evicts from it.

    Every KV head of every full-attention layer holds `slots` entries: the first `sink` tokens, the `recent` newest
    tokens, `residual` slots into which evicted tokens are merged, and in the remaining *context* slots the tokens that
    the policy ranks highest (ZSMerge, arXiv 2503.10714: B_p = recent, B_r = residual, B_c = the context slots). Nothing
    is evicted up to `slots` tokens. `slots=None` is the exact, growing cache of `CacheConfig.full()`.

    Attributes:
        slots: entries per KV head and full-attention layer; None for the exact cache.
        sink: first tokens, never evicted. In a conversation the whole system prompt and the tools (`LLM`).
        recent: newest tokens, never evicted.
        residual: slots that hold means of evicted tokens (Eq. 6, 7). 0: evicted tokens are dropped.
        alpha: weight of a residual slot's multiplicity in its logits, α log w (Eq. 8). 0 to 1.
        decay: λ of Eq. 5; how much of a slot's score is left after each step, or each compression.
        stage: further entries that take new tokens between two compressions.
        policy: the eviction policy, by name or as an object (`kvcache.policies.EvictionPolicy`):
            "observation_window": slots rank by the attention of the prompt's question (the probe) or, without one, of
            the newest `observation_window` queries: the mean, max-pooled over `pool_kernel` slots. A slot keeps its
            best score. "cumulative_attention": contribution scores of Eq. 5, s ← decay · s + a, from every query (H2O,
            the paper). "recency": newest first (StreamingLLM).
        observation_window: number of newest queries that are kept for scoring.
        pool_kernel: width of the max-pooling of scores over neighbouring slots; odd.
        score_floor: slots rank by (attention + score_floor) · ‖value‖; None ranks by attention alone.
        history_share: in a chat that has been answered before, the share of the context slots that is ranked by the
            attention of all its turns so far (summed up, as in H2O) instead of the newest question's.
        history_min_queries: only a forward pass of more tokens than this adds to that sum.
        passage_share: while a text longer than `slots` is read together with its question, the share of the question's
            slots that goes to passages which all layers vote for.
        recent_share: in such a chat, the least share of the slots behind the sinks that the newest tokens get. A turn
            that fits into it is held whole while it is read.
        layer_budgets: a weight for each full-attention layer, first layer first, with mean 1. Layer i holds about
            layer_budgets[i] · `slots` entries per head; the total stays. None: all layers hold the same.

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
    policy: Any = OBSERVATION_WINDOW
    observation_window: int = 32
    pool_kernel: int = 5
    score_floor: float | None = None
    history_share: float = 0.7
    history_min_queries: int = 8
    passage_share: float = 0.7
    recent_share: float = 0.75
    layer_budgets: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        lows = {"sink": 0, "recent": 1, "residual": 0, "stage": 1, "observation_window": 1, "pool_kernel": 1}
        for name, low in {**lows, "history_min_queries": 0}.items():
            check_integer(name, getattr(self, name), low, MAX_SIZE)
        for name in ("alpha", "decay", "history_share", "passage_share", "recent_share"):  # Theorem 3.1: alpha <= 1
            check_number(name, getattr(self, name), 0.0, 1.0)
        if self.score_floor is not None:
            check_number("score_floor", self.score_floor, 0.0, 1.0)
        _check_policy(self.policy)
        if self.pool_kernel % 2 == 0:
            raise ConfigError(
                f"pool_kernel must be odd (a slot and its neighbours on both sides), not {self.pool_kernel}."
            )
        if self.layer_budgets is not None:
            object.__setattr__(self, "layer_budgets", _mean_one(self.layer_budgets))
        if self.slots is None:
            if self.layer_budgets is not None:
                raise ConfigError("The exact cache has no budget to share out: set slots, or leave out layer_budgets.")
            return
        check_integer("slots", self.slots, 1, MAX_SIZE)
        if self.slots < self._min_slots:
            raise ConfigError(
                f"slots={self.slots} is too small for sink={self.sink} + recent={self.recent} + "
                f"residual={self.residual} + one context slot: give at least {self._min_slots} slots or smaller parts."
            )

    # -- how the slots are divided -----------------------------------------------------------------------------------

    @property
    def policy_name(self) -> str:
        """The policy's name, also where it was given as an object."""
        return self.policy if isinstance(self.policy, str) else str(self.policy.name)

    @property
    def uses_question(self) -> bool:
        """Whether the default policy decides, which heeds the question of a prompt, and chats that go on."""
        return self.slots is not None and self.policy == OBSERVATION_WINDOW

    @property
    def num_recorded_queries(self) -> int:
        """Newest queries that each layer keeps: `observation_window` where the policy records them, else 0."""
        records = self.uses_question or getattr(self.policy, "records_queries", False)
        return self.observation_window if records and self.slots is not None else 0

    @property
    def num_protected(self) -> int:
        """Slots of tokens that are never evicted: sinks and recent ones."""
        return self.sink + self.recent

    @property
    def num_context(self) -> int:
        """B_c, the slots of tokens that are kept for their rank. 0 for the exact cache."""
        return 0 if self.slots is None else self.slots - self.num_protected - self.residual

    @property
    def num_question(self) -> int:
        """Context slots that are ranked by the newest question; the others by the chat's history."""
        return self.num_context - round(self.history_share * self.num_context)

    @property
    def num_recent(self) -> int:
        """Slots that `recent_share` gives to the newest tokens of a chat. 0 for the exact cache."""
        return 0 if self.slots is None else round(self.recent_share * (self.slots - self.sink))

    @property
    def _min_slots(self) -> int:
        """Slots that every layer needs."""
        return self.num_protected + self.residual + 1

    def layer_slots(self, num_layers: int) -> list[int]:
        """Return the slots of each full-attention layer of a model. Not for the exact cache.

        Raises:
            ConfigError: `layer_budgets` for another number of layers.
        """
        assert self.slots is not None
        if self.layer_budgets is None:
            return [self.slots] * num_layers
        if len(self.layer_budgets) != num_layers:
            raise ConfigError(
                f"layer_budgets has {len(self.layer_budgets)} weights and the model {num_layers} layers of full "
                "attention: give one each."
            )
        return apportion(self.slots * num_layers, self.layer_budgets, self._min_slots)

    # -- variants ----------------------------------------------------------------------------------------------------

    def with_recent(self, newest: int) -> CacheConfig:
        """Protect so many newest tokens, as far as they fit. Only for the default policy."""
        if not self.uses_question:
            return self
        assert self.slots is not None
        recent = min(newest, self.slots - self._min_slots + self.recent)
        return self if recent <= self.recent else self.replace(recent=recent)

    def with_pinned_prefix(self, num_tokens: int) -> CacheConfig:
        """Protect the first tokens as sinks: a system prompt and its tools. Only for the default policy.

        Sinks come in multiples of 64, because only conversations of one configuration decode in one pass. Unchanged
        where the prefix is more than half of the slots.
        """
        if not self.uses_question:
            return self
        assert self.slots is not None
        if not self.sink < num_tokens <= self.slots // 2:
            return self
        sink = min(-(-num_tokens // PREFIX_MULTIPLE) * PREFIX_MULTIPLE, self.slots // 2)
        recent = min(self.recent, self.slots - sink - self.residual - 1)
        return self.replace(sink=sink, recent=recent) if recent > 0 else self

    def query_agnostic(self) -> CacheConfig:
        """Rank a text that is read before any question is known. Only for the default policy.

        The probe is then a guess, and the norm of a slot's value tells as much: slots rank by (a + 0.02) · ‖v‖. At
        most 8 queries are recorded: they score nothing while the text is read, and each takes as much as several slots.
        """
        if not self.uses_question:
            return self
        window = min(self.observation_window, QUERY_AGNOSTIC_WINDOW)
        rule = {"pool_kernel": 1, "score_floor": QUERY_AGNOSTIC_FLOOR, "history_share": 0.0, "passage_share": 0.0}
        return self.replace(observation_window=window, **rule)

    # -- presets -----------------------------------------------------------------------------------------------------

    @classmethod
    def full(cls) -> CacheConfig:
        """Exact and unbounded: what transformers' own cache does. For comparison."""
        return cls(slots=None)

    @classmethod
    def paper(cls, slots: int = 1024) -> CacheConfig:
        """The paper's settings: λ = 0.98, α = 0.6, eviction at every step, half of the budget recent.

        The paper gives no split of the budget; Figure 2 draws 3 : 4 : 2. A few sinks are kept, which it does not do.
        """
        check_integer("slots", slots, 8)
        sink = min(4, slots // 8)
        return cls(
            slots=slots,
            sink=sink,
            recent=slots // 2 - sink,
            residual=max(1, slots // 32),
            decay=0.98,
            stage=1,
            policy="cumulative_attention",
        )

    @classmethod
    def h2o(cls, slots: int = 1024) -> CacheConfig:
        """Heavy hitters (arXiv 2306.14048): cumulative attention, half of the budget recent, no merging."""
        check_integer("slots", slots, 8)
        return cls(slots=slots, sink=min(4, slots // 8), recent=slots // 2, policy="cumulative_attention", stage=1)

    @classmethod
    def streaming(cls, slots: int = 1024) -> CacheConfig:
        """Sinks and the newest tokens (StreamingLLM, arXiv 2309.17453)."""
        check_integer("slots", slots, 2)
        sink = min(4, slots // 2)
        return cls(slots=slots, sink=sink, recent=max(1, slots - sink - 1), policy="recency")

    @classmethod
    def pyramid(cls, slots: int = 1024, *, layers: int) -> CacheConfig:
        """Slots that fall linearly from 1.9 to 0.1 times the mean over `layers` (PyramidKV, arXiv 2406.02069)."""
        check_integer("layers", layers, 2)
        return cls(slots=slots, layer_budgets=tuple(1.9 - 1.8 * layer / (layers - 1) for layer in range(layers)))

    # -- copies and dicts --------------------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> CacheConfig:
        """Return a copy with some settings changed. Raises ConfigError: an unknown name or a bad value."""
        return _replace(self, changes)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; a policy that was given as an object becomes its name."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**settings, "policy": self.policy_name}

    @classmethod
    def from_dict(cls, settings: dict[str, Any], policy: Any = None) -> CacheConfig:
        """Invert `to_dict`. `policy`: the object whose name the settings may hold.

        Raises:
            ConfigError: an unknown name or a bad value.
        """
        if not isinstance(settings, dict):
            raise ConfigError(f"The settings of a cache are a dict, not a {type(settings).__name__}.")
        if policy is not None and not isinstance(policy, str) and settings.get("policy") == policy.name:
            settings = {**settings, "policy": policy}
        return _replace(cls(), settings)


@dataclass(frozen=True)
class SamplingParams(NamedSettings):
    """How one answer is drawn.

    `temperature=0` is greedy. `max_tokens=None` goes on until the model ends its answer. `stop` strings end the answer
    and are not part of it, also where they span several tokens. `seed` makes sampling repeatable. `ignore_eos` goes
    on past the model's end token (benchmarks). `lookup` lets a greedy answer that repeats the prompt be decoded several
    tokens at a time; the answer is the same. `logprobs`: report the log-probability of each token, and of so many of
    the likeliest ones in its place (at most 20).

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
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, limits in (("max_tokens", (1,)), ("seed", (0, MAX_SEED)), ("logprobs", (0, 20))):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), *limits)
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ConfigError("top_p must be above 0; temperature=0 gives the greedy answer.")
        check_integer("top_k", self.top_k, 0)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, (list, tuple, set, frozenset)):
            raise ConfigError(f"stop must be text or a list of texts, not a {type(stop).__name__}.")
        object.__setattr__(self, "stop", tuple(stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError("stop must hold non-empty strings.")
        if self.max_tokens is None and self.ignore_eos and not self.stop:
            raise ConfigError("ignore_eos without max_tokens would never end: set max_tokens.")

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some settings changed. Raises ConfigError on an unknown name or a bad value."""
        return _replace(self, changes)


def apportion(total: int, weights: Sequence[float], least: int) -> list[int]:
    """Divide `total` into whole parts by `weights`, each at least `least`. Needs total >= least · parts."""
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
    """A number of bytes, or text such as "2GiB", "500 MB" or "1.5G". Raises ConfigError: anything else."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", size, re.IGNORECASE) if isinstance(size, str) else None
    if found:
        base = 1024 if found[3] else 1000
        try:
            return int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
        except (ValueError, OverflowError):
            pass
    elif isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    raise ConfigError(f"A size is a number of bytes or text such as '2GiB', not {shown(size)}.")


def _check_policy(policy: Any) -> None:
    """Refuse what is neither a built-in name nor an object with `name`, `observe` and `rank`."""
    if isinstance(policy, str):
        if policy not in POLICIES:
            known = ", ".join(repr(name) for name in POLICIES)
            raise ConfigError(f"policy must be one of {known} or an EvictionPolicy, not {shown(policy)}.")
    elif not all(hasattr(policy, part) for part in ("name", "observe", "rank")):
        raise ConfigError(
            f"policy must be a name or an EvictionPolicy with name, observe and rank, not a {type(policy).__name__}."
        )


def _mean_one(weights: Any) -> tuple[float, ...]:
    if not isinstance(weights, (list, tuple)) or not weights:
        raise ConfigError(f"layer_budgets must be one weight for each full-attention layer, not {shown(weights)}.")
    for weight in weights:
        check_number("Each of layer_budgets", weight, 0.0, MAX_SIZE)
    mean = sum(weights) / len(weights)
    if abs(mean - 1) > 1e-3:
        raise ConfigError(f"layer_budgets must have mean 1, not {mean:g}: divide each of them by their mean.")
    return tuple(float(weight) for weight in weights)


def _replace(settings: Any, changes: dict[str, Any]) -> Any:
    known = {field.name for field in fields(settings)}
    if unknown := sorted(shown(name).strip("'") for name in changes.keys() - known):
        what = f"{type(settings).__name__} has no setting {', '.join(unknown)}"
        raise ConfigError(f"{what}; it has {', '.join(sorted(known))}.{did_you_mean(unknown, known)}")
    return replace(settings, **changes)
