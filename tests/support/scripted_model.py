"""Scripted answers: the model generates the texts that a test gives, as far as grammars allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from zsmerge_llm import LLM


@contextmanager
def scripted_answers(llm: LLM, *answers: str) -> Iterator[None]:
    """Let the model generate these answers in turn, over and over; each row of a batch takes the next."""
    requests = iter(range(10**6))

    class Script:
        greedy = False  # nothing may be sampled ahead

        def __init__(self, *_: Any) -> None:
            self.set_text(answers[next(requests) % len(answers)])

        def set_text(self, text: str) -> None:
            self.remaining = [*llm.tokenizer.encode(text, add_special_tokens=False), llm.tokenizer.eos_token_id]

        def __call__(self, logits: torch.Tensor) -> torch.Tensor:
            return torch.tensor((self.remaining or [llm.tokenizer.eos_token_id])[0])  # rows that have ended go on

        def accept(self, token: int) -> None:
            if token == self.remaining[0]:
                self.remaining.pop(0)
                return
            text, piece = llm.tokenizer.decode(self.remaining[:-1]), llm.tokenizer.decode([token])
            assert text.startswith(piece), "the grammar does not allow this answer"
            self.set_text(text[len(piece) :])  # the same text in other tokens

    with mock.patch("zsmerge_llm.engine.engine.Sampler", Script):
        yield
