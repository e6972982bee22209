"""What of a JSON schema is enforced while decoding, what is checked afterwards, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.support.chat import make_llm
from zsmerge_llm import LLM, CacheConfig, Grammar, SamplingParams
from zsmerge_llm.errors import InputError, UnsupportedSchemaError
from zsmerge_llm.language import literal_patterns
from zsmerge_llm.language.json_schema import enforceable, validation_error, value_error
from zsmerge_llm.language.schema_checks import check_schema, check_strict

DECIMAL = r"^(?!^[-+.]*$)[+-]?0*\d*\.?\d*$"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm("smollm2", cache=CacheConfig.full())


def ask(llm: LLM, schema: Any, seed: int = 0, **described: Any) -> Any:
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **described}}
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=seed)
    return llm.complete("Say it.", sampling=params, response_format=wanted)


@pytest.mark.parametrize(
    ("pattern", "enforced"),
    [
        (DECIMAL, r"^[+-]?[0-9]\d*\.?\d*$"),
        (r"^(?=a[)]b)x(?<!y(z)w)c\(?$", r"^xc\(?$"),
        (r"^(a|b)\1$", None),
        ("(", None),
    ],
)
def test_of_a_pattern_what_a_grammar_knows_is_enforced(pattern: str, enforced: str | None) -> None:
    assert enforceable({"type": "string", "pattern": pattern}).get("pattern") == enforced


def test_a_decimal_as_text_matches_its_pattern(llm: LLM) -> None:
    for seed in range(4):
        result = ask(llm, {"type": "string", "pattern": DECIMAL}, seed)
        assert re.fullmatch(DECIMAL, json.loads(result.text))
        assert result.format_error == ""


def test_property_names_that_are_listed_are_enforced(llm: LLM) -> None:
    schema = {
        "type": "object",
        "propertyNames": {"$ref": "#/$defs/C"},
        "additionalProperties": {"type": "boolean"},
        "$defs": {"C": {"enum": ["a", "b"]}},
    }
    assert set(json.loads(ask(llm, schema).text)) <= {"a", "b"}


def test_a_keyword_that_is_not_enforced_is_checked_afterwards(llm: LLM) -> None:
    flags = {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 4, "uniqueItems": True}
    assert "non-unique" in ask(llm, flags).format_error


def test_an_answer_that_was_cut_says_so(llm: LLM) -> None:
    result = ask(llm, {"type": "array", "items": {"type": "integer"}, "minItems": 99})
    assert (result.finish_reason, "no complete JSON" in result.format_error) == ("length", True)


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "binary"}, "format 'binary'"),
        ({"properties": {"n": {"type": "string", "pattern": "^(?!a)b$"}}}, "pattern"),
        ({"type": "object", "patternProperties": {"(?!a)b": {}}}, "pattern"),
        ({"not": {"type": "string"}}, "not"),
    ],
)
def test_a_strict_schema_is_refused_with_the_keyword_and_the_remedy(schema: Any, keyword: str) -> None:
    with pytest.raises(UnsupportedSchemaError, match=f"{re.escape(keyword)}.*strict=False"):
        check_strict(schema, "The schema")
    check_schema(schema, "The schema")


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "#"}, "no finite value"),
        ({"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]}, "no finite value"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no finite value"),
        *(({"$ref": {"a" * (90 + shift) + "é" * 20: 1}}, "string|wrong type") for shift in range(2)),
    ],
)
def test_a_schema_that_no_answer_can_follow_is_refused_before_anything_is_read(
    llm: LLM, schema: Any, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        ask(llm, schema)


def test_recursion_that_can_end_is_not_refused() -> None:
    check_schema({"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#"}}}}, "It")
    check_schema({"anyOf": [{"type": "array", "items": {"$ref": "#"}, "minItems": 1}, {"type": "null"}]}, "It")


@pytest.mark.parametrize("number", [-(2**63), -(2**63) + 1, -1e19, -(10**400), -5.6e228])
def test_numbers_that_would_end_the_process_are_refused(number: float) -> None:
    for schema in (
        {"type": "integer", "enum": [1, number]},
        {"const": {"a": [number]}},
        {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"const": number}]}},
    ):
        with pytest.raises(InputError, match="cannot be enforced"):
            check_schema(schema, "It")
        with pytest.raises(InputError, match="cannot be enforced"):
            Grammar.json_schema(schema)


def test_bounds_of_64_bit_integers_are_checked_when_the_answer_is_complete() -> None:
    schema = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1, "default": -(2**63)}
    check_schema(schema, "It")
    assert "greater than the maximum" in validation_error(str(2**63), schema)
    assert validation_error(str(-(2**63)), schema) == ""
    check_schema({"type": "integer", "minimum": -(2**63), "maximum": -(2**63)}, "It")


LONG = "x" * 5000
LISTS = {"type": "array", "items": {"type": "array", "items": {"const": LONG}, "minItems": 100}, "minItems": 100}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"enum": [LONG, LONG + "y"]}, "minItems": 10_000},
        {"type": "object", "properties": {"optional": LISTS}},
        {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/A"}], "$defs": {"A": LISTS}},
        {"type": "object", "additionalProperties": LISTS},
        {"type": "array", "prefixItems": [{"type": "null"}, LISTS]},
        {"type": "array", "items": {"type": "string", "pattern": "^x{1000}$"}, "minItems": 1000},
        {"type": "array", "minItems": 1_000_000},
    ],
)
def test_a_schema_with_a_part_that_is_endless_in_practice_is_refused(schema: Any) -> None:
    """The text that a grammar forces is made as a whole: 5 MB of it took 1.1 GB and 25 s."""
    with pytest.raises(InputError, match=r"shortest value has [0-9,]{7,} characters.*Lower its minItems"):
        check_schema(schema, "It")


def test_long_constants_and_lists_are_not_refused() -> None:
    uuid = {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}
    check_schema({"type": "array", "items": uuid, "minItems": 1000}, "It")
    check_schema({"type": "array", "items": {"const": LONG}, "minItems": 10, "maxItems": 1_000_000}, "It")
    check_schema({"type": ["string", "null"], "minLength": 10, "maxLength": 1_000_000}, "It")


@pytest.mark.parametrize("text", ["0.07", "2.21", "-98.99", "1E999999999999999999999"])
def test_numbers_are_checked_exactly_and_never_raise(text: str) -> None:
    problem = validation_error(text, {"type": "number", "multipleOf": 0.01})
    assert bool(problem) == ("E" in text)


FOREVER = "^(?!x)(a|aa)+$"
NAMES = {"type": "object", "patternProperties": {FOREVER: {"type": "integer"}}}


@pytest.mark.parametrize(
    "schema",
    [
        NAMES,
        {**NAMES, "additionalProperties": False},
        {**NAMES, "additionalProperties": {"type": "string"}},
        {**NAMES, "unevaluatedProperties": False},
        {"$schema": "https://json-schema.org/draft/2019-09/schema", **NAMES, "unevaluatedProperties": False},
        {"$schema": "http://json-schema.org/draft-07/schema#", **NAMES, "additionalProperties": False},
        {"$schema": "http://json-schema.org/draft-04/schema#", **NAMES, "additionalProperties": False},
        {"$ref": "#/$defs/a", "unevaluatedProperties": False, "$defs": {"a": NAMES}},
        {"allOf": [{"$ref": "#/others/a"}], "unevaluatedProperties": False, "others": {"a": NAMES}},
        {"type": "object", "propertyNames": {"pattern": FOREVER}},
        {"type": "object", "dependentSchemas": {"n": {**NAMES, "additionalProperties": False}}},
        {"if": {**NAMES, "additionalProperties": False}, "then": {}, "else": {}},
    ],
)
def test_a_pattern_of_names_that_would_search_for_ever_is_given_up(
    schema: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(literal_patterns, "MATCH_SECONDS", 0.05)
    problem = value_error({"n": 1, "a" * 64 + "b": 1}, schema)
    assert problem.startswith("It cannot be checked: TimeoutError"), problem


def test_patterns_of_names_are_checked_with_what_is_beside_them() -> None:
    numbers = {"^n": {"type": "integer"}, "^nn": {"minimum": 5}, "(?<=o)[+]$": {}}
    schema = {"type": "object", "properties": {"x": {}, "patternProperties": {"type": "null"}}}
    schema |= {"patternProperties": numbers, "additionalProperties": False}
    valid = {"n": 1, "nn": 7, "o+": "any", "x": 1, "patternProperties": None}
    assert value_error(valid, schema) == ""
    assert value_error(valid, {**schema, "additionalProperties": {"type": "string"}}) == ""
    assert "$.n:" in value_error({"n": "x"}, schema)
    assert "minimum" in value_error({"nn": 1}, schema)
    assert "$.patternProperties" in value_error({"patternProperties": 1}, schema)
    for value in ({"m": 1}, {"an": 1}, {"N": 1}):
        problem = value_error(value, schema)
        assert "does not match any of the regexes" in problem
        assert "'^n'" in problem
    assert value_error({"m": 1}, {**schema, "additionalProperties": {"type": "string"}}).startswith("$.m:")
    nested = {"allOf": [{"patternProperties": numbers}], "unevaluatedProperties": False}
    assert value_error({"n": 1}, nested) == ""
    assert "'m' was unexpected" in value_error({"n": 1, "m": 1}, nested)


def test_what_only_looks_like_patterns_of_names_stays_as_it_is() -> None:
    data = {"patternProperties": {"^n": 1}}
    for keyword in ("const", "default"):
        assert value_error(data, {keyword: data}) == ""
    assert value_error(data, {"enum": [data]}) == ""
    assert value_error({"patternProperties": 2}, {"const": data}) != ""


def test_a_reference_to_elsewhere_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(*_: Any) -> None:
        raise AssertionError("fetched")

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    problem = value_error({}, {"$ref": "http://localhost:9/schema.json"})
    assert problem.startswith("It cannot be checked")
    assert "fetched" not in problem


def test_a_pattern_that_would_search_for_ever_is_given_up() -> None:
    schema = {"type": "string", "pattern": "^(?!x)(a|aa)+$"}
    assert value_error("aaaa", schema) == ""
    assert "does not match" in value_error("xaa", schema)
    assert "TimeoutError" in value_error("a" * 64 + "b", schema)
    named = {"type": "object", "patternProperties": {"^n": {"type": "integer"}}}
    assert value_error({"n": 1, "m": "x"}, named) == ""
    assert "$.n" in value_error({"n": "x"}, named)
