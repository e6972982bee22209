"""`ZSMergeStructuredLLM`: what `ZSMergeLLM.as_structured_llm` gives; streams, and knows what it cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing, closing
from typing import Any, cast

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
from llama_index.llms.zsmerge._structured import Partial, Response, StructuredPrediction, parse, text_of


class ZSMergeStructuredLLM(StructuredLLM):
    """An LLM whose answers are objects: `message.content` is their JSON, `raw` the object, token counts are in
    `additional_kwargs`. While an answer is streamed its JSON grows, and `raw` with it.
    """

    def _question(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
        inner = cast(StructuredPrediction, self.llm)
        return inner.structured_question(self.output_cls, inner._extend_messages(list(messages)), options)

    def _answer(self, response: Response) -> ChatResponse:
        text = text_of(response)
        return _response(text, parse(self.output_cls, text), response)

    def _grown(self) -> Callable[[Response], ChatResponse]:
        """Makes the answers of one stream; the last one is checked."""
        partial = Partial(self.output_cls)

        def answer(response: Response) -> ChatResponse:
            if cast("dict[str, Any]", response.raw)["finish_reason"]:
                return self._answer(response)
            return _response(text_of(response), partial(text_of(response)), response)

        return answer

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        method, question, options = self._question(messages, kwargs)
        return self._answer(getattr(self.llm, method)(question, **options))

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        method, question, options = self._question(messages, kwargs)
        return self._answer(await getattr(self.llm, f"a{method}")(question, **options))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        method, question, options = self._question(messages, kwargs)

        def answers() -> ChatResponseGen:
            grown = self._grown()
            with closing(getattr(self.llm, f"stream_{method}")(question, **options)) as responses:
                for response in responses:
                    yield grown(response)

        return answers()

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        method, question, options = self._question(messages, kwargs)

        async def answers() -> ChatResponseAsyncGen:
            grown = self._grown()
            async with aclosing(await getattr(self.llm, f"astream_{method}")(question, **options)) as responses:
                async for response in responses:
                    yield grown(response)

        return answers()

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
    return ChatResponse(
        message=ChatMessage(role=MessageRole.ASSISTANT, content=text),
        delta=response.delta,
        raw=output,
        additional_kwargs=response.additional_kwargs,
    )
