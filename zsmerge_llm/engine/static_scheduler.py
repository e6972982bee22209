"""Batch the decode steps of several threads in fixed memory: what `scheduler` does, for a device that repeats graphs.

Conversations are copied into rows of a static batch when they first decode, and back when they leave. A conversation
alone launches each step before its last token is yielded; several wait for each other, as in `scheduler`, and share a
step. All work is done in the device thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.decode_loop import sample_rows
from zsmerge_llm.engine.device_thread import DeviceThread, Job, Kind
from zsmerge_llm.engine.memory_errors import decoding_remedy, name_memory_errors
from zsmerge_llm.engine.sequence import DecodeSequence
from zsmerge_llm.engine.shared_step import run_shared_step
from zsmerge_llm.engine.static_decoder import StaticDecoder
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.policies import policy_of

MAX_BATCHES = 2
"""Static batches that are kept, each of one cache configuration: that of a third replaces the oldest."""

MakeDecoder = Callable[[CacheConfig, int, int], StaticDecoder]
"""(cache configuration, rows, entries of each layer of the exact cache): allocates a static batch."""


def is_capturable(cache: Cache) -> bool:
    """Return whether the policies of a cache's layers are tensor functions, which can decode in fixed memory."""
    return cache.config.slots is None or all(policy_of(layer.config).capturable for layer in cache.layers)


class StaticRows:
    """The rows of one cache while they decode in a static batch: a `Decoder`.

    caches: the conversations, one row each. rows: where they are, empty while they are in no batch. ids: what they
    read next. num_given: how many of the first row's are no draft. counted: whether they count as soon as they have
    run. done: whether they have run. alone: whether it shares no step, because one failed.
    """

    def __init__(
        self, cache: Cache, sequences: Sequence[DecodeSequence], scheduler: StaticScheduler, priority: int
    ) -> None:
        self.caches = [cache] if cache.rows == 1 else [cache.row(row) for row in range(cache.rows)]
        self.sequences = sequences
        self.priority = priority
        self.config = cache.config
        self.rows: list[int] = []
        self.ids: list[list[int]] = []
        self.num_given = 0
        self.counted = False
        self.done = True
        self.alone = False
        self.pending_logits: Tensor | None = None
        self._scheduler = scheduler

    def sample(self) -> list[int]:
        """Return what the model says next in each row."""
        (sampled,) = self._scheduler.device.call(partial(self._scheduler.sample, [self]), priority=self.priority)
        return sampled

    @property
    def drafting(self) -> StaticRows | None:
        """A single row verifies drafts itself."""
        return self if len(self.caches) == 1 else None

    def max_draft(self, num_pending: int) -> int:
        """Return how many tokens of a draft may follow so many tokens: as many as a step takes, or none."""
        room = self._scheduler.max_tokens - num_pending
        return room if room > 0 and self._scheduler.is_alone(self) and self._scheduler.fits(self) else 0

    def launch(self, ids: Sequence[Sequence[int]], draft: Sequence[int] = ()) -> None:
        """Run a step ahead of the caller where no other conversation decodes; else `finish` runs it with theirs."""
        self.ids, self.done, self.counted = [list(part) for part in ids], False, False
        self.num_given = len(self.ids[0])
        self.ids[0] += draft
        longest = max(map(len, self.ids))
        in_one_step = longest == 1 or (longest <= self._scheduler.max_tokens and self._scheduler.fits(self))
        if draft or (in_one_step and self._scheduler.is_alone(self)):
            self._scheduler.launch(self)

    def finish(self) -> list[int]:
        """Read the tokens; return what the model says next in each row."""
        if self.done:
            return self._scheduler.count_all(self)
        self.counted = True
        return self._scheduler.step(self)

    def sample_draft(self, num_pending: int) -> list[int]:
        """Return what the model says in place of each of the draft's tokens, behind so many others.

        Nothing where the draft had no room.
        """
        return self._scheduler.device.call(partial(self._sample_draft, num_pending), priority=self.priority)

    def keep(self, count: int) -> None:
        """Read the first `count` tokens."""
        self._scheduler.count(self, [count])

    def drop_draft(self) -> None:
        """Forget a draft: a row that it was to be verified in has no room, or is not the only one any more."""
        if not self.counted:
            del self.ids[0][self.num_given :]

    def _sample_draft(self, num_pending: int) -> list[int]:
        if len(self.ids[0]) == num_pending:
            return []
        assert self.pending_logits is not None
        logits = self.pending_logits[num_pending - 1 : -1]
        return sample_rows(logits, list(self.sequences) * len(logits))


class StaticScheduler:
    """Runs the decode steps of an engine's requests in static batches.

    Args:
        make_decoder: allocates the batch of a cache configuration.
        device: the thread in which passes are made.
        sizes: how many rows a batch may have, ascending. max_tokens: the most tokens of a step of one row.
    """

    def __init__(self, make_decoder: MakeDecoder, device: DeviceThread, sizes: Sequence[int], max_tokens: int) -> None:
        self.device = device
        self.sizes, self.max_tokens = sizes, max_tokens
        self._make_decoder = make_decoder
        self._decoders: dict[CacheConfig, StaticDecoder] = {}  # the one used last is the last
        self._seated: list[StaticRows] = []  # that are in rows of a batch
        self._decoding: list[StaticRows] = []  # all that have joined
        self._last: list[StaticRows] = []  # that took part in the last step

    @contextmanager
    def join(self, cache: Cache, sequences: Sequence[DecodeSequence], priority: int) -> Iterator[StaticRows]:
        """Decode a cache; when it ends, `cache` is up to date."""
        group = StaticRows(cache, sequences, self, priority)
        self._decoding.append(group)
        try:
            yield group
        finally:
            self._decoding.remove(group)
            if not self.device.is_current:  # else a generator is being collected within a step: the next one cleans up
                self.device.call(partial(self._leave, [group]))
                if cache.rows > 1:
                    cache.replace_with(Cache.stack(group.caches))

    def is_alone(self, group: StaticRows) -> bool:
        """Return whether no other conversation decodes or waits for the device."""
        return self._decoding == [group] and not self.device.num_waiting

    def fits(self, group: StaticRows) -> bool:
        """Return whether a step of `max_tokens` fits into a group's rows without compressing any."""
        decoder = self._decoders.get(group.config)
        if not group.rows or decoder is None:
            return all(cache.fits_all(self.max_tokens) for cache in group.caches)
        return decoder.takes_draft

    def launch(self, group: StaticRows) -> None:
        """Run the group's next tokens ahead of the caller, in a step of their own; they are pending."""
        self.device.call(partial(self._run, [group]), Kind.STEP, priority=group.priority)

    def step(self, group: StaticRows) -> list[int]:
        """Run and count the group's next tokens, in a step of their own or with others.

        Returns what the model says next in each row.
        """
        return self.device.submit(Job(partial(self._step, group), Kind.STEP, group.priority, group)).wait()

    def count(self, group: StaticRows, counts: Sequence[int]) -> None:
        """Count so many of each row's tokens, which were run ahead."""
        self.device.call(partial(self._count, group, counts), priority=group.priority)

    def count_all(self, group: StaticRows) -> list[int]:
        """Count all tokens of a group, which were run ahead; return what the model says next in each row."""
        return self.device.call(partial(self._count_all, group), priority=group.priority)

    # -- in the device thread ----------------------------------------------------------------------------------------

    def sample(self, groups: Sequence[StaticRows]) -> list[list[int]]:
        """Return what the model says next in each row of each group."""
        logits = [cache.logits for group in groups for cache in group.caches if cache.logits is not None]
        sampled = iter(sample_rows(torch.cat(logits), [each for group in groups for each in group.sequences]))
        return [[next(sampled) for _ in group.caches] for group in groups]

    def _count(self, group: StaticRows, counts: Sequence[int]) -> None:
        decoder = self._decoders.get(group.config)
        is_pending = [len(part) for part in group.ids] == [
            decoder.num_pending(row) if decoder is not None else 0 for row in group.rows
        ]
        if not is_pending:  # another conversation's step came between: run again what was right of them
            group.ids, group.counted = [part[:kept] for part, kept in zip(group.ids, counts, strict=True)], True
            self._run_together([group])
        elif decoder is not None:
            for row, kept in zip(group.rows, counts, strict=True):
                decoder.keep(row, kept)

    def _count_all(self, group: StaticRows) -> list[int]:
        self._count(group, [len(part) for part in group.ids])
        return self.sample([group])[0]

    def _step(self, group: StaticRows) -> list[int]:
        """Run a step for a group and for all that wait and fit; return what the model says next in its rows."""
        return run_shared_step(group, self._gather(group), self._run, self.sample)

    def _run(self, groups: Sequence[StaticRows]) -> None:
        """Run the next tokens of groups in one step."""
        rows = sum(len(each.caches) for each in groups)
        remedy = decoding_remedy(groups[0].config, groups[0].caches[0].specs, rows)
        self._last = list(groups)
        with name_memory_errors(f"decoding {rows} conversations", remedy):
            self._run_together(groups)

    def _gather(self, group: StaticRows) -> list[Job[list[int]]]:
        """Take the waiting steps of groups that can share a step; wait briefly for those of the last one."""
        if group.alone or group.config.slots is None or max(map(len, group.ids)) > 1:
            return []
        room = self.sizes[-1] - len(group.caches)

        def alike(other: object) -> bool:
            if not isinstance(other, StaticRows):
                return False
            one_token = max(map(len, other.ids), default=0) == 1
            return other.config == group.config and not other.alone and one_token and len(other.caches) <= room

        def fits(other: StaticRows) -> bool:
            nonlocal room
            taken = alike(other)
            room -= len(other.caches) if taken else 0
            return taken

        expected = [other for other in self._last if other is not group and other in self._decoding]
        self.device.wait_for(alike, sum(other.config == group.config for other in expected))
        return self.device.take(fits)

    @torch.inference_mode()
    def _run_together(self, groups: Sequence[StaticRows]) -> None:
        """Run the next tokens of some groups: one step, or several of a single row with more tokens than fit one."""
        decoder = self._seat(groups)
        if not decoder.takes_draft:
            for group in groups:
                group.drop_draft()
        left = {row: part for group in groups for row, part in zip(group.rows, group.ids, strict=True) if part}
        logits: dict[int, Tensor] = {}
        while left:
            size = self.max_tokens if len(left) == 1 and decoder.takes_draft else 1
            logits = decoder.step({row: part[:size] for row, part in left.items()})
            left = {row: part[size:] for row, part in left.items() if part[size:]}
            for row in left:
                decoder.keep(row)
        for group in groups:
            group.pending_logits = logits.get(group.rows[0])
            for row, part in zip(group.rows, group.ids, strict=True):
                if part and group.counted:
                    decoder.keep(row)
            group.done = True

    def _seat(self, groups: Sequence[StaticRows]) -> StaticDecoder:
        """Return the decoder of these groups, in which all of them have rows with room for their tokens."""
        config = groups[0].config
        self._leave([group for group in self._seated if group not in self._decoding])
        decoder = self._decoders.pop(config, None)
        if decoder is not None:
            self._decoders[config] = decoder  # the one used last
            self._make_free(decoder, groups)
        new = sum(len(group.caches) for group in groups if not group.rows)
        if decoder is None or new > decoder.num_free or self._needs_capacity(decoder, groups):
            decoder = self._rebuild(groups)
        for group in groups:
            if not group.rows:
                group.rows = [decoder.join(cache) for cache in group.caches]
                self._seated.append(group)
        return decoder

    def _make_free(self, decoder: StaticDecoder, groups: Sequence[StaticRows]) -> None:
        """Free rows of a batch that cannot grow, those that were given last, for groups that have none."""
        new = sum(len(group.caches) for group in groups if not group.rows)
        others = [group for group in self._seated if group.config == groups[0].config and group not in groups]
        while others and decoder.batch.num_rows == self.sizes[-1] and new > decoder.num_free:
            self._leave([others.pop()])

    def _rebuild(self, groups: Sequence[StaticRows]) -> StaticDecoder:
        """Allocate a batch with rows for these groups and, as far as possible, for those that decode beside them."""
        config = groups[0].config
        seated = [group for group in self._seated if group.config == config]
        total = sum(len(group.caches) for group in {*seated, *groups})
        rows = next((size for size in self.sizes if size >= total), self.sizes[-1])
        self._leave(seated)  # they come back with their next step
        self._decoders.pop(config, None)  # its memory is needed
        while len(self._decoders) >= MAX_BATCHES:
            oldest = next(iter(self._decoders))
            self._leave([group for group in self._seated if group.config == oldest])
            del self._decoders[oldest]
        self._decoders[config] = self._make_decoder(config, rows, max(self._capacity(group) for group in groups))
        return self._decoders[config]

    def _capacity(self, group: StaticRows) -> int:
        """Return the entries that each layer of the exact cache needs for a group: twice what it has, in time."""
        longest = max(map(len, group.ids))
        if group.config.slots is not None:
            return 0
        used = max(max(layer.num_filled) for cache in group.caches for layer in cache.layers)  # those of its batch left
        return 1 << (used + longest + self.max_tokens).bit_length()

    def _needs_capacity(self, decoder: StaticDecoder, groups: Sequence[StaticRows]) -> bool:
        """Return whether the exact cache has to grow before the groups' next tokens."""
        if groups[0].config.slots is not None:
            return False
        room = self.max_tokens
        seated = [(row, part) for group in groups for row, part in zip(group.rows, group.ids, strict=False)]
        waiting = [cache for group in groups if not group.rows for cache in group.caches]
        full = any(not decoder.has_room(row, len(part) + room) for row, part in seated)
        return full or any(not decoder.can_load(cache, max(map(len, groups[0].ids)) + room) for cache in waiting)

    def _leave(self, groups: Sequence[StaticRows]) -> None:
        """Take groups out of their batch; their caches are up to date then."""
        for group in groups:
            if group.rows:
                for row in group.rows:
                    self._decoders[group.config].leave(row)
                group.rows = []
                self._seated.remove(group)
