"""Structured prediction: a grammar restricts the answer to JSON of the wanted schema."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Generator, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from typing import TYPE_CHECKING, Any, Generic

from llama_index.core import instrumentation
from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.bridge.pydantic import BaseModel, Field
from llama_index.core.instrumentation.events.llm import (
    LLMStructuredPredictEndEvent,
    LLMStructuredPredictInProgressEvent,
    LLMStructuredPredictStartEvent,
)
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.prompts.base import BasePromptTemplate
from llama_index.core.types import PydanticProgramMode
from llama_index.llms.zsmerge._parsing import M, PartialParser, Response, parse, text_of
from llama_index.llms.zsmerge.structured import ZSMergeStructuredLLM

from zsmerge_llm import OutputType
from zsmerge_llm.errors import InvalidOutputError, ShortenedOutputWarning, ZSMergeError

if TYPE_CHECKING:
    from llama_index.core.llms.structured_llm import StructuredLLM
    from llama_index.core.program.utils import FlexibleModel

_INSTRUCTION = "Answer with JSON that follows this schema, and nothing else:\n{schema}\n\nJSON:\n"
"""Describes the schema to base models, which have no chat template to do it."""
_TOOL_OPTIONS = ("tool_choice", "tool_required", "allow_parallel_tool_calls")
"""Options with which LlamaIndex makes other models call a tool that stands for the schema."""


class StructuredPrediction(FunctionCallingLLM):
    """The four `structured_predict` methods and `as_structured_llm`, for a model that takes `response_format`.

    With another `pydantic_program_mode` than the default LlamaIndex's own program runs instead, as in any LLM.
    """

    retry_invalid: bool = Field(
        default=False,
        description="Whether structured output is asked for once more, with the error, where it breaks its class.",
    )

    def structured_answer(
        self, output_cls: type[BaseModel], messages: Sequence[ChatMessage], options: dict[str, Any]
    ) -> Response:
        """Return an answer that holds an object of `output_cls` as JSON: corrected once, with `retry_invalid`."""
        method, argument, options = self._structured_request(output_cls, messages, options)
        response: Response = getattr(self, method)(argument, **options)
        corrected = self._correction(output_cls, method, argument, response) if self.retry_invalid else None
        return response if corrected is None else getattr(self, method)(corrected, **options)

    async def astructured_answer(
        self, output_cls: type[BaseModel], messages: Sequence[ChatMessage], options: dict[str, Any]
    ) -> Response:
        """Async `structured_answer`."""
        method, argument, options = self._structured_request(output_cls, messages, options)
        response: Response = await getattr(self, f"a{method}")(argument, **options)
        corrected = self._correction(output_cls, method, argument, response) if self.retry_invalid else None
        return response if corrected is None else await getattr(self, f"a{method}")(corrected, **options)

    def stream_structured_answer(
        self, output_cls: type[BaseModel], messages: Sequence[ChatMessage], options: dict[str, Any]
    ) -> Generator[Response, None, None]:
        """Stream `structured_answer`. With `retry_invalid`, a first answer is passed on once it is whole and valid."""
        method, argument, options = self._structured_request(output_cls, messages, options)
        if self.retry_invalid:
            response = getattr(self, method)(argument, **options)
            argument = self._correction(output_cls, method, argument, response)
            if argument is None:
                yield _as_stream(response)
                return
        with closing(getattr(self, f"stream_{method}")(argument, **options)) as responses:
            yield from responses

    async def astream_structured_answer(
        self, output_cls: type[BaseModel], messages: Sequence[ChatMessage], options: dict[str, Any]
    ) -> AsyncGenerator[Response, None]:
        """Async `stream_structured_answer`."""
        method, argument, options = self._structured_request(output_cls, messages, options)
        if self.retry_invalid:
            response = await getattr(self, f"a{method}")(argument, **options)
            argument = self._correction(output_cls, method, argument, response)
            if argument is None:
                yield _as_stream(response)
                return
        async with aclosing(await getattr(self, f"astream_{method}")(argument, **options)) as responses:
            async for response in responses:
                yield response

    def _structured_request(
        self, output_cls: type[BaseModel], messages: Sequence[ChatMessage], options: dict[str, Any]
    ) -> tuple[str, Any, dict[str, Any]]:
        """Return the call that asks for a JSON object: its method ("chat" or "complete"), argument and options."""
        wanted = OutputType.of_type(output_cls)
        options = {name: value for name, value in options.items() if name not in _TOOL_OPTIONS}
        options["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": output_cls.__name__, "schema": wanted.schema, "strict": False},
        }
        if self.metadata.is_chat_model:
            return "chat", messages, options
        assert self.messages_to_prompt is not None  # set by the base class
        instruction = ChatMessage(content=_INSTRUCTION.format(schema=wanted.schema_text))
        return "complete", self.messages_to_prompt([*messages, instruction]), {"formatted": True, **options}

    def _correction(self, output_cls: type[BaseModel], method: str, argument: Any, response: Response) -> Any:
        """Return what to ask after an answer that is not valid, with its error; None where it is valid."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ShortenedOutputWarning)
            try:
                parse(output_cls, response)
            except InvalidOutputError as error:
                if method == "complete":
                    return f"{argument}{text_of(response)}\n\n{error.correction}\n\nJSON:\n"
                said = ChatMessage(role=MessageRole.ASSISTANT, content=text_of(response))
                return [*argument, said, ChatMessage(role=MessageRole.USER, content=error.correction)]
        return None

    def _predicted_messages(
        self, output_cls: type[BaseModel], prompt: BasePromptTemplate, args: dict[str, Any]
    ) -> Sequence[ChatMessage]:
        """Return the messages of a filled prompt, and dispatch the start event."""
        _dispatch(LLMStructuredPredictStartEvent(output_cls=output_cls, template=prompt, template_args=args))
        return self._extend_messages(prompt.format_messages(llm=self, **args))

    @property
    def _uses_grammar(self) -> bool:
        return self.pydantic_program_mode == PydanticProgramMode.DEFAULT

    def structured_predict(
        self,
        output_cls: type[M],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> M:
        """Return an object of `output_cls`. `llm_kwargs` are options of the call, `prompt_args` fill the prompt.

        Raises:
            InvalidOutputError: the answer was cut, or breaks a rule of the class that no grammar can express. It is a
                ValueError.
        """
        if not self._uses_grammar:
            with own_errors(output_cls):
                return super().structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        messages = self._predicted_messages(output_cls, prompt, prompt_args)
        return _finished(parse(output_cls, self.structured_answer(output_cls, messages, llm_kwargs or {})))

    async def astructured_predict(
        self,
        output_cls: type[M],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> M:
        """Async `structured_predict`."""
        if not self._uses_grammar:
            with own_errors(output_cls):
                return await super().astructured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
        messages = self._predicted_messages(output_cls, prompt, prompt_args)
        return _finished(parse(output_cls, await self.astructured_answer(output_cls, messages, llm_kwargs or {})))

    def stream_structured_predict(
        self,
        output_cls: type[M],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> Generator[M | FlexibleModel, None, None]:
        """Yield the object each time it grows: with optional fields until it validates, last of class `output_cls`.

        Raises:
            InvalidOutputError: as `structured_predict`, at the end.
        """
        if not self._uses_grammar:
            yield from super().stream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)
            return
        messages = self._predicted_messages(output_cls, prompt, prompt_args)
        growing = _GrowingObject(output_cls)
        with closing(self.stream_structured_answer(output_cls, messages, llm_kwargs or {})) as responses:
            for response in responses:
                if (output := growing.update(response)) is not None:
                    yield output
        yield from growing.finish()

    async def astream_structured_predict(
        self,
        output_cls: type[M],
        prompt: BasePromptTemplate,
        llm_kwargs: dict[str, Any] | None = None,
        **prompt_args: Any,
    ) -> AsyncGenerator[M | FlexibleModel, None]:
        """Async `stream_structured_predict`."""
        if not self._uses_grammar:
            return await super().astream_structured_predict(output_cls, prompt, llm_kwargs, **prompt_args)

        async def objects() -> AsyncGenerator[M | FlexibleModel, None]:
            messages = self._predicted_messages(output_cls, prompt, prompt_args)
            growing = _GrowingObject(output_cls)
            answers = self.astream_structured_answer(output_cls, messages, llm_kwargs or {})
            async with aclosing(answers) as responses:
                async for response in responses:
                    if (output := growing.update(response)) is not None:
                        yield output
            for output in growing.finish():
                yield output

        return objects()

    def as_structured_llm(self, output_cls: type[BaseModel], **kwargs: Any) -> StructuredLLM:
        """Return an LLM whose answers are objects of `output_cls`, in `response.raw`."""
        if not self._uses_grammar:
            return super().as_structured_llm(output_cls, **kwargs)
        return ZSMergeStructuredLLM(llm=self, output_cls=output_cls, **kwargs)


class _GrowingObject(Generic[M]):
    """One streamed object; dispatches LlamaIndex's events as it grows."""

    def __init__(self, output_cls: type[M]) -> None:
        self._output_cls = output_cls
        self._parse_partial = PartialParser(output_cls)
        self._latest: BaseModel | None = None
        self._response: Response | None = None

    def update(self, response: Response) -> M | FlexibleModel | None:
        """Return the object that a response holds so far, or None if it is the latest one."""
        self._response, output = response, self._parse_partial(text_of(response))
        if output is None or output == self._latest:
            return None
        self._latest = output
        _dispatch(LLMStructuredPredictInProgressEvent(output=output))
        return output

    def finish(self) -> list[M]:
        """Return the final object, or nothing if it was yielded already. Raises as `parse`."""
        final = _finished(parse(self._output_cls, self._response))
        return [] if final == self._latest else [final]


def _as_stream(response: Response) -> Response:
    """Return a whole answer as the only response of a stream."""
    response.delta = text_of(response)
    return response


@contextmanager
def own_errors(output_cls: type[BaseModel]) -> Iterator[None]:
    """Raise what LlamaIndex's programs raise for an invalid answer as an InvalidOutputError, which is a ValueError."""
    try:
        yield
    except ZSMergeError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise InvalidOutputError(
            f"The answer is no valid {output_cls.__name__}: {error} Raise max_tokens if it was cut, or use the default "
            "pydantic_program_mode."
        ) from error


def _finished(output: M) -> M:
    """Dispatch the end event and return `output`."""
    _dispatch(LLMStructuredPredictEndEvent(output=output))
    return output


def _dispatch(event: Any) -> None:
    instrumentation.get_dispatcher(__name__).event(event)
