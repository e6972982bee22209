"""Decode steps of several threads in one forward pass: whoever gets the turn takes along every row that waits.

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

PATIENCE = 0.002
"""Seconds for which a pass waits for rows that took part in the last one: far less than a pass takes."""
ABSENCES = 8
"""Passes after which a row that did not come (its reader has paused) leaves the batch."""

Forward = Callable[[Cache, Tensor, Tensor | None], object]
"""(cache, ids [B, n], valid [B, n] or None): reads into the cache. Called by the holder of the turn only."""


class ScheduledRow:
    """One conversation while it decodes."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.ids: list[int] = []
        self.done = False
        self.gone = False
        self.absences = 0
        self.since: list[list[int]] = []  # steps since the row joined the batch: its own cache does not know them yet


class DecodeScheduler:
    """Runs the decode steps of an engine's threads.

    Args:
        forward: makes one pass.
        turn: the lock under which passes are made.
    """

    def __init__(self, forward: Forward, turn: FairLock) -> None:
        self._forward = forward
        self._turn = turn
        self._rows: list[ScheduledRow] = []
        self._batch: Cache | None = None
        self._latest: list[ScheduledRow] = []

    @contextmanager
    def row(self, cache: Cache) -> Iterator[ScheduledRow]:
        """A row that may decode together with others; when it ends, `cache` is up to date."""
        row = ScheduledRow(cache)
        try:
            yield row
        finally:
            row.gone = True
            if not self._turn.mine:  # else a generator is being collected within a pass: the next pass cleans up
                with self._turn:
                    self._part([row])
                    self._catch_up(row)
                    self._latest = [other for other in self._latest if other is not row]

    def alone(self, row: ScheduledRow) -> bool:
        """Whether nobody else is decoding, as far as one can see: the row's own cache is up to date then."""
        shared = row in self._rows or row.since or any(other is not row for other in self._latest)
        return not shared and not self._turn.waiting(lambda _: True)

    def step(self, row: ScheduledRow, ids: Sequence[int]) -> None:
        """Read `ids` into the row; `row.cache.logits` [1, vocab] is what follows.

        Raises whatever the pass raises; `row.cache` is as it was then.
        """
        row.ids, row.done = list(ids), False
        while not row.done:  # a pass that failed under another thread is tried again under this one
            if self._turn.wait(Ticket(row)):
                try:
                    self._lead(row)
                finally:
                    self._turn.release()

    @torch.inference_mode()
    def _lead(self, row: ScheduledRow) -> None:
        """One pass for `row` and all that wait and fit."""
        self._part([other for other in self._rows if other.gone])
        joined = self._gather(row)
        rows: list[ScheduledRow] = [row, *(ticket.work for ticket in joined)]
        try:
            self._catch_up(row)
            if len(rows) == 1 and row not in self._rows:
                self._forward(row.cache, torch.tensor([row.ids]), None)
            else:
                self._together(rows)
            for each in rows:
                each.done = True
        finally:
            self._latest = rows
            self._turn.serve(joined)

    def _gather(self, row: ScheduledRow) -> list[Ticket]:
        """Tickets of rows that can go with `row`; those that took part in the last pass are waited for, briefly."""
        config = row.cache.config
        if config.slots is None or (self._batch is not None and self._batch.config != config):
            return []

        def fits(other: ScheduledRow) -> bool:
            return other.cache.config == config and (other in self._rows or not other.since)

        expected = sum(not other.gone and other is not row and fits(other) for other in self._latest)
        deadline = time.perf_counter() + PATIENCE
        while self._turn.waiting(fits) < expected and time.perf_counter() < deadline:
            time.sleep(PATIENCE / 10)
        return self._turn.take(fits)

    def _together(self, rows: list[ScheduledRow]) -> None:
        """One pass over the batch, into which rows that are not in it are taken first."""
        joining = [row for row in rows if row not in self._rows]
        if joining:
            present = [] if self._batch is None else [self._batch]
            self._batch = Cache.stack([*present, *(row.cache for row in joining)])
            self._rows = [*self._rows, *joining]
        assert self._batch is not None
        longest = max(len(row.ids) for row in rows)
        coming = [row.ids if row in rows else [] for row in self._rows]
        ids = torch.tensor([[*part, *[0] * (longest - len(part))] for part in coming])
        valid = torch.tensor([[at < len(part) for at in range(longest)] for part in coming])
        batch, members, self._batch, self._rows = self._batch, self._rows, None, []
        self._forward(batch, ids, None if valid.all() else valid)  # one that fails leaves nothing to be trusted
        self._batch, self._rows = batch, members
        assert self._batch.logits is not None
        for index, row in enumerate(self._rows):
            if row in rows:
                row.absences = 0
                row.since.append(row.ids)
                row.cache.logits = self._batch.logits[index : index + 1].clone()
            else:
                row.absences += 1
        self._part([row for row in self._rows if row.absences > ABSENCES])

    @torch.inference_mode()
    def _part(self, leaving: list[ScheduledRow]) -> None:
        """Bring the caches of these rows up to date; one row alone is no batch."""
        leaving = [row for row in leaving if row in self._rows]
        if not leaving or self._batch is None:
            return
        staying = [row for row in self._rows if row not in leaving]
        if len(staying) == 1:
            leaving, staying = self._rows, []
        for row in leaving:
            row.cache.replace_with(self._batch.select_rows([self._rows.index(row)]))
            row.since.clear()
            row.absences = 0
        self._batch = self._batch.select_rows([self._rows.index(row) for row in staying]) if staying else None
        self._rows = staying

    def _catch_up(self, row: ScheduledRow) -> None:
        """Read again what the row's own cache missed, where the batch that knew it was lost in a pass that failed."""
        while row.since and row not in self._rows:
            self._forward(row.cache, torch.tensor([row.since[0]]), None)
            row.since.pop(0)
