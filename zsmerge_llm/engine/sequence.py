"""One row while it decodes: how its tokens are drawn, what may follow, and when it ends."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.engine.prompt_lookup import PromptLookup
from zsmerge_llm.engine.sampler import Sampler
from zsmerge_llm.language.grammar import Constraint


class DecodeSequence:
    """One row of a decode loop.

    Args:
        prompt: everything it has read; what it says next may be found there.
    """

    def __init__(
        self,
        sampler: Sampler,
        params: SamplingParams,
        constraint: Constraint | None,
        stop_ids: Collection[int],
        prompt: Sequence[int],
    ) -> None:
        self.going = True
        self._sampler = sampler
        self._constraint = constraint
        self._ends = () if params.ignore_eos else stop_ids
        self._left = params.max_tokens
        # Drawing must change nothing, because some of what is drawn behind a guess is never said.
        sure = params.lookup and sampler.greedy and sampler.penalty == 1 and constraint is None
        self._lookup = PromptLookup(prompt, stop_ids) if sure else None

    def draw(self, logits: Tensor) -> Tensor:
        """float32[vocab] → the next token as the model wants it, int64, 0-d."""
        if self.going and self._constraint is not None:
            logits = self._constraint.mask(logits)
        return self._sampler(logits)

    def take(self, token: int) -> int | None:
        """Settle for `token`, or what the constraint makes of it; None if that ends the row."""
        ended = False
        if self._constraint is not None and token >= 0:
            token = self._constraint.accept(token)
            ended = self._constraint.ended
        self._sampler.accept(token)
        if ended or token in self._ends:
            self.going = False
            return None
        self._said(token)
        return token

    def guess(self) -> list[int]:
        """What the row may say next, as many tokens as it may say."""
        found = [] if self._lookup is None else self._lookup.guess()
        return found if self._left is None else found[: self._left]

    def forced(self) -> Iterator[int]:
        """Tokens that must follow whatever the model says."""
        for token in self._constraint.forced() if self._constraint is not None and self.going else ():
            self._sampler.accept(token)
            self._said(token)
            yield token

    def _said(self, token: int) -> None:
        if self._lookup is not None:
            self._lookup.push(token)
        self._left = None if self._left is None else self._left - 1
        self.going = self._left != 0 and not (self._constraint is not None and self._constraint.done)
