"""What a saved session belongs to, and where in a conversation it may end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["prefix", "branch", "prompt", "answer", "document"]
"""Where a snapshot ends; see `Snapshot.kind`."""


@dataclass(frozen=True)
class Fingerprint:
    """What a saved cache belongs to: digests, and the cache configuration as JSON (`cache`)."""

    weights: str
    tokenizer: str
    template: str
    cache: str
