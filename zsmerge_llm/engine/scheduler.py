"""Batch the decode steps of several conversations (continuous batching): one forward pass for every row that waits.

Rows join and leave between two passes. While a row is in the batch its own cache is out of date; it is brought up to
date when the row leaves. A row alone decodes on its own cache, without a batch. Passes run in the device thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from zsmerge_llm.attention.passes import SpeculativePass
from zsmerge_llm.engine.decode_loop import sample_rows
from zsmerge_llm.engine.device_thread import DeviceThread, Job, Kind
from zsmerge_llm.engine.model_runner import ModelRunner
from zsmerge_llm.engine.sequence import DecodeSequence
from zsmerge_llm.engine.shared_step import run_shared_step
from zsmerge_llm.kvcache.cache import Cache

MAX_MISSED_PASSES = 8
"""Passes without a row (its reader has paused) after which it leaves the batch."""


class ScheduledRow:
    """One conversation while it decodes; a `Decoder` of one row.

    ids: what it reads next. left: whether it decodes no more. alone: whether it shares no pass, because one failed.
    unread_ids: what it has read since it joined the batch, which its own cache does not hold yet.
    """

    def __init__(self, cache: Cache, sequence: DecodeSequence, scheduler: DecodeScheduler, priority: int) -> None:
        self.cache = cache
        self.sequence = sequence
        self.ids: list[int] = []
        self.left = False
        self.alone = False
        self.missed_passes = 0
        self.unread_ids: list[int] = []
        self._scheduler = scheduler
        self._priority = priority
        self._draft: list[int] = []
        self._speculative: tuple[SpeculativePass, Tensor] | None = None

    @property
    def drafting(self) -> ScheduledRow:
        """The row itself verifies drafts."""
        return self

    def sample(self) -> list[int]:
        """Return what the model says next."""
        return self._scheduler.device.call(partial(self._scheduler.sample, [self]), priority=self._priority)

    def max_draft(self, num_pending: int) -> int:
        """Return how many tokens of a draft may follow so many tokens; none where others wait, or none fits."""
        return self._scheduler.max_draft(self, num_pending)

    def launch(self, ids: Sequence[Sequence[int]], draft: Sequence[int] = ()) -> None:
        """Note what is read next: nothing runs beside the caller here."""
        (self.ids,), self._draft = [list(part) for part in ids], list(draft)

    def finish(self) -> list[int]:
        """Read the tokens, in a pass that other rows may share; return what the model says next."""
        return [self._scheduler.step(self, self._priority)]

    def sample_draft(self, num_pending: int) -> list[int]:
        """Run the tokens and the draft without reading them: what the model says in place of each of the draft's."""
        run = partial(self._speculate, num_pending)
        return self._scheduler.device.call(run, Kind.STEP, priority=self._priority)

    def keep(self, count: int) -> None:
        """Read the first `count` tokens."""
        self._scheduler.device.call(partial(self._keep, count), priority=self._priority)

    def _speculate(self, num_pending: int) -> list[int]:
        self._speculative = self._scheduler.runner.speculate(self.cache, [*self.ids, *self._draft])
        logits = self._speculative[1][num_pending - 1 : -1]
        return sample_rows(logits, [self.sequence] * len(logits))

    def _keep(self, count: int) -> None:
        assert self._speculative is not None
        self._scheduler.runner.keep(self.cache, *self._speculative, count)
        self._speculative = None


class BatchDecoder:
    """Decodes the rows of one cache together, on that cache: a `Decoder` of several rows."""

    drafting = None

    def __init__(
        self,
        cache: Cache,
        sequences: Sequence[DecodeSequence],
        runner: ModelRunner,
        device: DeviceThread,
        priority: int,
    ) -> None:
        self._cache, self._sequences, self._runner = cache, sequences, runner
        self._device, self._priority = device, priority
        self._ids: list[list[int]] = []

    def sample(self) -> list[int]:
        """Return what the model says next in each row."""
        return self._device.call(self._sample, priority=self._priority)

    def launch(self, ids: Sequence[Sequence[int]], draft: Sequence[int] = ()) -> None:
        """Note what is read next."""
        self._ids = [list(part) for part in ids]

    def finish(self) -> list[int]:
        """Read one token of each row, none of those that have ended; return what the model says next in each."""
        return self._device.call(self._step, Kind.STEP, priority=self._priority)

    def _step(self) -> list[int]:
        running = torch.tensor([[len(part) > 0] for part in self._ids])
        tokens = torch.tensor([part or [0] for part in self._ids])
        self._runner.run(self._cache, tokens, None if running.all() else running)
        return self._sample()

    def _sample(self) -> list[int]:
        assert self._cache.logits is not None
        return sample_rows(self._cache.logits, self._sequences)


class DecodeScheduler:
    """Runs the decode steps of an engine's requests, several rows in one pass where they wait for each other.

    Args:
        runner: makes passes. device: the thread in which they are made.
        batch_invariant: whether rows share no pass, nor have drafts, where that may change how a pass rounds.
    """

    def __init__(self, runner: ModelRunner, device: DeviceThread, batch_invariant: bool) -> None:
        self.runner = runner
        self.device = device
        self._batch_invariant = batch_invariant
        self._rows: list[ScheduledRow] = []
        self._batch: Cache | None = None
        self._last_rows: list[ScheduledRow] = []

    @contextmanager
    def join(
        self, cache: Cache, sequences: Sequence[DecodeSequence], priority: int
    ) -> Iterator[ScheduledRow | BatchDecoder]:
        """Decode a cache; a row alone may share passes with others. At the end `cache` is up to date."""
        if cache.rows > 1:
            yield BatchDecoder(cache, sequences, self.runner, self.device, priority)
            return
        row = ScheduledRow(cache, sequences[0], self, priority)
        try:
            yield row
        finally:
            row.left = True
            if not self.device.is_current:  # else a generator is being collected within a pass: the next one cleans up
                self.device.call(partial(self._leave, row))

    def max_draft(self, row: ScheduledRow, num_pending: int) -> int:
        """Return how many tokens of a draft may follow so many tokens of a row: none while other rows decode."""
        if self._must_be_alone or not self._is_alone(row):
            return 0
        return self.runner.max_draft(row.cache, num_pending)

    @property
    def _must_be_alone(self) -> bool:
        return self._batch_invariant and not self.runner.backend.batch_invariant

    def _is_alone(self, row: ScheduledRow) -> bool:
        """Return whether no other row is decoding; the row's own cache is up to date then."""
        shared = row in self._rows or row.unread_ids or any(other is not row for other in self._last_rows)
        return not shared and not self.device.num_waiting

    def step(self, row: ScheduledRow, priority: int) -> int:
        """Read the row's ids, in a pass of its own or with others; return what the model says next.

        Raises whatever the pass raises; `row.cache` is as it was then.
        """
        return self.device.submit(Job(partial(self._step, row), Kind.STEP, priority, row)).wait()

    # -- in the device thread ----------------------------------------------------------------------------------------

    def sample(self, rows: Sequence[ScheduledRow]) -> list[int]:
        """Return what the model says next in each row."""
        logits = [row.cache.logits for row in rows]
        return sample_rows(torch.cat([each for each in logits if each is not None]), [row.sequence for row in rows])

    def _step(self, row: ScheduledRow) -> int:
        """Run one pass for `row` and for all waiting rows that fit; return what the model says next in `row`."""
        self._remove([other for other in self._rows if other.left])
        return run_shared_step(row, self._gather(row), self._run_pass, self.sample, row in self._rows)

    @torch.inference_mode()
    def _run_pass(self, rows: list[ScheduledRow]) -> None:
        self._last_rows = rows
        for row in rows:
            self._catch_up(row)
        if len(rows) == 1 and rows[0] not in self._rows:
            self.runner.read_step(rows[0].cache, rows[0].ids)
        else:
            self._run_batches(rows)

    def _gather(self, row: ScheduledRow) -> list[Job[int]]:
        """Take the waiting steps of rows that can share a pass with `row`; wait briefly for rows of the last one."""
        config = row.cache.config
        if (
            row.alone
            or self._must_be_alone
            or config.slots is None
            or (self._batch is not None and self._batch.config != config)
        ):
            return []

        def fits(other: ScheduledRow) -> bool:
            return isinstance(other, ScheduledRow) and other.cache.config == config and not other.alone

        expected = sum(not other.left and other is not row and fits(other) for other in self._last_rows)
        self.device.wait_for(fits, expected)
        return self.device.take(fits)

    def _run_batches(self, rows: list[ScheduledRow]) -> None:
        """Run the rows' next tokens in as many passes as one of them has; if one fails, none counts."""
        before = [(row, row.cache.logits, len(row.unread_ids)) for row in rows]
        try:
            for at in range(max(len(row.ids) for row in rows)):
                self._run_batch({row: row.ids[at] for row in rows if at < len(row.ids)})
        except BaseException:
            for row, logits, num_unread in before:
                row.cache.logits = logits
                del row.unread_ids[num_unread:]
            raise
        for row in self._rows:
            row.missed_passes = 0 if row in rows else row.missed_passes + 1
        self._remove([row for row in self._rows if row.missed_passes > MAX_MISSED_PASSES])

    def _run_batch(self, rows: dict[ScheduledRow, int]) -> None:
        """Run one pass over the batch, one token of each of these rows, after adding those that are not in it."""
        joining = [row for row in rows if row not in self._rows]
        if joining:
            present = [] if self._batch is None else [self._batch]
            self._batch = Cache.stack([*present, *(row.cache for row in joining)])
            self._rows = [*self._rows, *joining]
        assert self._batch is not None
        ids = torch.tensor([[rows.get(row, 0)] for row in self._rows])
        valid = torch.tensor([[row in rows] for row in self._rows])
        batch, members, self._batch, self._rows = self._batch, self._rows, None, []
        self.runner.run(batch, ids, None if valid.all() else valid)  # a batch that fails here is lost
        self._batch, self._rows = batch, members
        assert self._batch.logits is not None
        for index, row in enumerate(self._rows):
            if row in rows:
                row.unread_ids.append(rows[row])
                row.cache.logits = self._batch.logits[index : index + 1].clone()

    def _leave(self, row: ScheduledRow) -> None:
        """Bring a row's own cache up to date, and forget the row."""
        self._remove([row])
        self._catch_up(row)
        self._last_rows = [other for other in self._last_rows if other is not row]

    @torch.inference_mode()
    def _remove(self, leaving: list[ScheduledRow]) -> None:
        """Take rows out of the batch and bring their caches up to date; one row alone is no batch."""
        leaving = [row for row in leaving if row in self._rows]
        if not leaving or self._batch is None:
            return
        staying = [row for row in self._rows if row not in leaving]
        if len(staying) == 1:
            leaving, staying = self._rows, []
        for row in leaving:
            row.cache.replace_with(self._batch.select_rows([self._rows.index(row)]))
            row.unread_ids.clear()
            row.missed_passes = 0
        self._batch = self._batch.select_rows([self._rows.index(row) for row in staying]) if staying else None
        self._rows = staying

    def _catch_up(self, row: ScheduledRow) -> None:
        """Read the steps that the row's own cache lacks, where the batch that held them was lost in a failed pass."""
        while row.unread_ids and row not in self._rows:
            self.runner.run(row.cache, torch.tensor([[row.unread_ids[0]]]))
            row.unread_ids.pop(0)
