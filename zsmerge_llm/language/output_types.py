"""What an answer is parsed into: an instance of a Python type, or a JSON value under a schema. Needs pydantic.

Both integrations have pydantic; the rest of zsmerge-llm does not need it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, PydanticUserError, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic.v1 import BaseModel as BaseModelV1
from pydantic.v1 import ValidationError as ValidationErrorV1

from zsmerge_llm.errors import InvalidOutputError, UnsupportedSchemaError, shown
from zsmerge_llm.language.json_schema import schema_text, validation_error

KEY_PATTERNS = {
    "int": r"^(0|-?[1-9]\d{0,14})$",
    "float": r"^(0|-?[1-9]\d{0,8})(\.\d{1,6})?$",
    "decimal": r"^(0|-?[1-9]\d{0,8})(\.\d{1,6})?$",
    "bool": r"^(true|false)$",
    "date": r"^(19|20)\d\d-(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
}
"""How keys of a dict are written, by pydantic's name of their type. JSON has keys of text only."""


class DecodingSchema(GenerateJsonSchema):
    """Make pydantic's schema of a class narrower where it allows text that the class refuses.

    A title that only repeats a field's name is left out: the model reads the schema.
    """

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def decimal_schema(self, schema: Any) -> dict[str, Any]:
        """Numbers alone. Pydantic allows any text beside them."""
        number: dict[str, Any] = {"type": "number"}
        bounds = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
        number |= {keyword: float(schema[name]) for name, keyword in bounds.items() if schema.get(name) is not None}
        digits, places = schema.get("max_digits"), schema.get("decimal_places")
        if digits is not None or places is not None:
            places = digits // 2 if places is None else places
            number["multipleOf"] = float(f"1e-{places}") if places else 1
        if digits is not None:
            most = float("9" * (digits - places) or "0")
            number.setdefault("maximum", most) if "exclusiveMaximum" not in number else None
            number.setdefault("minimum", -most) if "exclusiveMinimum" not in number else None
        return number

    def dict_schema(self, schema: Any) -> dict[str, Any]:
        """Keys as their type reads them."""
        made = super().dict_schema(schema)
        pattern = KEY_PATTERNS.get(schema.get("keys_schema", {}).get("type"))
        if pattern is not None and "patternProperties" not in made:
            values = made.pop("additionalProperties", True)
            made |= {"patternProperties": {pattern: values}, "additionalProperties": False}
            made.pop("propertyNames", None)
        return made

    def url_schema(self, schema: Any) -> dict[str, Any]:
        """The schemes that the class takes."""
        made = super().url_schema(schema)
        if schemes := schema.get("allowed_schemes"):
            made = {"type": "string", "pattern": rf"^({'|'.join(schemes)})://[a-z0-9]+(\.[a-z0-9]+)*(/[!-~]*)?$"}
        return made


@dataclass(frozen=True)
class OutputType:
    """What the JSON of an answer becomes. Make one with `of_type` or `of_schema`."""

    name: str
    description: str
    schema: dict[str, Any]
    """The JSON schema that decoding enforces."""
    convert: Callable[[str], Any]
    """Validates JSON and returns what the caller gets. Raises ValueError."""
    is_type: bool = True
    """Whether callers get an instance of a type, not the JSON value itself."""

    @classmethod
    def of_type(cls, wanted: Any) -> OutputType:
        """Return what gives instances of a Python type: a pydantic class of either version, a dataclass, an enum, a
        TypedDict (dicts) or anything else that pydantic knows, such as `list[int]`.

        Raises:
            UnsupportedSchemaError: the type has no JSON schema.
        """
        name, text = getattr(wanted, "__name__", "") or "answer", getattr(wanted, "__doc__", None) or ""
        try:
            if isinstance(wanted, type) and issubclass(wanted, BaseModelV1):
                return cls(name, text, wanted.schema(), wanted.parse_raw)
            if isinstance(wanted, type) and issubclass(wanted, BaseModel):
                schema = wanted.model_json_schema(schema_generator=DecodingSchema)
                return cls(
                    schema.get("title") or name, schema.get("description", ""), schema, wanted.model_validate_json
                )
            adapter = TypeAdapter(wanted)
            schema = adapter.json_schema(schema_generator=DecodingSchema)
            return cls(name, schema.get("description", ""), schema, adapter.validate_json)
        except (PydanticUserError, TypeError, ValueError, RecursionError) as error:
            reason = str(error).split("\n")[0]
            raise UnsupportedSchemaError(
                f"{shown(wanted)} has no JSON schema: {reason} Use field types that JSON can hold, or give such a "
                "field a schema with pydantic's WithJsonSchema."
            ) from error

    @classmethod
    def of_schema(cls, schema: Mapping[str, Any], name: str = "", description: str = "") -> OutputType:
        """Return what gives JSON values under a schema."""
        copied = dict(schema)

        def convert(text: str) -> Any:
            if problem := validation_error(text, copied):
                raise ValueError(problem)
            return json.loads(text)

        title, about = copied.get("title"), copied.get("description")
        name = name or (title if isinstance(title, str) else "") or "answer"
        return cls(name, description or (about if isinstance(about, str) else ""), copied, convert, is_type=False)

    @property
    def schema_text(self) -> str:
        """Return the schema as a prompt shows it."""
        return schema_text(self.schema)

    def partial(self, value: Any) -> Any:
        """Return what an unfinished answer holds, from its JSON value. Raises ValueError: that is no instance yet."""
        return self.convert(json.dumps(value)) if self.is_type else value

    def parse(self, text: str, finish_reason: str | None = None) -> Any:
        """Return the value of a finished answer.

        Args:
            text: the answer's JSON.
            finish_reason: why the answer ended; it goes into the error.

        Raises:
            InvalidOutputError: the answer was cut, or breaks a rule that decoding cannot enforce.
        """
        try:
            return self.convert(text)
        except (ValidationError, ValidationErrorV1, ValueError, TypeError, ArithmeticError, RecursionError) as error:
            cut = finish_reason == "length"
            remedy = (
                "It was cut by its token limit (finish_reason 'length'): raise max_tokens."
                if cut
                else "Raise max_tokens if it was cut; state in the prompt what the schema does not."
            )
            raise InvalidOutputError(f"The answer is no valid {self.name}: {error} {remedy}") from error
