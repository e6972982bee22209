"""The decode loop: sample, launch the next step, yield, until every sequence has ended.

One loop for one conversation and for a batch, whatever runs the steps (`Decoder`). A step is launched before its tokens
are yielded, so that a device works while the caller uses them; it counts only once they were taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from threading import Event
from typing import Protocol

import torch
from torch import Tensor

from zsmerge_llm.engine.scheduling import check_cancelled
from zsmerge_llm.engine.sequence import DecodeSequence


class Decoder(Protocol):
    """Runs the decode steps of the rows of one cache."""

    def sample(self) -> list[int]:
        """Return what the model says next in each row."""

    @property
    def drafting(self) -> Drafting | None:
        """What verifies drafts; None for several rows."""

    def launch(self, ids: Sequence[Sequence[int]], draft: Sequence[int] = ()) -> None:
        """Begin a step with each row's next tokens, and behind those of a single row a draft of more."""

    def finish(self) -> list[int]:
        """End a step without a draft: its tokens are read. Returns what the model says next in each row."""


class Drafting(Protocol):
    """Verifies the drafts of a single row."""

    def max_draft(self, num_pending: int) -> int:
        """Return how many tokens of a draft may follow so many tokens: 0 where that would delay other rows."""

    def sample_draft(self, num_pending: int) -> list[int]:
        """Run the step with its draft, behind so many tokens: what the model says in place of each of the draft's.

        Nothing where the draft had to be dropped.
        """

    def keep(self, count: int) -> None:
        """End a step with a draft: its first `count` tokens are read."""


def decode(
    decoding: AbstractContextManager[Decoder], sequences: Sequence[DecodeSequence], cancel: Event | None
) -> Iterator[list[int | None]]:
    """Decode all rows of a cache: yields one list of new ids a step, None for rows that have ended."""
    with decoding as decoder:
        check_cancelled(cancel)
        sampled = decoder.sample()
        while True:
            said = zip(sequences, sampled, strict=True)
            tokens = [row.accept(token) if row.is_running else None for row, token in said]
            if all(token is None for token in tokens):
                return
            forced = list(sequences[0].forced_tokens()) if len(sequences) == 1 else []
            pending = [[] if token is None else [token, *forced] for token in tokens]
            is_running = any(sequence.is_running for sequence in sequences)
            drafting = decoder.drafting if is_running else None
            draft = [] if drafting is None else _propose(drafting, sequences[0], len(pending[0]))
            if is_running:
                ids = [part if row.is_running else [] for part, row in zip(pending, sequences, strict=True)]
                decoder.launch(ids, draft)
            yield tokens
            for token in forced:
                check_cancelled(cancel)
                yield [token]
            if drafting is not None and draft:
                yield from _verify_draft(drafting, sequences[0], len(pending[0]), draft)
            if not any(sequence.is_running for sequence in sequences):
                return
            sampled = decoder.sample() if draft else decoder.finish()
            check_cancelled(cancel)


def _propose(drafting: Drafting, sequence: DecodeSequence, num_pending: int) -> list[int]:
    """Return a draft of the next tokens, as long as can be verified at once."""
    draft = sequence.propose()
    return draft[: drafting.max_draft(num_pending)] if draft else []


def _verify_draft(
    drafting: Drafting, sequence: DecodeSequence, num_pending: int, draft: list[int]
) -> Iterator[list[int | None]]:
    """Keep and yield those tokens of a draft that the model samples itself."""
    sampled, kept = drafting.sample_draft(num_pending), num_pending
    try:
        for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(draft, sampled, strict=False)):
            sequence.accept(token)
            kept += sequence.is_running  # the last token is not read, as without a draft: the next turn reads it
            yield [token]
            if not sequence.is_running:
                return
    finally:  # also where the caller stops listening: the cache must hold what was yielded
        drafting.keep(kept)


def sample_rows(logits: Tensor, sequences: Sequence[DecodeSequence]) -> list[int]:
    """Sample the next token of each row from logits [B, vocab], with one look at the device."""
    rows = zip(sequences, logits.float(), strict=True)
    return torch.stack([each.sample(scores) for each, scores in rows]).tolist()
