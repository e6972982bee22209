"""The reasoning that a model writes before its answer, `<think>...</think>`: split off, and exempt from grammars.

A grammar, tools or a response format apply to what follows the reasoning. Reasoning may take half of `max_tokens`; then
it is closed, so that the answer still comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.language.grammar import GrammarConstraint

OPEN, CLOSE = "<think>", "</think>"
BREAK = "\n\n"
"""What models write between reasoning and answer."""
MIN_REASONING_TOKENS = 32
"""With a smaller budget, reasoning is not begun."""

ReasoningMode = Literal["off", "optional", "open"]
"""Whether a model reasons before it answers. `open`: the prompt has opened the reasoning already."""


class AnswerPiece(NamedTuple):
    """A piece of an answer: its reasoning and its text, either of them often ""."""

    reasoning: str
    text: str


def reasoning_mode(template_source: str, generation_prompt: str) -> ReasoningMode:
    """Return how a model reasons.

    Args:
        template_source: Jinja text of its chat template.
        generation_prompt: what the template writes to begin an answer. A template that writes empty reasoning there
            (`enable_thinking=False`) has the model answer at once.
    """
    if CLOSE not in template_source:
        return "off"
    if generation_prompt.rstrip().endswith(OPEN):
        return "open"
    return "off" if generation_prompt.rstrip().endswith(CLOSE) else "optional"


class ReasoningParser:
    """Split an answer, as it arrives, into the reasoning at its very beginning and the text. Spaces between them go.

    Args:
        is_open: whether the answer begins within the reasoning.
    """

    def __init__(self, is_open: bool) -> None:
        self._part: Literal["undecided", "reasoning", "gap", "text"] = "reasoning" if is_open else "undecided"
        self._held = ""
        self._emitted = False  # whether any reasoning was returned: spaces before that are dropped

    @property
    def is_inside(self) -> bool:
        """Whether the reasoning has begun and not ended."""
        return self._part == "reasoning"

    @property
    def is_before_text(self) -> bool:
        """Whether all of the answer so far is reasoning and the spaces behind it."""
        return self._part in ("reasoning", "gap")

    def push(self, piece: str) -> AnswerPiece:
        """Add a piece of the answer; return what of it is certain."""
        if self._part == "text":
            return AnswerPiece("", piece)
        self._held += piece
        if self._part == "undecided":
            self._decide()
        reasoning = self._split_reasoning() if self._part == "reasoning" else ""
        if self._part == "gap":
            self._held = self._held.lstrip()
            self._part = "text" if self._held else "gap"
        if self._part != "text":
            return AnswerPiece(reasoning, "")
        text, self._held = self._held, ""
        return AnswerPiece(reasoning, text)

    def finish(self) -> AnswerPiece:
        """Return what was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return AnswerPiece(self._trimmed(held.rstrip()), "") if self._part == "reasoning" else AnswerPiece("", held)

    def _decide(self) -> None:
        """Find out whether the answer begins with reasoning, as soon as that is known."""
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._part, self._held = "reasoning", start[len(OPEN) :]
        elif not OPEN.startswith(start):
            self._part = "text"

    def _split_reasoning(self) -> str:
        before, closed, after = self._held.partition(CLOSE)
        if closed:
            self._part, self._held = "gap", after
            return self._trimmed(before.rstrip())
        end = next((at for at in range(len(before)) if CLOSE.startswith(before[at:])), len(before))
        certain = before[:end].rstrip()
        self._held = before[len(certain) :]
        return self._trimmed(certain)

    def _trimmed(self, text: str) -> str:
        text = text if self._emitted else text.lstrip()
        self._emitted = self._emitted or bool(text)
        return text


class ReasoningConstraint:
    """A `Constraint` that leaves the reasoning free and applies another one to the answer behind it.

    Args:
        answer: the constraint on the answer; reasoning is taken from its token budget.
        tokenizer: a transformers tokenizer.
        is_open: whether the answer begins within the reasoning. Else the model may begin it, if `<think>` is a token.
        given: ids of whole reasoning that the answer begins with; (): the model writes it.
    """

    def __init__(
        self,
        answer: GrammarConstraint,
        tokenizer: PreTrainedTokenizerBase,
        is_open: bool,
        given: Sequence[int] = (),
    ) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._is_inside = is_open and not given
        self._tokens: list[int] = []
        self._break_ids, self._close_ids = (_encode(tokenizer, text) for text in (BREAK, CLOSE + BREAK))
        self._pending = list(given)  # ids that must come next, one by one
        limit = answer.tokens_left
        # At most half of all tokens, and none of those that the known way to complete the answer needs.
        self._budget = None if limit is None else max(0, min(limit // 2, limit - answer.planned_tokens))
        may_open = not (is_open or given) and (self._budget is None or self._budget >= MIN_REASONING_TOKENS)
        self._open_id = added_token_id(tokenizer, OPEN) if may_open else None

    @property
    def ended(self) -> bool:
        return self._answer.ended

    @property
    def shortened(self) -> bool:
        return self._answer.shortened

    @property
    def completes(self) -> bool:
        return self._answer.completes

    @property
    def done(self) -> bool:
        return not self._is_reasoning and self._answer.done

    @property
    def complete(self) -> bool:
        return not self._is_reasoning and self._answer.complete

    @property
    def _is_reasoning(self) -> bool:
        return self._is_inside or bool(self._pending)

    def mask(self, logits: Tensor) -> Tensor:
        if self._pending:
            return _only(logits, self._pending[0])
        if self._is_inside:
            return self._answer.mask_stop_tokens(logits)
        masked = self._answer.mask(logits)
        if self._open_id is not None:
            masked[self._open_id] = logits[self._open_id]
        return masked

    def accept(self, token: int) -> int:
        if not self._is_reasoning and token != self._open_id:
            self._open_id = None
            return self._answer.accept(token)
        if self._pending:
            token = self._pending.pop(0)
        elif self._is_inside:
            token = self._accept_inside(token)
        else:
            self._is_inside, self._open_id = True, None
        self._answer.spend(1)
        return token

    def forced(self) -> list[int]:
        left = len(self._pending) if self._answer.tokens_left is None else self._answer.tokens_left
        tokens, self._pending = self._pending[:left], self._pending[left:]
        self._answer.spend(len(tokens))
        return tokens if self._is_reasoning else [*tokens, *self._answer.forced()]

    def _accept_inside(self, token: int) -> int:
        """Return the next token of the reasoning, or the first one of its end where the budget is used up."""
        if self._budget is not None and len(self._tokens) + len(self._close_ids) >= self._budget:
            self._is_inside, self._pending = False, self._close_ids[1:]
            return self._close_ids[0]
        self._tokens.append(token)
        # A token has at least one character of CLOSE, so as many tokens as CLOSE has characters hold all of it.
        if CLOSE in self._tokenizer.decode(self._tokens[-len(CLOSE) :]):
            self._is_inside, self._pending = False, list(self._break_ids)
        return token


def added_token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """Return the id of the added token that spells exactly `text`, if there is one."""
    return next((index for index, token in tokenizer.added_tokens_decoder.items() if token.content == text), None)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _only(logits: Tensor, token: int) -> Tensor:
    import torch

    return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([token], device=logits.device), 0.0)
