"""`ZSMergeStructuredLLM`, which `ZSMergeLLM.as_structured_llm` returns: it streams, and reports token counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing, closing
from typing import Any

from llama_index.core.base.llms.generic_utils import (
    achat_to_completion_decorator,
    astream_chat_to_completion_decorator,
    chat_to_completion_decorator,
    stream_chat_to_completion_decorator,
)
from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    MessageRole,
)
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.structured_llm import StructuredLLM
from llama_index.llms.zsmerge._parsing import PartialParser, Response, finish_reason_of, parse, text_of


class ZSMergeStructuredLLM(StructuredLLM):
    """An LLM whose answers are objects of `output_cls`.

    `message.content` is their JSON, `raw` the object; token counts and the finish reason are in
    `additional_kwargs`. While an answer is streamed its JSON grows, and `raw` with it.
    """

    def _ask(self, method: str, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Any:
        """Return what a method of the LLM answers to these messages."""
        inner: Any = self.llm  # a `StructuredPrediction`, whose module imports this one
        return getattr(inner, method)(self.output_cls, inner._extend_messages(list(messages)), options)

    def _response(self, response: Response) -> ChatResponse:
        return _response(text_of(response), parse(self.output_cls, response), response)

    def _stream_response(self) -> Callable[[Response], ChatResponse]:
        """Return a function that converts the responses of one stream; only the last one is validated in full."""
        parse_partial = PartialParser(self.output_cls)

        def convert(response: Response) -> ChatResponse:
            if finish_reason_of(response):
                return self._response(response)
            return _response(text_of(response), parse_partial(text_of(response)), response)

        return convert

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._response(self._ask("structured_answer", messages, kwargs))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        return self._response(await self._ask("astructured_answer", messages, kwargs))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        def converted() -> ChatResponseGen:
            convert = self._stream_response()
            with closing(self._ask("stream_structured_answer", messages, kwargs)) as responses:
                for response in responses:
                    yield convert(response)

        return converted()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        async def converted() -> ChatResponseAsyncGen:
            convert = self._stream_response()
            async with aclosing(self._ask("astream_structured_answer", messages, kwargs)) as responses:
                async for response in responses:
                    yield convert(response)

        return converted()

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return chat_to_completion_decorator(self.chat)(prompt, **kwargs)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return await achat_to_completion_decorator(self.achat)(prompt, **kwargs)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        return stream_chat_to_completion_decorator(self.stream_chat)(prompt, **kwargs)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        return await astream_chat_to_completion_decorator(self.astream_chat)(prompt, **kwargs)


def _response(text: str, output: Any, response: Response) -> ChatResponse:
    reason = finish_reason_of(response)
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=text),
        delta=response.delta,
        raw=output,
        additional_kwargs={**response.additional_kwargs, **({"finish_reason": reason} if reason else {})},
    )
