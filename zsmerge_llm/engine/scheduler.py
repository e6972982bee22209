"""Batch the decode steps of several threads (continuous batching): the thread that holds the lock runs one forward pass
for every row that waits.

Rows join and leave between two passes. While a row is in the batch its own cache is out of date; it is brought up to
date when the row leaves. A row alone decodes on its own cache, without a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from zsmerge_llm.engine.fair_lock import FairLock, Ticket
from zsmerge_llm.kvcache.cache import Cache

MAX_WAIT_SECONDS = 0.002
"""How long a pass waits for rows that took part in the last one: far less than a pass takes."""
MAX_MISSED_PASSES = 8
"""Passes without a row (its reader has paused) after which it leaves the batch."""

Forward = Callable[[Cache, Tensor, Tensor | None], object]
"""(cache, ids [B, n], valid [B, n] or None): reads into the cache. Called by the holder of the turn only."""


class ScheduledRow:
    """One conversation while it decodes.

    ids: what it reads next. done: whether that was read. left: whether it decodes no more. unread_steps: the ids of the
    steps since it joined the batch, which its own cache does not hold yet.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.ids: list[int] = []
        self.done = False
        self.left = False
        self.missed_passes = 0
        self.unread_steps: list[list[int]] = []


class DecodeScheduler:
    """Runs the decode steps of an engine's threads, several rows in one pass where they wait for each other.

    Args:
        forward: makes one pass.
        turn: the lock under which passes are made.
    """

    def __init__(self, forward: Forward, turn: FairLock) -> None:
        self._forward = forward
        self.turn = turn
        self._rows: list[ScheduledRow] = []
        self._batch: Cache | None = None
        self._last_rows: list[ScheduledRow] = []

    @contextmanager
    def join(self, cache: Cache) -> Iterator[ScheduledRow]:
        """Add a conversation as a row that may share passes; when it leaves, `cache` is up to date."""
        row = ScheduledRow(cache)
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
        while not row.done:  # a pass that failed under another thread is tried again under this one
            if self.turn.wait(Ticket(row)):
                try:
                    self._run_pass(row)
                finally:
                    self.turn.release()

    @torch.inference_mode()
    def _run_pass(self, row: ScheduledRow) -> None:
        """Run one pass for `row` and for all waiting rows that fit."""
        self._remove([other for other in self._rows if other.left])
        joined = self._gather(row)
        rows: list[ScheduledRow] = [row, *(ticket.work for ticket in joined)]
        try:
            self._catch_up(row)
            if len(rows) == 1 and row not in self._rows:
                self._forward(row.cache, torch.tensor([row.ids]), None)
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
        deadline = time.perf_counter() + MAX_WAIT_SECONDS
        while self.turn.waiting(fits) < expected and time.perf_counter() < deadline:
            time.sleep(MAX_WAIT_SECONDS / 10)
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
        self._forward(batch, ids, None if valid.all() else valid)  # a batch that fails here is lost
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
            self._forward(row.cache, torch.tensor([row.unread_steps[0]]), None)
            row.unread_steps.pop(0)
