"""Batch the decode steps of several threads (continuous batching): the thread that holds the lock runs one forward pass
for every row that waits.

Rows join and leave between two passes. While a row is in the batch its own cache is out of date; it is brought up to
date when the row leaves. A row alone decodes on its own cache, without a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from zsmerge_llm.attention.passes import SpeculativePass
from zsmerge_llm.engine.fair_lock import FairLock, Ticket
from zsmerge_llm.engine.model_runner import ModelRunner
from zsmerge_llm.kvcache.cache import Cache

MAX_MISSED_PASSES = 8
"""Passes without a row (its reader has paused) after which it leaves the batch."""


class ScheduledRow:
    """One conversation while it decodes; a `Decoder` of one row.

    ids: what it reads next, or whether that was read: done. left: whether it decodes no more. unread_steps: the ids of
    the steps since it joined the batch, which its own cache does not hold yet.
    """

    def __init__(self, cache: Cache, scheduler: DecodeScheduler) -> None:
        self.cache = cache
        self.ids: list[int] = []
        self.done = False
        self.left = False
        self.missed_passes = 0
        self.unread_steps: list[list[int]] = []
        self._scheduler = scheduler
        self._draft: list[int] = []
        self._speculative: tuple[SpeculativePass, Tensor] | None = None

    @property
    def logits(self) -> Tensor:
        """The logits after the last token, [1, vocab]."""
        assert self.cache.logits is not None
        return self.cache.logits

    @property
    def drafting(self) -> ScheduledRow:
        """The row itself verifies drafts."""
        return self

    def max_draft(self, num_pending: int) -> int:
        """Return how many tokens of a draft may follow so many tokens; none where others wait, or none fits."""
        if not self._scheduler.is_alone(self):
            return 0
        return self._scheduler.runner.max_draft(self.cache, num_pending)

    def launch(self, ids: Sequence[Sequence[int]], draft: Sequence[int] = ()) -> None:
        """Note what is read next: nothing runs beside the caller here."""
        (self.ids,), self._draft = [list(part) for part in ids], list(draft)

    def finish(self) -> None:
        """Read the tokens, in a pass of this thread or another."""
        self._scheduler.step(self, self.ids)

    def draft_logits(self) -> Tensor:
        """Run the tokens and the draft without reading them: logits [n, vocab]."""
        runner = self._scheduler.runner
        with self._scheduler.turn:
            self._speculative = runner.speculate(self.cache, [*self.ids, *self._draft])
        return self._speculative[1]

    def keep(self, count: int) -> None:
        """Read the first `count` tokens."""
        assert self._speculative is not None
        self._scheduler.runner.keep(self.cache, *self._speculative, count)
        self._speculative = None


class BatchDecoder:
    """Decodes the rows of one cache together, on that cache: a `Decoder` of several rows."""

    drafting = None

    def __init__(self, cache: Cache, runner: ModelRunner, turn: FairLock) -> None:
        self._cache, self._runner, self._turn = cache, runner, turn
        self._ids: list[list[int]] = []

    @property
    def logits(self) -> Tensor:
        """The logits after each row's last token, [B, vocab]."""
        assert self._cache.logits is not None
        return self._cache.logits

    def launch(self, ids: Sequence[Sequence[int]], draft: Sequence[int] = ()) -> None:
        """Note what is read next."""
        self._ids = [list(part) for part in ids]

    def finish(self) -> None:
        """Read one token of each row, none of those that have ended."""
        running = torch.tensor([[len(part) > 0] for part in self._ids])
        tokens = torch.tensor([part or [0] for part in self._ids])
        with self._turn:
            self._runner.run(self._cache, tokens, None if running.all() else running)


class DecodeScheduler:
    """Runs the decode steps of an engine's threads, several rows in one pass where they wait for each other.

    Args:
        runner: makes passes. turn: the lock under which they are made.
    """

    def __init__(self, runner: ModelRunner, turn: FairLock) -> None:
        self.runner = runner
        self.turn = turn
        self._rows: list[ScheduledRow] = []
        self._batch: Cache | None = None
        self._last_rows: list[ScheduledRow] = []

    @contextmanager
    def join(self, cache: Cache) -> Iterator[ScheduledRow | BatchDecoder]:
        """Decode a cache; a row alone may share passes with other threads' rows. At the end `cache` is up to date."""
        if cache.rows > 1:
            yield BatchDecoder(cache, self.runner, self.turn)
            return
        row = ScheduledRow(cache, self)
        try:
            yield row
        finally:
            row.left = True
            if not self.turn.mine:  # else a generator is being collected within a pass: the next pass cleans up
                with self.turn:
                    self._remove([row])
                    self._catch_up(row)
                    self._last_rows = [other for other in self._last_rows if other is not row]

    def is_alone(self, row: ScheduledRow) -> bool:
        """Return whether no other row is decoding; the row's own cache is up to date then."""
        shared = row in self._rows or row.unread_steps or any(other is not row for other in self._last_rows)
        return not shared and not self.turn.waiting(lambda _: True)

    def step(self, row: ScheduledRow, ids: Sequence[int]) -> None:
        """Read `ids` into the row, in a pass of this thread or another; sets `row.cache.logits` [1, vocab].

        Raises whatever the pass raises; `row.cache` is as it was then.
        """
        row.ids, row.done = list(ids), False
        self.turn.run_until_done(row, self._run_pass)

    def _run_pass(self, row: ScheduledRow) -> None:
        """Run one pass for `row` and for all waiting rows that fit, on the backend's number of threads."""
        with self.runner.backend.running():
            self._run_rows(row)

    @torch.inference_mode()
    def _run_rows(self, row: ScheduledRow) -> None:
        self._remove([other for other in self._rows if other.left])
        joined = self._gather(row)
        rows: list[ScheduledRow] = [row, *(ticket.work for ticket in joined)]
        try:
            self._catch_up(row)
            if len(rows) == 1 and row not in self._rows:
                self.runner.run(row.cache, torch.tensor([row.ids]))
            else:
                self._run_batch(rows)
            for each in rows:
                each.done = True
        finally:
            self._last_rows = rows
            self.turn.serve(joined)

    def _gather(self, row: ScheduledRow) -> list[Ticket]:
        """Take the tickets of rows that can share a pass with `row`; wait briefly for rows of the last one."""
        config = row.cache.config
        if config.slots is None or (self._batch is not None and self._batch.config != config):
            return []

        def fits(other: ScheduledRow) -> bool:
            return other.cache.config == config and (other in self._rows or not other.unread_steps)

        expected = sum(not other.left and other is not row and fits(other) for other in self._last_rows)
        self.turn.wait_for_others(fits, expected)
        return self.turn.take(fits)

    def _run_batch(self, rows: list[ScheduledRow]) -> None:
        """Run one pass over the batch, after adding the rows that are not in it."""
        joining = [row for row in rows if row not in self._rows]
        if joining:
            present = [] if self._batch is None else [self._batch]
            self._batch = Cache.stack([*present, *(row.cache for row in joining)])
            self._rows = [*self._rows, *joining]
        assert self._batch is not None
        longest = max(len(row.ids) for row in rows)
        wanted = [row.ids if row in rows else [] for row in self._rows]
        ids = torch.tensor([[*part, *[0] * (longest - len(part))] for part in wanted])
        valid = torch.tensor([[at < len(part) for at in range(longest)] for part in wanted])
        batch, members, self._batch, self._rows = self._batch, self._rows, None, []
        self.runner.run(batch, ids, None if valid.all() else valid)  # a batch that fails here is lost
        self._batch, self._rows = batch, members
        assert self._batch.logits is not None
        for index, row in enumerate(self._rows):
            if row in rows:
                row.missed_passes = 0
                row.unread_steps.append(row.ids)
                row.cache.logits = self._batch.logits[index : index + 1].clone()
            else:
                row.missed_passes += 1
        self._remove([row for row in self._rows if row.missed_passes > MAX_MISSED_PASSES])

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
            row.unread_steps.clear()
            row.missed_passes = 0
        self._batch = self._batch.select_rows([self._rows.index(row) for row in staying]) if staying else None
        self._rows = staying

    def _catch_up(self, row: ScheduledRow) -> None:
        """Read the steps that the row's own cache lacks, where the batch that held them was lost in a failed pass."""
        while row.unread_steps and row not in self._rows:
            self.runner.run(row.cache, torch.tensor([row.unread_steps[0]]))
            row.unread_steps.pop(0)
