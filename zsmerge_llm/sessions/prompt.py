"""A prompt that is read from its beginning, on a cache of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.retrieval.passage_search import INTRODUCTION


@dataclass(frozen=True)
class Prompt:
    """The ids of a prompt, and what its cache needs to know.

    Attributes:
        config: of its cache.
        probe: ids whose attention decides what is kept, as for `Engine.read`.
        multi_turn: whether there was an answer before, as for `Engine.read`.
        system_tokens: how many of the first ids are the system message and the tools.
        retrieved_tokens: how many of the ids repeat what was said before.
    """

    ids: Sequence[int]
    config: CacheConfig
    probe: Sequence[int]
    multi_turn: bool = False
    system_tokens: int = 0
    retrieved_tokens: int = 0

    @property
    def added_texts(self) -> tuple[str, ...]:
        """What was put before passages that are read again, if there are any."""
        return (INTRODUCTION,) * bool(self.retrieved_tokens)
