"""The decode loop: sample, yield, and read what was sampled, until every sequence has ended.

One loop for one conversation and for a batch. A conversation alone may share its forward passes with those of other
threads (`scheduler`), reads the tokens that its grammar forces in one pass, and verifies drafts of several tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from threading import Event

import torch

from zsmerge_llm.engine.model_runner import ModelRunner
from zsmerge_llm.engine.scheduler import DecodeScheduler, ScheduledRow
from zsmerge_llm.engine.sequence import DecodeSequence
from zsmerge_llm.kvcache.cache import Cache


class Cancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """The caller's event was set. Everything read or generated before stays in the cache."""


def check_cancelled(cancel: Event | None) -> None:
    """Raise Cancelled where the caller's event is set."""
    if cancel is not None and cancel.is_set():
        raise Cancelled


def decode(
    runner: ModelRunner,
    scheduler: DecodeScheduler,
    cache: Cache,
    sequences: Sequence[DecodeSequence],
    cancel: Event | None,
) -> Iterator[list[int | None]]:
    """Decode all rows of a cache: yields one list of new ids a step, None for rows that have ended."""
    with scheduler.join(cache) if len(sequences) == 1 else nullcontext() as row:
        while True:
            check_cancelled(cancel)
            tokens = _sample(cache, sequences)
            if all(token is None for token in tokens):
                return
            yield tokens
            pending = [[0 if token is None else token] for token in tokens]
            for token in sequences[0].forced_tokens() if row is not None else ():
                check_cancelled(cancel)
                pending[0].append(token)
                yield [token]
            if not any(sequence.is_running for sequence in sequences):
                return
            if row is None:
                running = torch.tensor([[sequence.is_running] for sequence in sequences])
                with scheduler.turn:
                    runner.run(cache, torch.tensor(pending), None if running.all() else running)
            elif draft := _propose(runner, scheduler, row, sequences[0], len(pending[0])):
                for token in _verify_draft(runner, scheduler, cache, sequences[0], pending[0], draft):
                    yield [token]
                if not sequences[0].is_running:
                    return
            else:
                scheduler.step(row, pending[0])


def _sample(cache: Cache, sequences: Sequence[DecodeSequence]) -> list[int | None]:
    """Sample the next token of every row that is running, with one look at the device."""
    assert cache.logits is not None
    logits = cache.logits.float()
    sampled = torch.stack([each.sample(scores) for each, scores in zip(sequences, logits, strict=True)]).tolist()
    return [each.accept(token) if each.is_running else None for each, token in zip(sequences, sampled, strict=True)]


def _propose(
    runner: ModelRunner, scheduler: DecodeScheduler, row: ScheduledRow, sequence: DecodeSequence, num_pending: int
) -> list[int]:
    """Return a draft of the next tokens, where it delays no other row and everything fits without compressing."""
    draft = sequence.propose() if scheduler.is_alone(row) else []
    if runner.backend.max_decode_tokens is not None:
        draft = draft[: max(0, runner.backend.max_decode_tokens - num_pending)]
    if not draft:
        return []
    new = num_pending + len(draft)
    fits = all(layer.fits(new) for layer in row.cache.layers)
    return draft if fits and new <= runner.remapper.max_pass_tokens(row.cache, new, 0) else []


def _verify_draft(
    runner: ModelRunner,
    scheduler: DecodeScheduler,
    cache: Cache,
    sequence: DecodeSequence,
    pending: list[int],
    draft: list[int],
) -> Iterator[int]:
    """Read `pending` and a draft behind it in one pass; keep and yield the tokens that the model samples itself."""
    with scheduler.turn, torch.inference_mode():
        step, logits = runner.speculate(cache, [*pending, *draft])
        scores = logits[len(pending) - 1 : -1].float()
        sampled = torch.stack([sequence.sample(each) for each in scores]).tolist()
    kept = len(pending)
    try:
        for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(draft, sampled, strict=True)):
            kept += 1
            sequence.accept(token)
            yield token
            if not sequence.is_running:
                return
    finally:  # also where the caller stops listening: the cache must hold what was yielded
        runner.keep(cache, step, logits, kept)
