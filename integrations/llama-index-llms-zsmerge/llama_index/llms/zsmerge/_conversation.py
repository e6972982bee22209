"""Base of the chat engines: a conversation that is only appended to, so that each turn reads its own tokens only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import Any

from llama_index.core import instrumentation
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.callbacks import CallbackManager, trace_method
from llama_index.core.chat_engine.types import AgentChatResponse, BaseChatEngine, StreamingAgentChatResponse
from llama_index.core.instrumentation.events.chat_engine import (
    StreamChatDeltaReceivedEvent,
    StreamChatEndEvent,
    StreamChatErrorEvent,
    StreamChatStartEvent,
)
from llama_index.core.llms.llm import LLM
from llama_index.core.memory import BaseMemory, Memory
from llama_index.core.schema import NodeWithScore
from llama_index.core.tools import ToolOutput
from llama_index.llms.zsmerge._responses import usage_of

from zsmerge_llm.errors import ConfigError


@dataclass(frozen=True)
class Turn:
    """The user's next message as the conversation will hold it, and its sources."""

    message: ChatMessage
    nodes: list[NodeWithScore]
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the call to the model."""
    sources: list[ToolOutput] = field(default_factory=list)


@dataclass
class ConversationStream(StreamingAgentChatResponse):
    """A streamed answer, decoded as it is iterated. Closing the stream stops decoding.

    At the end, or when it is closed, the conversation holds the text so far. `metadata["usage"]` is the usage of a
    complete answer.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    is_writing_to_memory: bool = False  # LlamaIndex's background thread, which is not used here

    @property
    def response_gen(self) -> Generator[str, None, None]:
        if self.chat_stream is None:
            raise ConfigError("This is an async stream: use async_response_gen().")
        with closing(self.chat_stream):
            yield from super().response_gen

    async def async_response_gen(self) -> AsyncGenerator[str, None]:
        if self.achat_stream is None:
            raise ConfigError("This is a sync stream: use response_gen.")
        async with aclosing(self.achat_stream), aclosing(super().async_response_gen()) as pieces:
            async for piece in pieces:
                yield piece


class ConversationEngine(BaseChatEngine):
    """A chat engine that sends the conversation so far and one new message to the model."""

    def __init__(
        self,
        llm: LLM,
        memory: BaseMemory,
        prefix_messages: Sequence[ChatMessage] = (),
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._llm = llm
        self._memory = memory
        self._prefix_messages = list(prefix_messages)
        self.callback_manager = callback_manager or llm.callback_manager

    @abstractmethod
    def _turn(self, message: str, history: list[ChatMessage]) -> Turn:
        """Return the turn for a user's message."""

    @abstractmethod
    async def _aturn(self, message: str, history: list[ChatMessage]) -> Turn:
        """Async `_turn`."""

    @trace_method("chat")
    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer a message. `chat_history` replaces the conversation so far."""
        if chat_history is not None:
            self._memory.set(chat_history)
        history = self._memory.get(input=message)
        turn = self._turn(message, history)
        response = self._llm.chat([*self._prefix_messages, *history, turn.message], **turn.options)
        self._memory.put_messages([turn.message, response.message])
        return _chat_response(turn, response)

    @trace_method("chat")
    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Async `chat`."""
        if chat_history is not None:
            await self._memory.aset(chat_history)
        history = await self._memory.aget(input=message)
        turn = await self._aturn(message, history)
        response = await self._llm.achat([*self._prefix_messages, *history, turn.message], **turn.options)
        await self._memory.aput_messages([turn.message, response.message])
        return _chat_response(turn, response)

    @trace_method("chat")
    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> ConversationStream:
        """Stream the answer to a message: `for text in response.response_gen`."""
        if chat_history is not None:
            self._memory.set(chat_history)
        history = self._memory.get(input=message)
        turn = self._turn(message, history)
        responses = self._llm.stream_chat([*self._prefix_messages, *history, turn.message], **turn.options)
        stream = ConversationStream(sources=turn.sources, source_nodes=turn.nodes)
        stream.chat_stream = self._recorded(turn, responses, stream)
        return stream

    @trace_method("chat")
    async def astream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> ConversationStream:
        """Stream the answer to a message: `async for text in response.async_response_gen()`."""
        if chat_history is not None:
            await self._memory.aset(chat_history)
        history = await self._memory.aget(input=message)
        turn = await self._aturn(message, history)
        responses = await self._llm.astream_chat([*self._prefix_messages, *history, turn.message], **turn.options)
        stream = ConversationStream(sources=turn.sources, source_nodes=turn.nodes)
        stream.achat_stream = self._arecorded(turn, responses, stream)
        return stream

    def _recorded(self, turn: Turn, responses: Any, stream: ConversationStream) -> Generator[ChatResponse, None, None]:
        """Yield `responses`, then append the message and the answer, complete or not, to the conversation."""
        recorder = _StreamRecorder(stream)
        try:
            with recorder, closing(responses):
                for response in responses:
                    yield recorder.record(response)
        finally:
            if recorder.latest is not None:
                self._memory.put_messages([turn.message, recorder.latest.message])

    async def _arecorded(
        self, turn: Turn, responses: Any, stream: ConversationStream
    ) -> AsyncGenerator[ChatResponse, None]:
        """Async `_recorded`."""
        recorder = _StreamRecorder(stream)
        try:
            with recorder:
                async with aclosing(responses):
                    async for response in responses:
                        yield recorder.record(response)
        finally:
            if recorder.latest is not None:
                await self._memory.aput_messages([turn.message, recorder.latest.message])

    def reset(self) -> None:
        """Forget the conversation."""
        self._memory.reset()

    @property
    def chat_history(self) -> list[ChatMessage]:
        """The conversation so far."""
        return self._memory.get_all()


class _StreamRecorder:
    """Records the latest response of one stream and dispatches LlamaIndex's events. An error discards the response."""

    def __init__(self, stream: ConversationStream) -> None:
        self.latest: ChatResponse | None = None
        self._stream = stream
        self._dispatch = instrumentation.get_dispatcher(__name__).event

    def __enter__(self) -> None:
        self._dispatch(StreamChatStartEvent())

    def record(self, response: ChatResponse) -> ChatResponse:
        self.latest = response
        if response.delta:
            self._dispatch(StreamChatDeltaReceivedEvent(delta=response.delta))
        return response

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._dispatch(StreamChatEndEvent())
        elif isinstance(error, Exception):
            self.latest = None
            self._dispatch(StreamChatErrorEvent(exception=error))
        self._stream.metadata["usage"] = usage_of(self.latest)


def new_memory(llm: LLM, chat_history: list[ChatMessage] | None) -> Memory:
    """Return a memory that keeps all messages up to the model's window: if one is removed, the rest is read again."""
    return Memory.from_defaults(chat_history=chat_history or [], token_limit=llm.metadata.context_window)


def prefix(llm: LLM, system_prompt: str | None, prefix_messages: Sequence[ChatMessage] | None) -> list[ChatMessage]:
    """Return the messages before the conversation. Raises ConfigError if both are given."""
    if system_prompt is not None and prefix_messages is not None:
        raise ConfigError("Give either system_prompt or prefix_messages, not both.")
    if system_prompt is None:
        return list(prefix_messages or ())
    return [ChatMessage(role=llm.metadata.system_role, content=system_prompt)]


def user_message(text: str, **metadata: Any) -> ChatMessage:
    """Return a user's message. The model does not see `metadata`."""
    return ChatMessage(role=MessageRole.USER, content=text, additional_kwargs=metadata)


def _chat_response(turn: Turn, response: ChatResponse) -> AgentChatResponse:
    return AgentChatResponse(
        response=response.message.content or "",
        sources=turn.sources,
        source_nodes=turn.nodes,
        metadata={"usage": usage_of(response)},
    )
