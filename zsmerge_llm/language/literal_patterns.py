"""JSON schemas in which no pattern of property names is searched: by the names of one value, which are known.

`patternProperties` is looked at by several keywords, and jsonschema searches its patterns by `re`, which has no time
limit: schemas come from others, and a search can take years.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

MATCH_SECONDS = 1.0
"""Longest search for one pattern in one text."""
NAMED_SCHEMAS = ("properties", "$defs", "definitions", "dependentSchemas", "dependencies")
"""Keywords whose value maps names to schemas."""
DATA = ("const", "enum", "default", "examples", "required", "dependentRequired")
"""Keywords whose value holds no schemas."""


def has_match(pattern: str, text: str) -> bool:
    """Return whether a pattern matches somewhere in a text. Raises TimeoutError, and `regex.error` for no pattern."""
    import regex

    return regex.search(pattern, text, timeout=MATCH_SECONDS) is not None


class LiteralPatterns:
    """Replaces each pattern of property names in a schema by one that lists those names of a value which it matches.

    Raises:
        TimeoutError: a pattern takes too long. regex.error: one is no pattern.
    """

    def __init__(self, schema: Any, value: Any) -> None:
        self._names = sorted(set(_property_names(value)))
        self._given: dict[str, str] = {}
        self._numbers = count()
        self.schema = self._replaced(schema)

    def original(self, message: str) -> str:
        """Return a message about the replaced schema as one about the given schema."""
        for literal, pattern in self._given.items():
            message = message.replace(repr(literal), repr(pattern))
        return message

    def _replaced(self, schema: Any) -> Any:
        if isinstance(schema, list):
            return [self._replaced(part) for part in schema]
        if not isinstance(schema, Mapping):
            return schema
        changed = {}
        for key, value in schema.items():
            if key == "patternProperties" and isinstance(value, Mapping):
                changed[key] = {self._literal(pattern): self._replaced(part) for pattern, part in value.items()}
            elif key in NAMED_SCHEMAS and isinstance(value, Mapping):
                changed[key] = {name: self._replaced(part) for name, part in value.items()}
            else:
                changed[key] = value if key in DATA else self._replaced(value)
        return changed

    def _literal(self, pattern: str) -> str:
        """Return a pattern of those names that a pattern matches; another one for each."""
        names = "|".join(re.escape(name) for name in self._names if has_match(pattern, name))
        literal = rf"\A(?:{names or '(?!)'})\Z(?#{next(self._numbers)})"
        self._given[literal] = pattern
        return literal


def _property_names(value: Any) -> Iterator[str]:
    """Yield the names of the properties of all objects in a JSON value."""
    if isinstance(value, Mapping):
        yield from value
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _property_names(part)
