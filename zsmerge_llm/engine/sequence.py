"""One row while it decodes: how its tokens are sampled, what may follow, and when it ends."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.engine.prompt_lookup import PromptLookup
from zsmerge_llm.engine.sampler import Sampler
from zsmerge_llm.language.grammar import Constraint


class DecodeSequence:
    """The state of one row of a decode loop.

    Args:
        constraint: what the row may say; None: anything.
        stop_ids: end tokens.
        prompt: everything the row has read; drafts are found there.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: SamplingParams,
        constraint: Constraint | None,
        stop_ids: Collection[int],
        prompt: Sequence[int],
    ) -> None:
        self.is_running = True
        self._sampler = sampler
        self._constraint = constraint
        self._ends = () if params.ignore_eos else stop_ids
        self._tokens_left = params.max_tokens
        # Sampling must have no state, because some of what is sampled behind a draft is never used.
        stateless = params.lookup and sampler.greedy and sampler.penalty == 1 and constraint is None
        self._lookup = PromptLookup(prompt, stop_ids) if stateless else None

    def sample(self, logits: Tensor) -> Tensor:
        """Sample from float32 [vocab]: the next token as the model wants it, int64, 0-d."""
        if self.is_running and self._constraint is not None:
            logits = self._constraint.mask(logits)
        return self._sampler(logits)

    def accept(self, token: int) -> int | None:
        """Take `token`, or the one that the constraint puts in its place; return it, or None if it ends the row."""
        ended = False
        if self._constraint is not None and token >= 0:
            token = self._constraint.accept(token)
            ended = self._constraint.ended
        self._sampler.accept(token)
        if ended or token in self._ends:
            self.is_running = False
            return None
        self._append(token)
        return token

    def propose(self) -> list[int]:
        """Return a draft of the next tokens, no longer than the row may get."""
        draft = [] if self._lookup is None else self._lookup.propose()
        return draft if self._tokens_left is None else draft[: self._tokens_left]

    def forced_tokens(self) -> Iterator[int]:
        """Take and yield the tokens that must follow whatever the model samples."""
        for token in self._constraint.forced() if self._constraint is not None and self.is_running else ():
            self._sampler.accept(token)
            self._append(token)
            yield token

    def _append(self, token: int) -> None:
        if self._lookup is not None:
            self._lookup.push(token)
        self._tokens_left = None if self._tokens_left is None else self._tokens_left - 1
        self.is_running = self._tokens_left != 0 and not (self._constraint is not None and self._constraint.done)
