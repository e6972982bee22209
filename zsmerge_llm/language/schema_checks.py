"""Refuse JSON schemas that cannot be enforced, before anything is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from zsmerge_llm.errors import InputError, UnsupportedSchemaError, shown
from zsmerge_llm.language.grammar import json_rule
from zsmerge_llm.language.json_schema import compiles, patterns_of, resolve, rule_error

MAX_SHORTEST = 100_000
"""Characters of a schema's shortest value. Each character that a grammar forces takes some 250 bytes of memory."""


def check_strict(schema: Mapping[str, Any], where: str) -> None:
    """Refuse a schema with a keyword that cannot be enforced while decoding. `where`: what errors call the schema.

    Raises:
        UnsupportedSchemaError: names the keyword.
    """
    if pattern := next((each for each in patterns_of(schema) if not compiles(each)), None):
        keyword = f"pattern {shown(pattern)}"
    else:
        problem = rule_error(json_rule(schema))
        keys, named = re.search(r"Unimplemented keys: \[(.*?)\]", problem), re.search(r"Unknown format: (\S+)", problem)
        if not keys and not named:
            return  # another problem, which compiling reports
        keyword = keys[1].replace('"', "") if keys else f"format {named[1]!r}" if named else ""
    raise UnsupportedSchemaError(
        f"{where} is strict and its keyword {keyword} cannot be enforced while decoding. Leave the keyword out, or "
        "pass strict=False: then it is checked when the answer is complete."
    )


def check_schema(schema: Mapping[str, Any], where: str) -> None:
    """Refuse a schema that a grammar cannot be made of. `where`: what errors call it.

    Raises:
        InputError: says what is wrong with it.
    """
    if problem := rule_error(json_rule(schema, lenient=True)):
        first = problem.split(" 1 | ")[0].split("failed to compile JSON schema:")[-1].strip(": ")
        raise InputError(f"{where} cannot be enforced: {first[:300]} Correct the schema.")
    if not _is_finite(schema, schema, ()):
        raise InputError(
            f"{where} has no finite value: something in it always contains itself. Make that property optional, let it "
            "be null, or allow its list to be empty."
        )
    lengths = _ShortestValues(schema)
    lengths.of(schema)
    if lengths.most > MAX_SHORTEST:
        raise InputError(
            f"{where} has a part whose shortest value has {lengths.most:,} characters; at most {MAX_SHORTEST:,} can be "
            "enforced. Lower its minItems or minLength, or shorten its names and constants."
        )


class _ShortestValues:
    """Characters that values of a schema and of its parts have at least.

    Attributes:
        most: of any part, also one that a value may leave out: a model may choose it.
    """

    def __init__(self, root: Any) -> None:
        self.most = 0
        self._root = root
        self._references: dict[str, int] = {}

    def of(self, schema: Any) -> int:
        """Return how many characters a value of a schema has at least, as JSON."""
        if not isinstance(schema, Mapping):
            return 1
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference.startswith("#"):
            if reference not in self._references:
                self._references[reference] = 1  # what contains itself counts once
                self._references[reference] = self.of(resolve(schema, self._root))
            return self._references[reference]
        sizes = [self._text(schema), self._array(schema), self._object(schema)]
        kinds = {"string": sizes[0], "array": sizes[1], "object": sizes[2]}
        size = kinds.get(str(schema.get("type")), 1)
        constants = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(constants, list) and constants:
            size = max(size, min(len(json.dumps(each, ensure_ascii=False)) for each in constants))
        for key, choose in (("anyOf", min), ("oneOf", min), ("allOf", max)):
            if isinstance(parts := schema.get(key), list) and parts:
                size = max(size, choose([self.of(part) for part in parts]))
        self.most = max(self.most, size, *sizes)
        return size

    def _text(self, schema: Mapping[str, Any]) -> int:
        pattern = schema.get("pattern")
        repeated = map(int, re.findall(r"\{(\d{1,9})", pattern)) if isinstance(pattern, str) else ()
        return 2 + max(_count(schema, "minLength"), max(repeated, default=0))

    def _array(self, schema: Mapping[str, Any]) -> int:
        count, first = _count(schema, "minItems"), schema.get("prefixItems")
        prefix = [self.of(part) + 2 for part in (first if isinstance(first, list) else [])]
        item = self.of(schema.get("items")) + 2
        return 2 + sum(prefix[:count]) + max(0, count - len(prefix)) * item

    def _object(self, schema: Mapping[str, Any]) -> int:
        named, required = schema.get("properties"), schema.get("required")
        sizes = {name: self.of(part) for name, part in named.items()} if isinstance(named, Mapping) else {}
        self.of(schema.get("additionalProperties"))
        names = map(str, required if isinstance(required, list) else ())
        return 2 + sum(len(name) + 6 + sizes.get(name, 1) for name in names)


def _count(schema: Mapping[str, Any], key: str) -> int:
    """Return a keyword that is a number, and 0 for none."""
    value = schema.get(key)
    return int(value) if isinstance(value, (int, float)) else 0


def _is_finite(schema: Any, root: Any, entered: tuple[str, ...]) -> bool:
    """Return whether a schema has a value that ends. `entered`: the references that lead here."""
    if not isinstance(schema, Mapping):
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        target = resolve(schema, root)
        if reference in entered or not _is_finite(target, root, (*entered, reference)):
            return False
    for options in (schema.get("anyOf"), schema.get("oneOf")):
        if isinstance(options, list) and not any(_is_finite(option, root, entered) for option in options):
            return False
    needed = list(schema["allOf"]) if isinstance(schema.get("allOf"), list) else []
    kinds = schema.get("type")
    if kinds == "object" and isinstance(properties := schema.get("properties"), Mapping):
        needed += [properties.get(name) for name in schema.get("required") or ()]
    if kinds == "array" and schema.get("minItems"):
        prefix = schema.get("prefixItems") or []
        needed += [*prefix[: schema["minItems"]], *([schema.get("items")] if schema["minItems"] > len(prefix) else [])]
    return all(_is_finite(part, root, entered) for part in needed)
