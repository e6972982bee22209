"""`WholeHistoryMemory`: a memory that no message leaves."""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.llms.llm import LLM
from llama_index.core.memory.types import DEFAULT_CHAT_STORE_KEY, BaseChatStoreMemory
from llama_index.core.storage.chat_store import BaseChatStore, SimpleChatStore
from typing_extensions import Self


class WholeHistoryMemory(BaseChatStoreMemory):
    """Hold a conversation for agents and chat engines, and give the model all of it.

    ```python
    memory = WholeHistoryMemory.from_defaults()
    await agent.run("Hello.", memory=memory)
    ```

    LlamaIndex's `Memory` and `ChatMemoryBuffer` remove the oldest messages beyond a token limit. What is left begins
    differently, so that a model that keeps its KV cache has to read it again. They also count tokens at each turn. With
    a cache of constant size neither has a use.
    """

    @classmethod
    def class_name(cls) -> str:
        return "WholeHistoryMemory"

    @classmethod
    def from_defaults(  # type: ignore[override]  # an unknown option is an error, not ignored as in LlamaIndex's
        cls,
        chat_history: list[ChatMessage] | None = None,
        llm: LLM | None = None,
        chat_store: BaseChatStore | None = None,
        chat_store_key: str = DEFAULT_CHAT_STORE_KEY,
    ) -> Self:
        """Create a memory. `llm` has no effect: there is no limit to derive from it.

        Args:
            chat_history: messages to begin with.
            chat_store: where messages are kept. None: in this process.
            chat_store_key: name of the conversation in the store.
        """
        memory = cls(chat_store=chat_store or SimpleChatStore(), chat_store_key=chat_store_key)
        if chat_history is not None:
            memory.set(list(chat_history))
        return memory

    def get(self, input: str | None = None, **kwargs: Any) -> list[ChatMessage]:
        """Return all messages. The arguments have no effect."""
        return list(self.get_all())

    async def aget(self, input: str | None = None, **kwargs: Any) -> list[ChatMessage]:
        """Async `get`."""
        return list(await self.aget_all())

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Return the messages and the name of the conversation as JSON values."""
        messages = [message.model_dump(mode="json") for message in self.get_all()]
        return {"class_name": self.class_name(), "chat_store_key": self.chat_store_key, "chat_history": messages}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> Self:
        """Create a memory in this process from `to_dict()`."""
        messages = [ChatMessage.model_validate(message) for message in data["chat_history"]]
        return cls.from_defaults(messages, chat_store_key=data["chat_store_key"])
