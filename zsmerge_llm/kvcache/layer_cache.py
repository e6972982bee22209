"""One layer of the compressed cache: static tensors that hold a fixed number of slots per KV head.

P = slots + stage entries per row and KV head, laid out `[residual | verbatim tokens | stage]`:
verbatim tokens stand in order of position; new tokens are written behind the last used slot of each row (`fills`), and
when a row has used up the P entries it compresses back to `slots`. A slot with count 0 is empty. A chunk that does not
fit is attended beside the held slots and compressed in the same pass, so that nothing larger than slots + stage + chunk
ever exists, and only for one layer at a time. What happens to a row depends on nothing but that row.

Everything mutates in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from zsmerge_llm.config import QUERY_AGNOSTIC_FLOOR, CacheConfig
from zsmerge_llm.cpu import native as kernels
from zsmerge_llm.kvcache import policy
from zsmerge_llm.kvcache.rope import Rotation
from zsmerge_llm.kvcache.view import PER_SLOT, AttentionInputs, KVView, LayerSpec, Slots

TENSORS = (*PER_SLOT, "residual_keys", "residual_values", "dropped", "goes_on", "summed", "queries", "query_position")


def layer_configs(config: CacheConfig, specs: Sequence[LayerSpec]) -> list[CacheConfig]:
    """What each layer keeps: a sliding-window layer exactly its window, whatever the budget, any other its share.

    Raises:
        ConfigError: `config.layer_budgets` for another number of full-attention layers.
    """
    if config.slots is None:
        return [config] * len(specs)
    plain = config if config.layer_budgets is None else config.replace(layer_budgets=None)
    slots = config.layer_slots(sum(spec.window is None for spec in specs))
    own = {each: plain if each == plain.slots else plain.replace(slots=each) for each in set(slots)}
    wide = {window: _sliding(plain, window) for window in {spec.window for spec in specs} if window is not None}
    full = iter(slots)
    return [own[next(full)] if spec.window is None else wide[spec.window] for spec in specs]


def _sliding(config: CacheConfig, window: int) -> CacheConfig:
    stage = max(config.stage, 32)  # compressing a window at each step gains nothing
    return config.replace(slots=window + 1, sink=0, recent=window, residual=0, stage=stage, policy="recency")


class LayerCache(Slots):
    """The slots of one layer, by its own config (`layer_configs`).

    See the module's text for the layout and `AttentionInputs` for the shapes.
    """

    def __init__(self, config: CacheConfig, spec: LayerSpec, rows: int) -> None:
        self.config = config
        self.spec = spec
        self.fills = [self.config.residual] * rows
        budget = self.config.slots
        capacity = self.config.stage if budget is None else budget + self.config.stage
        heads, device = spec.kv_heads, spec.device
        asked = (
            self.config.observation_window if self.config.policy == "observation_window" and budget is not None else 0
        )

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=device)

        self.keys = zeros(heads, capacity, spec.key_dim, dtype=spec.dtype)
        self.values = zeros(heads, capacity, spec.value_dim, dtype=spec.dtype)
        self.count = zeros(heads, capacity)
        self.score = zeros(heads, capacity)
        self.accumulated = zeros(heads, capacity)  # what a conversation's own queries paid in all
        self.position = zeros(heads, capacity, dtype=torch.int32)
        # The means in float32: rounded to bfloat16 at each merge, they would stop moving after some 200 tokens.
        self.residual_keys = zeros(heads, self.config.residual, spec.key_dim)
        self.residual_values = zeros(heads, self.config.residual, spec.value_dim)
        self.dropped = zeros(heads)
        self.goes_on = zeros(dtype=torch.bool)  # whether the conversation does, so that the reserve counts
        self.summed = zeros(dtype=torch.int32) - 1  # the newest position whose query is in `accumulated`
        self.queries = zeros(spec.query_heads, asked, spec.key_dim, dtype=spec.dtype)
        self.query_position = zeros(asked, dtype=torch.int32) - 1

    @property
    def capacity(self) -> int:
        """P, the entries there is room for."""
        return self.keys.shape[2]

    @property
    def level(self) -> bool:
        """Whether all rows have used the same number of slots."""
        return self.fills.count(self.fills[0]) == len(self.fills)

    @property
    def needs_compression(self) -> list[bool]:
        """Which rows have tokens in their stage."""
        return [self.config.slots is not None and fill > self.config.slots for fill in self.fills]

    def compress_stage(self, seen: Tensor) -> None:
        """Compress now, by the newest queries, what would be compressed while the next tokens are waited for.

        seen: [B], tokens read by each row.
        """
        slots, used, full = self.config.slots, max(self.fills), self.needs_compression
        if slots is None or not any(full):
            return
        held = KVView(self, used, self.fills, in_place=True)
        if self.config.policy == "observation_window":
            due = torch.tensor(full, device=self.spec.device)
            self.goes_on |= due
            self._accumulate(held, due)
            self._look(held, full, None)
        self.fills = [slots if due else fill for due, fill in zip(full, self.fills, strict=True)]
        self._compress(held, full, seen.to(self.spec.device))

    def holds(self, new: int) -> bool:
        """Whether there is room for `new` tokens behind those of every row."""
        return max(self.fills) + new <= self.capacity

    def fits(self, new: int) -> bool:
        """Whether every row can take `new` tokens without compressing."""
        return self.config.slots is None or max(self.fills) + new < self.capacity

    @property
    def remembers(self) -> bool:
        """Whether the newest queries are kept."""
        return self.config.slots is not None and self.config.policy == "observation_window"

    def only_counts(self, new: int) -> bool:
        """Whether `settle` does nothing for `new` tokens but count them and remember their queries."""
        scored = self.config.slots is not None and self.config.policy == "cumulative_attention"
        return self.fits(new) and not scored and (not self.remembers or new <= self.config.observation_window)

    def move(self, row: int, by: Callable[[Tensor], Tensor], rotation: Rotation) -> None:
        """Turn the keys of one row, and the queries it remembers, to other places.

        A residual slot is turned by its first token's position: nearly right for the others that it merged.

        by: int [...], positions → float [...], by how many places each moves.
        """
        step = by(self.position[row])
        self.keys[row] = rotation.turn(self.keys[row], step)
        if size := self.config.residual:
            self.residual_keys[row] = rotation.turn(self.residual_keys[row], step[:, :size])
            self.keys[row, :, :size] = self.residual_keys[row].to(self.keys.dtype)
        if self.queries.shape[2]:
            self.queries[row] = rotation.turn(self.queries[row], by(self.query_position[row])[None])

    def append(self, arrival: AttentionInputs) -> KVView:
        """Take in the arriving tokens; what to attend to."""
        new, used = arrival.keys.shape[2], max(self.fills)
        if self.config.slots is None:
            self._grow(used + new)
        entries = self._entries(arrival)
        if not self.holds(new):
            return KVView(Slots(**self._beside(entries, used)), used + new, self.fills, in_place=False)
        for name, entry in entries.items():
            self._write(getattr(self, name), entry)
        return KVView(self, used + new, self.fills, in_place=True)

    def attend(self, arrival: AttentionInputs, scaling: float) -> tuple[KVView, Tensor]:
        """`append`, and what the arriving tokens make of it all, [B, Hq, n, D]: in one kernel."""
        new = arrival.keys.shape[2]
        output = kernels.decode_attention(
            (arrival.queries, arrival.keys, arrival.values),
            [getattr(self, name) for name in PER_SLOT],
            arrival.position,
            self.fills,
            scaling=scaling,
            alpha=self.config.alpha,
            softcap=self.spec.softcap,
            window=self.spec.window,
            sinks=arrival.sinks,
        )
        return KVView(self, max(self.fills) + new, self.fills, in_place=True), output

    def settle(self, held: KVView, arrival: AttentionInputs) -> None:
        """After attention: update the scores, and compress the rows that have used up their room."""
        self._observe(held, arrival)
        self.close(held, arrival)

    def close(self, held: KVView, arrival: AttentionInputs, passages: Tensor | None = None) -> None:
        """`settle`, once the scores are up to date. passages: float32 [T], what all layers make of the surroundings of
        each token read."""
        used, full = self._used(arrival), self.fills_up(arrival)
        self.fills = [self.config.slots or 0 if due else end for due, end in zip(full, used, strict=True)]
        if any(full) or not held.in_place:
            self._compress(held, full, arrival.seen, passages, arrival.pinned_recent)

    def fills_up(self, arrival: AttentionInputs) -> list[bool]:
        """Which rows have to compress when these tokens come in."""
        return [self.config.slots is not None and end >= self.capacity for end in self._used(arrival)]

    def _used(self, arrival: AttentionInputs) -> list[int]:
        return [fill + count for fill, count in zip(self.fills, arrival.counts, strict=True)]

    def vote(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        """Update the scores; the most that any of the probe's queries pays each slot: float32 [B, H, C].

        Sinks get none, which are paid whatever is asked, nor do recent tokens: the question may be among them.
        """
        self._take_note(held, arrival)
        most = self._look(held, self.fills_up(arrival), arrival)
        newest = arrival.seen[:, None, None] - self.config.recent
        counts = (held.position >= self.config.sink) & (held.position < newest) & (held.count > 0)
        return most * counts

    def paid_most(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        """The most that any query of the probe pays each slot, float32 [B, H, C]."""
        assert arrival.probe is not None
        assert arrival.probe_position is not None
        return self._paid_by(arrival.probe, arrival.probe_position, held, arrival.sinks, arrival.many)[1]

    def settle_first(self, count: int, held: KVView, arrival: AttentionInputs) -> None:
        """`settle` for the first `count` tokens of one row, as if the others had never come. They must all fit."""
        new, used = arrival.keys.shape[2], self.fills[0]
        self.count[:, :, used + count : used + new] = 0
        self.settle(replace(held, end=used + count), arrival.first(count))

    def _observe(self, held: KVView, arrival: AttentionInputs) -> None:
        if self.config.slots is None:
            return
        if self.config.policy == "cumulative_attention":
            self._contribute(held, arrival)
        elif self.config.policy == "observation_window":
            self._take_note(held, arrival)
            if any(full := self.fills_up(arrival)):
                self._look(held, full, arrival)

    def _beside(self, entries: dict[str, Tensor], used: int) -> dict[str, Tensor]:
        """Copies of the first `used` slots with the arriving tokens behind those of each row.

        No empty slots between: pooling over neighbours would see them, and a row in a batch differ from one alone.
        """
        held = {name: getattr(self, name)[:, :, :used] for name in PER_SLOT}
        if self.level:
            return {name: torch.cat([held[name], entries[name]], dim=2) for name in PER_SLOT}
        both = {name: torch.cat([held[name], torch.zeros_like(entries[name])], dim=2) for name in PER_SLOT}
        for name, entry in entries.items():
            self._write(both[name], entry)
        return both

    def _write(self, slots: Tensor, entry: Tensor) -> None:
        """Put entry [B, H, n, ...] into slots [B, H, P, ...], for each row from its own fill on."""
        new, start = entry.shape[2], self.fills[0]
        if self.level:
            slots[:, :, start : start + new] = entry
            return
        row = torch.arange(len(self.fills), device=slots.device)[:, None]
        place = torch.tensor(self.fills, device=slots.device)[:, None] + torch.arange(new, device=slots.device)
        slots[row, :, place] = entry.transpose(1, 2)

    def _entries(self, arrival: AttentionInputs) -> dict[str, Tensor]:
        """The arriving tokens as slots: count 1 (0 for padding), score 0."""
        shape = arrival.keys.shape[:3]
        count, position = (each[:, None].expand(shape) for each in (arrival.present, arrival.position))
        nothing = self.score.new_zeros(()).expand(shape)
        return dict(zip(PER_SLOT, (arrival.keys, arrival.values, count, nothing, nothing, position), strict=True))

    def _grow(self, needed: int) -> None:
        """The exact cache only: double the room until `needed` entries fit."""
        if needed <= self.capacity:
            return
        extra = max(needed, 2 * self.capacity) - self.capacity
        for name in PER_SLOT:
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(*old.shape[:2], extra, *old.shape[3:])], dim=2))

    def _contribute(self, held: KVView, arrival: AttentionInputs) -> None:
        """Eq. 5 from every arriving token's attention."""
        # A constant taken from all keys changes no softmax, and keeps half-precision logits small and exact.
        present = held.count[..., None] > 0
        centre = (held.keys.float() * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)
        plain = arrival.sinks is None and self.spec.softcap is None
        keys = (held.keys.float() - centre).to(held.keys.dtype) if plain else held.keys
        bias = policy.slot_bias(held.count, self.config.alpha)[:, :, None, None, :]
        base = torch.tensor(held.base, device=keys.device)
        causal = policy.causal_bias(base, base, arrival.keys.shape[2], keys.shape[2], bias.dtype)[:, None, None]
        paid = self._paid(arrival.queries, keys, bias + causal, arrival.sinks)
        held.score.copy_(policy.contribution(held.score, paid, arrival.valid, self.config.decay))

    def _take_note(self, held: KVView, arrival: AttentionInputs) -> None:
        """Of the newest queries, of what they pay unless they are few, and of whether the conversation goes on."""
        self._remember(arrival)
        if arrival.multi_turn:
            self.goes_on.fill_(True)
        if arrival.queries.shape[2] > kernels.MAX_ROWS:
            self._accumulate(held, torch.ones_like(self.goes_on), arrival.many)

    def _accumulate(self, held: KVView, rows: Tensor, many: bool = False) -> None:
        """Add what those of the newest queries pay that have not been heard yet, in some rows, bool [B].

        H2O does so with all queries: of every pass that is read these are enough (benchmarks/LOG.md).
        """
        if not self.config.history_share:
            return
        unheard = (self.query_position > self.summed[:, None]) & rows[:, None]
        paid, _ = self._paid_by(self.queries, self.query_position.masked_fill(~unheard, -1), held, None, many)
        held.accumulated.add_(paid * rows[:, None, None])
        self.summed.copy_(torch.where(rows, self.query_position.amax(1), self.summed))

    def _remember(self, arrival: AttentionInputs) -> None:
        """Keep the newest queries: they decide at the next compression, unless a probe does."""
        room = self.config.observation_window
        if arrival.few and arrival.queries.shape[2] <= room:
            kernels.push_queries(self.queries, self.query_position, arrival.queries, arrival.asking)
            return
        queries = torch.cat([self.queries, arrival.queries], dim=2)
        asking = torch.cat([self.query_position, arrival.asking], dim=1)
        if arrival.padded:  # padding must not push a row's own queries out
            asking, order = asking.sort(dim=1, stable=True)
            queries = policy.take(queries, order[:, None].expand(-1, queries.shape[1], -1))
        self.queries.copy_(queries[:, :, -room:])
        self.query_position.copy_(asking[:, -room:])

    def _look(self, held: KVView, full: list[bool], arrival: AttentionInputs | None) -> Tensor:
        """Weigh the slots of full rows by the probe, or by the newest queries where nothing is asked.

        Returns the most that any of these queries pays each slot, float32 [B, H, C].
        """
        queries, asking, sinks = self.queries, self.query_position, None
        if arrival is not None and arrival.probe is not None and arrival.probe_position is not None:
            queries, asking, sinks = arrival.probe, arrival.probe_position, arrival.sinks
        mean, most = self._paid_by(queries, asking, held, sinks, arrival is not None and arrival.many)
        now = policy.pooled(mean, self.config.pool_kernel)
        due = torch.tensor(full, device=now.device)[:, None, None]
        held.score.copy_(torch.where(due, torch.maximum(held.score * self.config.decay, now), held.score))
        return most

    def _paid_by(
        self, queries: Tensor, asking: Tensor, held: KVView, sinks: Tensor | None, many: bool
    ) -> tuple[Tensor, Tensor]:
        """What some queries pay each slot: the mean over them and a KV head's group, and the most, float32 [B, H, C].

        queries: [B, Hq, m, D]; asking: [B, m], their positions, -1 for none. many: whether the kernels serve.
        """
        bias = policy.slot_bias(held.count, self.config.alpha)
        if many:
            return kernels.attention_mass(
                queries, held.keys, bias, asking, held.position, self.scaling, self.spec.softcap, sinks
            )
        seen = held.position[:, :, None, :] <= asking[:, None, :, None]  # [B, H, m, C]
        hiding = bias[:, :, None, :].masked_fill(~seen, policy.NEVER)[:, :, None]
        paid = self._paid(queries.float(), held.keys.float(), hiding, sinks)
        return policy.mean_paid(paid, asking >= 0), paid.amax((2, 3))

    def _compress(
        self, held: KVView, full: list[bool], seen: Tensor, passages: Tensor | None = None, pinned_recent: int = 0
    ) -> None:
        """Alg. 1: of each full row keep what ranks highest, and merge or drop the rest. Other rows keep everything.

        Where the arriving tokens stand beside the slots, this also moves them in, for all rows.
        """
        config, residual = self.config, self.config.residual
        assert config.slots is not None  # the exact cache never compresses
        rows = [row for row, due in enumerate(full) if due or not held.in_place]
        index = torch.tensor(rows, device=seen.device)
        everyone = len(rows) == len(full)
        main = {name: getattr(held, name)[:, :, residual:] for name in PER_SLOT}
        if not everyone:
            main = {name: tensor[index] for name, tensor in main.items()}
        due = torch.tensor([full[row] for row in rows], device=seen.device)[:, None, None]
        ranking = self._ranking(main, seen[index], self.goes_on[index], passages, pinned_recent)
        lost = policy.lowest(ranking, config.slots - residual)
        gone = policy.take(main["count"], lost) * due
        merged = {name: policy.take(main[name], lost) for name in ("keys", "values", "position") if residual}
        stays = torch.ones_like(main["count"]).scatter(2, lost, (~due).float().expand(lost.shape)) * main["count"]
        order = policy.compact(stays > 0)[..., : self.capacity - residual]
        survivors = {name: policy.take(tensor, order) for name, tensor in {**main, "count": stays}.items()}
        place = slice(None) if everyone else index
        for name, tensor in survivors.items():
            getattr(self, name)[place, :, residual : residual + tensor.shape[2]] = tensor
        if residual:
            self._absorb(place, {**merged, "count": gone})
            self.score[:, :, :residual] = held.score[:, :, :residual]
            self.accumulated[:, :, :residual] = held.accumulated[:, :, :residual]
        else:
            self.dropped[place] += gone.sum(-1)

    def _ranking(
        self, slots: dict[str, Tensor], seen: Tensor, goes_on: Tensor, passages: Tensor | None, pinned_recent: int
    ) -> Tensor:
        """float32 [B, H, C]: who stays, the highest first. seen: [B], tokens read by each row; goes_on: bool [B]."""
        alone = self.config.with_recent(min(pinned_recent, self.config.num_recent))

        def ranked(config: CacheConfig, worth: Tensor) -> Tensor:
            return policy.priority(worth, slots["count"], slots["position"], seen, config.sink, config.recent)

        def by_questions(config: CacheConfig, context: int) -> Tensor:
            ranking = ranked(config, self._worth(slots))
            if passages is None:
                return ranking
            places = ranked(config, passages.to(ranking.device)[slots["position"].clamp(min=0)])
            return policy.multi_turn(places, ranking, config.num_protected + round(config.passage_share * context))

        if alone.policy != "observation_window" or not alone.history_share:
            return by_questions(alone, alone.num_context)
        going = self.config.with_recent(self.config.num_recent)
        others = ranked(going, policy.worth(slots["accumulated"], slots["values"], QUERY_AGNOSTIC_FLOOR))
        both = policy.multi_turn(
            by_questions(going, going.num_question), others, going.num_protected + going.num_question
        )
        # Until a conversation goes on, a question decides alone.
        return torch.where(goes_on[:, None, None], both, by_questions(alone, alone.num_context))

    def _worth(self, slots: dict[str, Tensor]) -> Tensor:
        """float32 [B, H, C]: by what the slots are ranked, but for the reserve."""
        if self.config.policy == "recency":
            return slots["position"].float()
        if self.config.policy == "observation_window" and self.config.score_floor is not None:
            return policy.worth(slots["score"], slots["values"], self.config.score_floor)
        return slots["score"]

    def _absorb(self, rows: slice | Tensor, evicted: dict[str, Tensor]) -> None:
        """Merge evicted tokens into the residual slots of some rows."""
        size = self.config.residual
        before = self.count[rows, :, :size]
        old = (self.residual_keys[rows], self.residual_values[rows], before)
        lost = (evicted["keys"].float(), evicted["values"].float(), evicted["count"])
        (keys, values, count), chosen = policy.merge(old, lost)
        # A residual slot goes by its first token's position.
        position = evicted["position"].masked_fill(evicted["count"] == 0, torch.iinfo(torch.int32).max)
        first = self.position[rows, :, :size].scatter_reduce(2, chosen, position, "amin", include_self=False)
        self.position[rows, :, :size] = torch.where(before == 0, first, self.position[rows, :, :size])
        self.residual_keys[rows] = keys
        self.residual_values[rows] = values
        self.keys[rows, :, :size] = keys.to(self.keys.dtype)
        self.values[rows, :, :size] = values.to(self.values.dtype)
        self.count[rows, :, :size] = count

    def _paid(self, queries: Tensor, keys: Tensor, bias: Tensor, sinks: Tensor | None) -> Tensor:
        """Weights [B, H, G, m, C] that queries [B, Hq, m, D] pay to keys [B, H, C, D]."""
        batch, heads, count, dim = queries.shape
        grouped = queries.view(batch, keys.shape[1], heads // keys.shape[1], count, dim)
        return policy.weights(grouped, keys, bias, self.scaling, self.spec.softcap, sinks)

    @property
    def scaling(self) -> float:
        """By what queries times keys are multiplied."""
        return self.spec.key_dim**-0.5 if self.spec.scaling is None else self.spec.scaling

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in TENSORS)
