"""The reasoning that a model writes before its answer, `<think>...</think>`: split off, and exempt from grammars.

How families mark it is in `reasoning_tags`.

A grammar, tools or a response format apply to what follows the reasoning. Reasoning may take half of `max_tokens`; then
it is closed, so that the answer still comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from zsmerge_llm.language.reasoning_tags import HARMONY, THINK, ReasoningTags

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.language.grammar import GrammarConstraint

BREAK = "\n\n"
"""What models write between reasoning and answer."""
NEXT_MESSAGE = "<|start|>assistant"
"""The same in Harmony."""
MIN_REASONING_TOKENS = 32
"""With a smaller budget, reasoning is not begun."""


class AnswerPiece(NamedTuple):
    """A piece of an answer: its reasoning and its text, either of them often ""."""

    reasoning: str
    text: str


class ReasoningParser:
    """Split an answer, as it arrives, into the reasoning at its very beginning and the text. Spaces between them go.

    Tags around the text go, too.

    Args:
        is_open: whether the answer begins within the reasoning.
        tags: how the family marks both.
    """

    def __init__(self, is_open: bool, tags: ReasoningTags = THINK) -> None:
        self._tags = tags
        self._part: Literal["undecided", "reasoning", "gap", "text", "ended"] = "undecided"
        if is_open:
            self._part = "reasoning"
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
        self._held += "" if self._part == "ended" else piece
        if self._part == "undecided":
            self._decide()
        reasoning = self._split_reasoning() if self._part == "reasoning" else ""
        if self._part == "gap":
            self._enter_text()
        if self._part != "text":
            return AnswerPiece(reasoning, "")
        return AnswerPiece(reasoning, self._take_text())

    def finish(self) -> AnswerPiece:
        """Return what was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self._part == "reasoning":
            return AnswerPiece(self._trimmed(held.rstrip()), "")
        return AnswerPiece("", held)

    def _decide(self) -> None:
        """Find out whether the answer begins with reasoning, as soon as that is known."""
        start = self._held.lstrip()
        if start.startswith(self._tags.open):
            self._part, self._held = "reasoning", start[len(self._tags.open) :]
        elif self._tags.answer_open and start.startswith(self._tags.answer_open):
            self._part = "gap"
        elif not any(tag.startswith(start) for tag in (self._tags.open, self._tags.answer_open) if tag):
            self._part = "text"

    def _split_reasoning(self) -> str:
        before, closed, after = self._held.partition(self._tags.close)
        if closed:
            self._part, self._held = "gap", after
            return self._trimmed(before.rstrip())
        certain = before[: len(before) - held_back(before, self._tags.close)].rstrip()
        self._held = before[len(certain) :]
        return self._trimmed(certain)

    def _enter_text(self) -> None:
        """Go over to the text once it has begun: behind spaces, and behind its own tag where there is one."""
        self._held, tag = self._held.lstrip(), self._tags.answer_open
        if tag and self._held.startswith(tag):
            self._held = self._held.removeprefix(tag).lstrip()
            self._part = "text"
        elif self._held and not tag.startswith(self._held):
            self._part = "text"

    def _take_text(self) -> str:
        """Return the text, but for what may become the tag at its end. Nothing behind that is returned."""
        tag = self._tags.answer_close
        if not tag:
            text, self._held = self._held, ""
            return text
        before, closed, _ = self._held.partition(tag)
        if closed:
            self._part, self._held = "ended", ""
            return before.rstrip()
        certain = before[: len(before) - held_back(before, tag)].rstrip()
        self._held = before[len(certain) :]
        return certain

    def _trimmed(self, text: str) -> str:
        text = text if self._emitted else text.lstrip()
        self._emitted = self._emitted or bool(text)
        return text


class ReasoningConstraint:
    """A `Constraint` that leaves the reasoning free and applies another one to the answer behind it.

    Args:
        answer: the constraint on the answer; reasoning is taken from its token budget.
        tokenizer: a transformers tokenizer.
        is_open: whether the answer begins within the reasoning. Else the model may begin it, where no answer begins
            like its tag.
        given: ids of whole reasoning that the answer begins with; (): the model writes it.
        tags: how the family marks reasoning.
        has_header: whether the answer's grammar begins with the header of its message (Harmony only).
    """

    def __init__(
        self,
        answer: GrammarConstraint,
        tokenizer: PreTrainedTokenizerBase,
        is_open: bool,
        given: Sequence[int] = (),
        tags: ReasoningTags = THINK,
        has_header: bool = False,
    ) -> None:
        self._answer = answer
        self._tokenizer = tokenizer
        self._tags = tags
        self._is_inside = is_open and not given
        self._tokens: list[int] = []
        header = "" if has_header else tags.answer_open
        behind = text_behind(tags) + header
        self._break_ids, self._close_ids = (_encode(tokenizer, text) for text in (behind, tags.close + behind))
        self._pending = list(given)  # ids that must come next, one by one
        limit = answer.tokens_left
        # At most half of all tokens, and none of those that the known way to complete the answer needs.
        self._budget = None if limit is None else max(0, min(limit // 2, limit - answer.planned_tokens))
        may_open = not (is_open or given) and (self._budget is None or self._budget >= MIN_REASONING_TOKENS)
        self._open_ids = _encode(tokenizer, tags.open) if may_open else []
        if tags is HARMONY and given:
            self._pending += self._break_ids
        elif tags is HARMONY and not is_open:  # it always reasons first
            self._is_inside, self._open_ids = may_open, []
            self._pending = _encode(tokenizer, tags.open if may_open else header)
        self._opens = len(self._open_ids) == 1  # whether the first of them would begin the reasoning now

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
        if self._open_ids:
            first, *others = self._open_ids
            self._opens = not others or bool(masked[first].isneginf())
            if self._opens:
                masked[first] = logits[first]
        return masked

    def accept(self, token: int) -> int:
        if not self._is_reasoning and not (self._opens and token == self._open_ids[0]):
            self._open_ids, self._opens = [], False
            return self._answer.accept(token)
        if self._pending:
            token = self._pending.pop(0)
        elif self._is_inside:
            token = self._accept_inside(token)
        else:
            self._pending, self._open_ids = self._open_ids[1:], []
            self._is_inside, self._opens = True, False
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
        # A token has at least one byte of the tag, so as many tokens as it has bytes hold all of it.
        close = self._tags.close
        if close in self._tokenizer.decode(self._tokens[-len(close.encode()) :]):
            self._is_inside, self._pending = False, list(self._break_ids)
        return token


def text_behind(tags: ReasoningTags) -> str:
    """Return what a family writes between reasoning and the tag of its answer."""
    return NEXT_MESSAGE if tags is HARMONY else BREAK


def held_back(text: str, tag: str) -> int:
    """Return how many characters at the end of a text may become a tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _only(logits: Tensor, token: int) -> Tensor:
    import torch

    return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([token], device=logits.device), 0.0)
