"""Structured prediction on the grammar: the model can write nothing but JSON of the wanted schema."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llama_index.core import instrumentation
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse
from llama_index.core.bridge.pydantic import BaseModel, ValidationError
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.types import PydanticProgramMode
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import from_json

if TYPE_CHECKING:
    from llama_index.core.llms.structured_llm import StructuredLLM
    from llama_index.core.program.utils import FlexibleModel

M = TypeVar("M", bound=BaseModel)
Response = ChatResponse | CompletionResponse

_NOTE = "Answer with JSON that follows this schema, and nothing else:\n{schema}\n\nJSON:\n"
"""Tells base models, which have no chat template, what is wanted."""
_TOOL_HINTS = ("tool_choice", "tool_required", "allow_parallel_tool_calls")
"""Options that make other models call the tool that stands for the schema there."""


class _Brief(GenerateJsonSchema):
    """Schemas without a title for each field, which says its name again: they are read by the model."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_of(output_cls: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema that the model is shown and held to."""
    return output_cls.model_json_schema(schema_generator=_Brief)


def parse(output_cls: type[M], text: str) -> M:
    """The object that an answer spells.

    Raises:
        ValueError: the answer was cut, or breaks a rule of the class that a grammar cannot know.
    """
    try:
        return output_cls.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(
            f"The answer is no valid {output_cls.__name__}: {error} Raise max_tokens if it was cut; say in the prompt "
            "what the schema does not."
        ) from error


class Partial(Generic[M]):
    """Objects from the beginnings of an answer: of the class as soon as they are valid, before that with any fields."""

    def __init__(self, output_cls: type[M]) -> None:
        from llama_index.core.program.utils import create_flexible_model

        self._output_cls = output_cls
        self._flexible = create_flexible_model(output_cls)

    def __call__(self, text: str) -> M | FlexibleModel | None:
        """What `text` spells so far; None if that is nothing yet."""
        try:
            values = from_json(text, allow_partial="trailing-strings")
        except ValueError:
            return None
        kinds: tuple[type[M | FlexibleModel], ...] = (self._output_cls, self._flexible)
        for kind in kinds:
            try:
                return kind.model_validate(values)
            except ValidationError:
                continue
        return None


def text_of(response: Response) -> str:
    """The text of a chat's or a completion's answer."""
    return response.text if isinstance(response, CompletionResponse) else response.message.content or ""


class StructuredPrediction(FunctionCallingLLM):
    """The four `structured_predict` methods and `as_structured_llm`, for a model that takes `response_format`.

    With another `pydantic_program_mode` than the default the chosen program does it, as in any LLM.
    """

    def structured_question(
        self, output_cls: type[BaseModel], messages: Sequence[ChatMessage], options: dict[str, Any]
    ) -> tuple[str, Any, dict[str, Any]]:
        """How to ask for a JSON object: the method ("chat" or "complete"), its argument and its options."""
        schema = schema_of(output_cls)
        described = {"name": output_cls.__name__, "schema": schema, "strict": False}
        options = {name: value for name, value in options.items() if name not in _TOOL_HINTS}
        options["response_format"] = {"type": "json_schema", "json_schema": described}
        if self.metadata.is_chat_model:
            return "chat", messages, options
        assert self.messages_to_prompt is not None  # set by the base class
        note = ChatMessage(content=_NOTE.format(schema=json.dumps(schema, ensure_ascii=False)))
        return "complete", self.messages_to_prompt([*messages, note]), {"formatted": True, **options}

    def _ask(
        self, output_cls: type[BaseModel], prompt: BasePromptTemplate, options: dict[str, Any] | None, args: Any
    ) -> tuple[str, Any, dict[str, Any]]:
        instrumentation.get_dispatcher(__name__).event(
            LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=args)
        )
        messages = self._extend_messages(prompt.format_messages(llm=self, **args))
        return self.structured_question(output_cls, messages, options or {})

    @property
    def _by_grammar(self) -> bool:
        return self.pydantic_program_mode == PydanticProgramMode.DEFAULT

    def structured_predict(
        self,
        output_cls: type[M],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> M:
        """An object of `output_cls`. `llm_kwargs` are options of the call, `prompt_args` fill the prompt.

        Raises:
            ValueError: the answer was cut, or breaks a rule of the class that a grammar cannot know.
        """
        if not self._by_grammar:
            return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        method, question, options = self._ask(output_cls, prompt, llm_kwargs, prompt_args)
        return _ended(parse(output_cls, text_of(getattr(self, method)(question, **options))))

    async def astructured_predict(
        self,
        output_cls: type[M],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> M:
        """As `structured_predict`."""
        if not self._by_grammar:
            return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        method, question, options = self._ask(output_cls, prompt, llm_kwargs, prompt_args)
        return _ended(parse(output_cls, text_of(await getattr(self, f"a{method}")(question, **options))))

    def stream_structured_predict(
        self,
        output_cls: type[M],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[M | FlexibleModel, None, None]:
        """The object as it grows: with any fields until it is valid, at the end as `structured_predict` gives it."""
        if not self._by_grammar:
            yield from super().stream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return
        method, question, options = self._ask(output_cls, prompt, llm_kwargs, prompt_args)
        growing = _Growing(output_cls)
        with closing(getattr(self, f"stream_{method}")(question, **options)) as answers:
            for answer in answers:
                if (found := growing.grown(text_of(answer))) is not None:
                    yield found
        yield from growing.ended()

    async def astream_structured_predict(
        self,
        output_cls: type[M],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[M | FlexibleModel, None]:
        """As `stream_structured_predict`."""
        if not self._by_grammar:
            return await super().astream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

        async def objects() -> AsyncGenerator[M | FlexibleModel, None]:
            method, question, options = self._ask(output_cls, prompt, llm_kwargs, prompt_args)
            growing = _Growing(output_cls)
            async with aclosing(await getattr(self, f"astream_{method}")(question, **options)) as answers:
                async for answer in answers:
                    if (found := growing.grown(text_of(answer))) is not None:
                        yield found
            for found in growing.ended():
                yield found

        return objects()

    def as_structured_llm(self, output_cls: type[BaseModel], **kwargs: Any) -> StructuredLLM:
        """An LLM all of whose answers are objects of `output_cls`; `response.raw` has them."""
        from llama_index.llms.zsmerge.structured import ZSMergeStructuredLLM

        if not self._by_grammar:
            return super().as_structured_llm(output_cls, **kwargs)
        return ZSMergeStructuredLLM(llm=self, output_cls=output_cls, **kwargs)


class _Growing(Generic[M]):
    """One object that is streamed."""

    def __init__(self, output_cls: type[M]) -> None:
        self._output_cls = output_cls
        self._partial = Partial(output_cls)
        self._latest: BaseModel | None = None
        self._text = ""

    def grown(self, text: str) -> M | FlexibleModel | None:
        """The object so far, if `text` adds to it."""
        self._text, found = text, self._partial(text)
        if found is None or found == self._latest:
            return None
        self._latest = found
        instrumentation.get_dispatcher(__name__).event(LLMStructuredPredictInProgressEvent(output=found))
        return found

    def ended(self) -> list[M]:
        """The object that the whole text spells, unless it was the latest already. Raises as `parse`."""
        whole = _ended(parse(self._output_cls, self._text))
        return [] if whole == self._latest else [whole]


def _ended(output: M) -> M:
    instrumentation.get_dispatcher(__name__).event(LLMStructuredPredictEndEvent(output=output))
    return output
