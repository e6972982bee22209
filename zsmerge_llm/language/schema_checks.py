"""Refuse JSON schemas that cannot be enforced, before anything is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from zsmerge_llm.errors import InputError, UnsupportedSchemaError, shown
from zsmerge_llm.language.grammar import json_rule
from zsmerge_llm.language.json_schema import compiles, patterns_of, resolve, rule_error


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
