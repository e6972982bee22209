"""The JSON schema of a pydantic class, and objects of that class from answers, whole or unfinished."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from llama_index.core.base.llms.types import ChatResponse, CompletionResponse
from llama_index.core.bridge.pydantic import BaseModel, ValidationError
from pydantic import RootModel
from pydantic_core import from_json, to_json

from zsmerge_llm import OutputType
from zsmerge_llm.errors import ShortenedOutputWarning

if TYPE_CHECKING:
    from llama_index.core.program.utils import FlexibleModel

M = TypeVar("M", bound=BaseModel)
Response = ChatResponse | CompletionResponse


def parse(output_cls: type[M], response: Response | None) -> M:
    """Return the object of class `output_cls` that a finished answer holds as JSON.

    Warns with ShortenedOutputWarning where the answer was ended early to fit into `max_tokens`.

    Raises:
        InvalidOutputError: a ValueError; the answer was cut, or breaks a rule of the class that no grammar can express.
    """
    reason = None if response is None else finish_reason_of(response)
    text = "" if response is None else text_of(response)
    output = OutputType.of_type(output_cls).parse(text, reason)
    if reason == "length":
        warn_shortened(output_cls.__name__)
    return cast("M", output)


def warn_shortened(name: str) -> None:
    """Warn that an answer or a call is valid and incomplete."""
    warnings.warn(
        f"This {name} is valid and incomplete: the answer was ended early to fit into its token limit (finish_reason "
        "'length'). Raise max_tokens.",
        ShortenedOutputWarning,
        stacklevel=3,
    )


def finish_reason_of(response: Response) -> str | None:
    """Return why an answer ended; None while it is streamed."""
    return response.raw.get("finish_reason") if isinstance(response.raw, dict) else None


class PartialParser(Generic[M]):
    """Parses unfinished JSON: into `output_cls` once it validates, until then into a class with optional fields."""

    def __init__(self, output_cls: type[M]) -> None:
        from llama_index.core.program.utils import create_flexible_model

        self._classes: tuple[type[M | FlexibleModel], ...] = (output_cls,)
        if not issubclass(output_cls, RootModel):  # a root has no fields that could be optional
            self._classes += (create_flexible_model(output_cls),)

    def __call__(self, text: str) -> M | FlexibleModel | None:
        """Return the object that `text` holds so far, or None if that is nothing yet."""
        try:
            values = from_json(text, allow_partial="trailing-strings")
        except ValueError:
            return None
        for cls in self._classes:
            try:
                return cls.model_validate_json(to_json(values))
            except (ValidationError, ValueError, TypeError, ArithmeticError, RecursionError):
                continue
        return None


def text_of(response: Response) -> str:
    """Return the text of a chat's or a completion's answer."""
    return response.text if isinstance(response, CompletionResponse) else response.message.content or ""
