"""JSON schemas: what of one can be enforced while decoding, and whether a complete answer is valid under it.

A grammar knows most keywords. Others, such as `uniqueItems`, and patterns with look-around or back references are left
out while decoding and checked afterwards by jsonschema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from zsmerge_llm.errors import InputError
from zsmerge_llm.language.literal_patterns import LiteralPatterns, has_match

SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
"""Keywords whose value maps names to schemas."""
SCHEMA_LISTS = ("anyOf", "allOf", "oneOf", "prefixItems", "items")
"""Keywords whose value may be a list of schemas."""
SCHEMAS = ("items", "additionalProperties", "propertyNames", "contains", "not", "if", "then", "else")
"""Keywords whose value is a schema."""
FORMAT_PATTERNS = {"base64": "^([A-Za-z0-9+/]{4})*$", "base64url": "^([A-Za-z0-9_-]{4})*$"}
"""Patterns for formats that a grammar does not know."""
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
LARGEST_BOUND = 10**17
"""Larger bounds cannot be enforced, such as those of 64-bit integers."""
LEAST_NUMBER = -92 * 10**17
"""On integers next to -2**63 llguidance calls itself until its stack overflows, which ends the process."""
LOOK_AROUND = re.compile(r"\(\?<?[=!]")
SIGN_AND_DIGITS = "(?!^[-+.]*$)[+-]?0*"
"""How pydantic begins the pattern of a Decimal: anything that has a digit."""


def schema_text(schema: Mapping[str, Any]) -> str:
    """Return a schema as the model is shown it: without its title, which small models give as the answer."""
    return json.dumps({key: value for key, value in schema.items() if key != "title"}, ensure_ascii=False)


def enforceable(schema: Any, root: Any = None) -> Any:
    """Return a schema without what no grammar can enforce. What is valid under the given one is valid under it, except
    that a Decimal written as text has a digit before its point."""
    root = schema if root is None else root
    if not isinstance(schema, Mapping):
        return schema
    changed = dict(schema)
    pattern = changed.get("pattern")
    if isinstance(pattern, str) and not compiles(pattern):
        relaxed = _without_look_around(pattern)
        changed["pattern"] = relaxed
        if not compiles(relaxed):
            del changed["pattern"]
    if isinstance(given := changed.get("patternProperties"), Mapping):
        changed["patternProperties"] = {key: value for key, value in given.items() if compiles(key)}
        if len(changed["patternProperties"]) < len(given) and changed.get("additionalProperties") is False:
            del changed["additionalProperties"]  # properties of those patterns are additional now
    if "pattern" not in changed and (encoded := FORMAT_PATTERNS.get(str(changed.get("format")))):
        changed["pattern"] = encoded
        del changed["format"]
    for key in BOUNDS:
        if _is_number(changed.get(key)) and abs(changed[key]) > LARGEST_BOUND:
            del changed[key]
    _name_properties(changed, root)
    for key, value in changed.items():
        if key in SCHEMA_MAPS and isinstance(value, Mapping):
            changed[key] = {name: enforceable(part, root) for name, part in value.items()}
        elif key in SCHEMA_LISTS and isinstance(value, list):
            changed[key] = [enforceable(part, root) for part in value]
        elif key in SCHEMAS:
            changed[key] = enforceable(value, root)
    return changed


def check_numbers(schema: Any) -> None:
    """Refuse numbers that grammars cannot be made of. Raises InputError."""
    if isinstance(schema, Mapping):
        for key, value in schema.items():
            if key not in ("default", "examples"):
                check_numbers(value)
    elif isinstance(schema, (list, tuple)):
        for value in schema:
            check_numbers(value)
    elif _is_number(schema) and schema < LEAST_NUMBER:
        raise InputError(
            f"The number {Decimal(schema):.3g} of a JSON schema cannot be enforced: use none below {LEAST_NUMBER:.2g}, "
            "or text."
        )


def validation_error(text: str, schema: Mapping[str, Any]) -> str:
    """Return why a text is no valid JSON under a schema, or "" if it is."""
    try:
        value = json.loads(text, parse_float=_exact)
    except (ValueError, RecursionError) as error:
        return f"It is no complete JSON ({error})."
    return value_error(value, schema)


def value_error(value: Any, schema: Mapping[str, Any]) -> str:
    """Return why a JSON value is not valid under a schema, or "" if it is."""
    from jsonschema.exceptions import best_match

    try:
        literal = LiteralPatterns(schema, value)
        problem = best_match(_validator(json.dumps(literal.schema)).iter_errors(value))
    except Exception as error:  # whatever a pattern or a reference of the schema makes jsonschema raise
        return f"It cannot be checked: {type(error).__name__}: {str(error)[:200]}"
    return "" if problem is None else f"{problem.json_path}: {literal.original(problem.message)[:300]}"


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend, validator_for
    from referencing import Registry

    parsed = json.loads(schema, parse_float=_exact)
    known = validator_for(parsed, default=Draft202012Validator)
    validator = extend(known, {"pattern": _check_pattern})
    return validator(parsed, format_checker=known.FORMAT_CHECKER, registry=Registry())  # which fetches nothing


def _check_pattern(validator: Any, pattern: str, value: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if validator.is_type(value, "string") and not has_match(pattern, value):
        yield ValidationError(f"{value!r} does not match {pattern!r}")


def _exact(number: str) -> Decimal | float:
    """Return a number as a Decimal, in which `multipleOf` is exact, or as a float where its exponent is too large."""
    try:
        return Decimal(number)
    except ArithmeticError:
        return float(number)


@lru_cache(maxsize=256)
def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def rule_error(rule: str) -> str:
    """Return why a rule of a Lark grammar does not compile, on one line, or ""."""
    from llguidance import LLMatcher

    grammar = LLMatcher.grammar_from_lark(f"start: {rule}\n")
    try:
        return " ".join(LLMatcher.validate_grammar(grammar).split())
    except BaseException as error:
        # llguidance cuts what it cites in the middle of a letter, which panics. This error is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        return "It cannot be read: a keyword has a value of a wrong type."


def compiles(pattern: str) -> bool:
    """Return whether a grammar can enforce a pattern."""
    return not rule_error("%json " + json.dumps({"type": "string", "pattern": pattern}))


def patterns_of(schema: Any) -> Iterator[str]:
    """Yield the patterns of a schema and of those in it."""
    if not isinstance(schema, Mapping):
        return
    if isinstance(pattern := schema.get("pattern"), str):
        yield pattern
    for key, value in schema.items():
        if key in SCHEMA_MAPS and isinstance(value, Mapping):
            if key == "patternProperties":
                yield from value
            parts = list(value.values())
        else:
            parts = value if key in SCHEMA_LISTS and isinstance(value, list) else [value] if key in SCHEMAS else []
        for part in parts:
            yield from patterns_of(part)


def _without_look_around(pattern: str) -> str:
    """Return a pattern without its assertions: it matches all that the given one matches."""
    pattern = pattern.replace(SIGN_AND_DIGITS, "[+-]?[0-9]")
    kept, at = "", 0
    while at < len(pattern):
        if LOOK_AROUND.match(pattern, at):
            at = _end_of_group(pattern, at)
            continue
        end = _end_of_atom(pattern, at)
        kept, at = kept + pattern[at:end], end
    return kept


def _end_of_group(pattern: str, at: int) -> int:
    """Return the index behind the group that begins at `at`."""
    depth = 0
    while at < len(pattern):
        depth += {"(": 1, ")": -1}.get(pattern[at], 0)
        at = _end_of_atom(pattern, at)
        if not depth:
            break
    return at


def _end_of_atom(pattern: str, at: int) -> int:
    """Return the index behind the character, escape or character class at `at`."""
    if pattern[at] == "\\":
        return at + 2
    if pattern[at] != "[":
        return at + 1
    found = re.compile(r"\[\^?\]?(\\.|[^\]\\])*\]?", re.DOTALL).match(pattern, at)
    return found.end() if found else at + 1


def _name_properties(schema: dict[str, Any], root: Any) -> None:
    """Replace `propertyNames` that lists all names by `properties`, which a grammar can enforce."""
    if "propertyNames" not in schema or "properties" in schema or "patternProperties" in schema:
        return
    rule, values = resolve(schema["propertyNames"], root), schema.get("additionalProperties", True)
    names = rule.get("enum", [rule["const"]] if "const" in rule else None) if isinstance(rule, Mapping) else None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        del schema["propertyNames"]
        schema |= {"properties": dict.fromkeys(names, values), "additionalProperties": False}


def resolve(schema: Any, root: Any) -> Any:
    """Return what a reference to a definition of the same schema stands for."""
    reference = schema.get("$ref") if isinstance(schema, Mapping) else None
    if reference == "#":
        return root
    if isinstance(reference, str) and reference.startswith("#/"):
        target = root
        for key in reference[2:].split("/"):
            target = target.get(key) if isinstance(target, Mapping) else None
        return target
    return {key: value for key, value in schema.items() if key != "$ref"} if reference else schema
