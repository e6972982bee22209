"""What our chat engines have in common: one conversation that only grows, so that a turn reads no more than its own."""

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
    """What the user's next message is, as it will stand in the conversation, and where it comes from."""

    message: ChatMessage
    nodes: list[NodeWithScore]
    options: dict[str, Any] = field(default_factory=dict)
    """Of the call to the model."""
    sources: list[ToolOutput] = field(default_factory=list)


@dataclass
class ConversationStream(StreamingAgentChatResponse):
    """A streamed answer. It is generated as it is read; leaving the stream stops the decoding.

    When it has ended, or was left, the conversation holds what was said until then, and `metadata["usage"]` what a
    whole answer cost.
    """

    metadata: dict[str, Any] = field(default_factory=dict)
    is_writing_to_memory: bool = False  # by a thread that reads to the end whether anybody listens or not

    @property
    def response_gen(self) -> Generator[str, None, None]:
        if self.chat_stream is None:
            raise ConfigError("This answer is streamed to async code: use async_response_gen().")
        with closing(self.chat_stream):
            yield from super().response_gen

    async def async_response_gen(self) -> AsyncGenerator[str, None]:
        if self.achat_stream is None:
            raise ConfigError("This answer is streamed to sync code: use response_gen.")
        async with aclosing(self.achat_stream), aclosing(super().async_response_gen()) as pieces:
            async for piece in pieces:
                yield piece


class ConversationEngine(BaseChatEngine):
    """A chat engine that sends the model the conversation so far and one more message."""

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
        """The next message, made of what the user said."""

    @abstractmethod
    async def _aturn(self, message: str, history: list[ChatMessage]) -> Turn:
        """As `_turn`."""

    @trace_method("chat")
    def chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """Answer a message. `chat_history`, where given, takes the place of the conversation so far."""
        if chat_history is not None:
            self._memory.set(chat_history)
        history = self._memory.get(input=message)
        turn = self._turn(message, history)
        response = self._llm.chat([*self._prefix_messages, *history, turn.message], **turn.options)
        self._memory.put_messages([turn.message, response.message])
        return _whole(turn, response)

    @trace_method("chat")
    async def achat(self, message: str, chat_history: list[ChatMessage] | None = None) -> AgentChatResponse:
        """As `chat`."""
        if chat_history is not None:
            await self._memory.aset(chat_history)
        history = await self._memory.aget(input=message)
        turn = await self._aturn(message, history)
        response = await self._llm.achat([*self._prefix_messages, *history, turn.message], **turn.options)
        await self._memory.aput_messages([turn.message, response.message])
        return _whole(turn, response)

    @trace_method("chat")
    def stream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> ConversationStream:
        """As `chat`, piece by piece: `for text in response.response_gen`."""
        if chat_history is not None:
            self._memory.set(chat_history)
        history = self._memory.get(input=message)
        turn = self._turn(message, history)
        answers = self._llm.stream_chat([*self._prefix_messages, *history, turn.message], **turn.options)
        stream = ConversationStream(sources=turn.sources, source_nodes=turn.nodes)
        stream.chat_stream = self._kept(turn, answers, stream)
        return stream

    @trace_method("chat")
    async def astream_chat(self, message: str, chat_history: list[ChatMessage] | None = None) -> ConversationStream:
        """As `chat`, piece by piece: `async for text in response.async_response_gen()`."""
        if chat_history is not None:
            await self._memory.aset(chat_history)
        history = await self._memory.aget(input=message)
        turn = await self._aturn(message, history)
        answers = await self._llm.astream_chat([*self._prefix_messages, *history, turn.message], **turn.options)
        stream = ConversationStream(sources=turn.sources, source_nodes=turn.nodes)
        stream.achat_stream = self._akept(turn, answers, stream)
        return stream

    def _kept(self, turn: Turn, answers: Any, stream: ConversationStream) -> Generator[ChatResponse, None, None]:
        """`answers`, after which the conversation holds the message and what was said, whole or not."""
        record = _Record(stream)
        try:
            with record, closing(answers):
                for answer in answers:
                    yield record.told(answer)
        finally:
            if record.latest is not None:
                self._memory.put_messages([turn.message, record.latest.message])

    async def _akept(self, turn: Turn, answers: Any, stream: ConversationStream) -> AsyncGenerator[ChatResponse, None]:
        """As `_kept`."""
        record = _Record(stream)
        try:
            with record:
                async with aclosing(answers):
                    async for answer in answers:
                        yield record.told(answer)
        finally:
            if record.latest is not None:
                await self._memory.aput_messages([turn.message, record.latest.message])

    def reset(self) -> None:
        """Forget the conversation."""
        self._memory.reset()

    @property
    def chat_history(self) -> list[ChatMessage]:
        """The conversation so far."""
        return self._memory.get_all()


class _Record:
    """What was said of one streamed answer, with LlamaIndex's events. Of one that failed, nothing counts as said."""

    def __init__(self, stream: ConversationStream) -> None:
        self.latest: ChatResponse | None = None
        self._stream = stream
        self._tell = instrumentation.get_dispatcher(__name__).event

    def __enter__(self) -> None:
        self._tell(StreamChatStartEvent())

    def told(self, answer: ChatResponse) -> ChatResponse:
        self.latest = answer
        if answer.delta:
            self._tell(StreamChatDeltaReceivedEvent(delta=answer.delta))
        return answer

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._tell(StreamChatEndEvent())
        elif isinstance(error, Exception):
            self.latest = None
            self._tell(StreamChatErrorEvent(exception=error))
        self._stream.metadata["usage"] = usage_of(self.latest)


def new_memory(llm: LLM, chat_history: list[ChatMessage] | None) -> Memory:
    """A memory that drops nothing before the model's window is full: what is dropped must be read again."""
    return Memory.from_defaults(chat_history=chat_history or [], token_limit=llm.metadata.context_window)


def prefix(llm: LLM, system_prompt: str | None, prefix_messages: Sequence[ChatMessage] | None) -> list[ChatMessage]:
    """What stands before the conversation. Raises ConfigError if both are given."""
    if system_prompt is not None and prefix_messages is not None:
        raise ConfigError("Give either system_prompt or prefix_messages, not both.")
    if system_prompt is None:
        return list(prefix_messages or ())
    return [ChatMessage(role=llm.metadata.system_role, content=system_prompt)]


def said(message: str, **notes: Any) -> ChatMessage:
    """A user's message; `notes` stay with it and are not shown to the model."""
    return ChatMessage(role=MessageRole.USER, content=message, additional_kwargs=notes)


def _whole(turn: Turn, response: ChatResponse) -> AgentChatResponse:
    return AgentChatResponse(
        response=response.message.content or "",
        sources=turn.sources,
        source_nodes=turn.nodes,
        metadata={"usage": usage_of(response)},
    )
