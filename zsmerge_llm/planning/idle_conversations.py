"""How much of a device's memory idle conversations may take, and how many that are."""

from __future__ import annotations

from zsmerge_llm.engine.model_runner import STEP_TOKENS
from zsmerge_llm.sessions.tiers import OVERSHOOT_CACHES

TURN_COPIES = 2
"""Caches that a turn holds beside the stored conversation: the copy it works on, and the snapshot of its prompt."""
STATIC_COPIES = 2
"""Caches in fixed memory on a device that captures graphs: a row that decodes, and one that long texts are read in."""
ACTIVE_CONVERSATIONS = 8
"""Conversations that are answered at once, for which memory is kept free."""


def pending_nbytes(states_nbytes: int, rows: int) -> int:
    """Return the bytes of recurrent states behind the pending tokens of rows that decode in fixed memory.

    See `StaticState`: each row has one beside that which counts, and one row one for each further token of a draft.
    """
    return (rows + STEP_TOKENS - 1) * states_nbytes


def idle_nbytes(available: int, workspace: int, cache_nbytes: int, states_nbytes: int) -> int:
    """Return the bytes of a device that idle conversations may take.

    Args:
        available: what is free beside weights and runtime.
        workspace: the peak of a forward pass above weights and caches.
        cache_nbytes: one conversation's cache. states_nbytes: the recurrent states in it.
    """
    active = ACTIVE_CONVERSATIONS * (TURN_COPIES + STATIC_COPIES)
    pending = pending_nbytes(states_nbytes, ACTIVE_CONVERSATIONS)
    return max(0, available - workspace - pending - (active + OVERSHOOT_CACHES) * cache_nbytes)
