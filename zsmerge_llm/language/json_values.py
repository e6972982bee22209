"""Check values that must be JSON, such as tools and schemas, before anything works on them. Imports nothing heavy."""

from __future__ import annotations

import json
from typing import Any

from zsmerge_llm.errors import InputError

MAX_DEPTH = 100
"""Levels of nested lists and objects. What works on a schema is recursive."""
MAX_SCHEMA = 100_000
"""Characters of a response format. Models are shown the whole schema."""
MAX_TOOLS = 400_000
"""Characters of all tools of a request together."""


def plain_json(value: Any, where: str, max_chars: int) -> Any:
    """Return a copy of a value that holds nothing but JSON.

    Args:
        where: what the value is called in errors.
        max_chars: how long its JSON text may be.

    Raises:
        InputError: something in it is no JSON (NaN included), or no valid Unicode; too long or too deep.
    """
    try:
        if is_deep(value):
            raise InputError(f"{where} has more than {MAX_DEPTH} levels: make it flatter.")
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} must hold JSON values only ({error}).") from error
    if len(text) > max_chars:
        raise InputError(
            f"{where} has {len(text):,} characters and at most {max_chars:,} are read: leave out what is not needed."
        )
    return json.loads(text)


def is_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Return whether lists and objects are nested in more than so many levels."""
    if not isinstance(value, (dict, list, tuple)):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deep(child, levels - 1) for child in children)
