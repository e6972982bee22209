"""Texts of sentences that questions can be made of."""

from __future__ import annotations

STORY = (
    "The harbour of Cape Amber was built in 1810 by Jonas Stone. "
    "A storm from the north took the old lighthouse away, and only its bell was found. "
)
