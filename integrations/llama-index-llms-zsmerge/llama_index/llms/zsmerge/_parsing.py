"""The JSON schema of a pydantic class, and objects of that class from answers, whole or unfinished."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from llama_index.core.bridge.pydantic import BaseModel, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import from_json

if TYPE_CHECKING:
    from llama_index.core.program.utils import FlexibleModel

M = TypeVar("M", bound=BaseModel)
Response = ChatResponse | CompletionResponse


class _UntitledSchema(GenerateJsonSchema):
    """Leaves out the title of each field: it repeats the field's name, and the model reads the schema."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema(output_cls: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema that the prompt shows and the grammar enforces."""
    return output_cls.model_json_schema(schema_generator=_UntitledSchema)


def parse(output_cls: type[M], text: str) -> M:
    """Return the object of class `output_cls` that `text` holds as JSON.

    Raises:
        ValueError: `text` was cut, or breaks a rule of the class that no grammar can express.
    """
    try:
        return output_cls.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(
            f"The answer is no valid {output_cls.__name__}: {error} Raise max_tokens if it was cut; state in the "
            "prompt what the schema does not."
        ) from error


class PartialParser(Generic[M]):
    """Parses unfinished JSON: into `output_cls` once it validates, until then into a class with optional fields."""

    def __init__(self, output_cls: type[M]) -> None:
        from llama_index.core.program.utils import create_flexible_model

        self._classes: tuple[type[M | FlexibleModel], ...] = (output_cls, create_flexible_model(output_cls))

    def __call__(self, text: str) -> M | FlexibleModel | None:
        """Return the object that `text` holds so far, or None if that is nothing yet."""
        try:
            values = from_json(text, allow_partial="trailing-strings")
        except ValueError:
            return None
        for cls in self._classes:
            try:
                return cls.model_validate(values)
            except ValidationError:
                continue
        return None


def text_of(response: Response) -> str:
    """Return the text of a chat's or a completion's answer."""
    return response.text if isinstance(response, CompletionResponse) else response.message.content or ""
