"""A tiny model that says what a test wants, as far as grammars let it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from zsmerge_llm import LLM


@contextmanager
def saying(llm: LLM, *answers: str) -> Iterator[None]:
    """The model says these, one after the other and then from the first one on; each row of a batch says its own."""
    told = iter(range(10**6))

    class Script:
        greedy = False  # nobody may draw ahead

        def __init__(self, *_: Any) -> None:
            self.say(answers[next(told) % len(answers)])

        def say(self, text: str) -> None:
            self.left = [*llm.tokenizer.encode(text, add_special_tokens=False), llm.tokenizer.eos_token_id]

        def __call__(self, logits: torch.Tensor) -> torch.Tensor:
            return torch.tensor(self.left[0])

        def accept(self, token: int) -> None:
            if token == self.left[0]:
                self.left.pop(0)
                return
            text, piece = llm.tokenizer.decode(self.left[:-1]), llm.tokenizer.decode([token])
            assert text.startswith(piece), "a grammar wants it otherwise"
            self.say(text[len(piece) :])  # the same text in other tokens

    with mock.patch("zsmerge_llm.engine.engine.Sampler", Script):
        yield
