"""A step that several rows share: one pass, one look at the device, and nobody pays for another's failure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from zsmerge_llm.engine.device_thread import Job


class SharingRow(Protocol):
    """A row, or a group of rows, that decodes. alone: whether it shares no step, because one failed."""

    alone: bool


Row = TypeVar("Row", bound=SharingRow)
Sampled = TypeVar("Sampled")


def run_shared_step(
    row: Row,
    joined: Sequence[Job[Sampled]],
    run: Callable[[list[Row]], None],
    sample: Callable[[list[Row]], list[Sampled]],
    in_batch: bool = False,
) -> Sampled:
    """Run a step for a row and for the jobs that it has taken along, in the device thread; end these jobs.

    Args:
        run: reads the next tokens of rows. sample: returns what the model says next in each.
        in_batch: whether the row's pass is one over a batch with rows that do not step now.

    Returns:
        What the model says next in `row`.
    """
    rows: list[Row] = [row, *(job.row for job in joined)]
    try:
        run(rows)
    except Exception:
        if not joined and not in_batch:
            raise
        for each in rows:  # whichever it was: each goes on alone
            each.alone = True
        for job in joined:
            job.execute()
        return run_shared_step(row, [], run, sample)
    try:
        own, *others = sample(rows)
    except Exception:  # of one row, a grammar's for example: each raises its own
        for job in joined:
            job.execute(partial(_sample_one, sample, job.row))
        return _sample_one(sample, row)
    for job, sampled in zip(joined, others, strict=True):
        job.finish(sampled)
    return own


def _sample_one(sample: Callable[[list[Row]], list[Sampled]], row: Row) -> Sampled:
    return sample([row])[0]
