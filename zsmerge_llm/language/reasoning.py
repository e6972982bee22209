"""What reasoning models think before they answer, `<think>...</think>`: kept apart from it, and left free by forms.

A form (grammar, tools, response format) holds for what comes behind the thought. Thinking may take half of the tokens
that an answer may have; then it is ended, so that the answer still comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from zsmerge_llm.language.grammar import Constraint

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.language.completion import CompletionPlanner

OPEN, CLOSE = "<think>", "</think>"
BREAK = "\n\n"
"""What models write between thought and answer."""
LEAST = 32
"""Tokens below which no thought is worth beginning."""

ReasoningMode = Literal["never", "may", "begun"]
"""Whether a model thinks in an answer; `begun`: the prompt has opened the thought already."""


def thinking(template: str, header: str) -> ReasoningMode:
    """How a model thinks, by its chat template's Jinja text and what that writes to begin an answer.

    One that writes the thought itself, empty (`enable_thinking=False`), lets its model answer at once.
    """
    if CLOSE not in template:
        return "never"
    if header.rstrip().endswith(OPEN):
        return "begun"
    return "never" if header.rstrip().endswith(CLOSE) else "may"


class ReasoningParser:
    """Takes an answer as it comes apart into the thought at its very beginning and what is said.

    Args:
        begun: the answer begins within the thought.
    """

    def __init__(self, begun: bool) -> None:
        self._part: Literal["beginning", "thought", "gap", "text"] = "thought" if begun else "beginning"
        self._held = ""
        self._thought = False  # whether any of it was handed on

    @property
    def open(self) -> bool:
        """Whether what comes next may belong to the thought."""
        return self._part in ("beginning", "thought")

    @property
    def inside(self) -> bool:
        """Whether the thought has begun and not ended."""
        return self._part == "thought"

    def push(self, piece: str) -> tuple[str, str]:
        """More of the answer; what of it belongs to the thought, and what is said. White space between them goes."""
        if self._part == "text":
            return "", piece
        self._held += piece
        if self._part == "beginning":
            self._begin()
        thought = self._think() if self._part == "thought" else ""
        if self._part == "gap":
            self._held = self._held.lstrip()
            self._part = "text" if self._held else "gap"
        if self._part != "text":
            return thought, ""
        text, self._held = self._held, ""
        return thought, text

    def finish(self) -> tuple[str, str]:
        """What was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return (self._outer(held.rstrip()), "") if self._part == "thought" else ("", held)

    def _begin(self) -> None:
        """Decide whether the answer begins with a thought, as soon as that is known."""
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._part, self._held = "thought", start[len(OPEN) :]
        elif not OPEN.startswith(start):
            self._part = "text"

    def _think(self) -> str:
        before, closed, after = self._held.partition(CLOSE)
        if closed:
            self._part, self._held = "gap", after
            return self._outer(before.rstrip())
        end = next((at for at in range(len(before)) if CLOSE.startswith(before[at:])), len(before))
        shown = before[:end].rstrip()
        self._held = before[len(shown) :]
        return self._outer(shown)

    def _outer(self, text: str) -> str:
        text = text if self._thought else text.lstrip()
        self._thought = self._thought or bool(text)
        return text


class ReasoningConstraint(Constraint):
    """A constraint on what comes behind the thought, which itself is free.

    Args:
        tokenizer: a transformers tokenizer.
        begun: the answer begins within the thought. Else the model may begin one, if it has a token for that.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        closing: CompletionPlanner,
        end: int,
        max_tokens: int | None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        begun: bool,
    ) -> None:
        super().__init__(matcher, closing, end, max_tokens)
        self._tokenizer = tokenizer
        self._inside = begun
        self._thought: list[int] = []
        self._due: list[int] = []  # tokens that must come, one by one
        self._budget = max_tokens
        if max_tokens is not None:
            self._budget = max(0, min(max_tokens // 2, max_tokens - len(self._plan or ())))
        roomy = self._budget is None or self._budget >= LEAST
        self._open = own_token(tokenizer, OPEN) if roomy and not begun else None

    @property
    def done(self) -> bool:
        return not self._thinking and super().done

    @property
    def complete(self) -> bool:
        return not self._thinking and super().complete

    @property
    def _thinking(self) -> bool:
        return self._inside or bool(self._due)

    def mask(self, logits: Tensor) -> Tensor:
        """float32[vocab] with -inf for tokens that cannot come next."""
        if self._due:
            return _only(logits, self._due[0])
        if self._inside:
            return self._closing.without_ends(logits)
        masked = super().mask(logits)
        if self._open is not None:
            masked[self._open] = logits[self._open]
        return masked

    def accept(self, token: int) -> int:
        """Take the token that was drawn, or another one where the thought or the answer has to end."""
        if not self._thinking and token != self._open:
            self._open = None
            return super().accept(token)
        if self._due:
            token = self._due.pop(0)
        elif self._inside:
            token = self._think(token)
        else:
            self._inside, self._open = True, None
        self._count()
        return token

    def forced(self) -> list[int]:
        """Tokens that must come next whatever the model says; taken already."""
        left = len(self._due) if self._left is None else self._left
        tokens, self._due = self._due[:left], self._due[left:]
        for _ in tokens:
            self._count()
        return tokens if self._thinking else [*tokens, *super().forced()]

    def _think(self, token: int) -> int:
        """The next token of the thought; the first one of its end where it has used up its tokens."""
        end = _ids(self._tokenizer, CLOSE + BREAK)
        if self._budget is not None and len(self._thought) + len(end) >= self._budget:
            self._inside, self._due = False, end[1:]
            return end[0]
        self._thought.append(token)
        if CLOSE in self._tokenizer.decode(self._thought[-len(CLOSE) :]):
            self._inside, self._due = False, _ids(self._tokenizer, BREAK)
        return token

    def _count(self) -> None:
        if self._left is not None:
            self._left -= 1


def own_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The token of its own that a text has, if any."""
    return next((index for index, token in tokenizer.added_tokens_decoder.items() if token.content == text), None)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _only(logits: Tensor, token: int) -> Tensor:
    import torch

    return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([token], device=logits.device), 0.0)
