"""Log-probabilities of the tokens of one answer: the model's own, before a grammar, the temperature and the filters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zsmerge_llm.language.grammar import Constraint
from zsmerge_llm.types import TokenLogprob

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class LogprobRecorder:
    """A `Constraint` that records the log-probability of each token of an answer, and applies another one.

    Every token is sampled, also where the other constraint would force it: else it would have no log-probability.

    Args:
        constraint: what the answer may be; None: anything.
        num_top: how many of the likeliest tokens are recorded at each place.
    """

    def __init__(self, constraint: Constraint | None, tokenizer: PreTrainedTokenizerBase, num_top: int) -> None:
        self._constraint = constraint
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._logits: Tensor | None = None
        self._last = TokenLogprob("", 0.0)

    @property
    def ended(self) -> bool:
        """Whether the other constraint has accepted the end token."""
        return self._constraint is not None and self._constraint.ended

    @property
    def done(self) -> bool:
        """Whether nothing (more) can follow."""
        return self._constraint is not None and self._constraint.done

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._constraint is None or self._constraint.complete

    @property
    def shortened(self) -> bool:
        """Whether a token was replaced so that the answer completes in time."""
        return self._constraint is not None and self._constraint.shortened

    @property
    def completes(self) -> bool:
        """Whether the answer will be complete, as far as its tokens go."""
        return self._constraint is None or self._constraint.completes

    def mask(self, logits: Tensor) -> Tensor:
        """Return logits float32 [vocab] as the other constraint does, and remember these."""
        self._logits = logits
        return logits if self._constraint is None else self._constraint.mask(logits)

    def accept(self, token: int) -> int:
        """Accept a token as the other constraint does, and record it."""
        token = token if self._constraint is None else self._constraint.accept(token)
        assert self._logits is not None
        logprobs = self._logits.log_softmax(-1)
        values, ids = logprobs.topk(self._num_top)
        top = zip(ids.tolist(), values.tolist(), strict=True)
        likeliest = tuple(TokenLogprob(self._text(each), value) for each, value in top)
        self._last = TokenLogprob(self._text(token), float(logprobs[token]), likeliest)
        return token

    def forced(self) -> list[int]:
        """Return no tokens."""
        return []

    def take(self) -> TokenLogprob:
        """Return the token that was accepted last."""
        return self._last

    def _text(self, token: int) -> str:
        """Return the text of a token behind another one, so that it has its space."""
        once, twice = (self._tokenizer.decode([token] * times) for times in (1, 2))
        return str(twice[len(once) :])
