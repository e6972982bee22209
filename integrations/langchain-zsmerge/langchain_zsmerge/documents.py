"""`ZSMergeDocuments`: questions about whole documents, which are read once."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from pydantic import ConfigDict, PrivateAttr, field_validator

from langchain_zsmerge._errors import langchain_errors
from langchain_zsmerge._structured import structured_output
from langchain_zsmerge.chat_models import ChatZSMerge
from zsmerge_llm import aio
from zsmerge_llm.errors import ConfigError, InputError


class ZSMergeDocuments(RunnableSerializable[LanguageModelInput, AIMessage]):
    """Answers questions about whole documents, without a vector store. They are read once, at the first question.

    ```python
    report = ZSMergeDocuments(model=ChatZSMerge(model="smollm2"), documents=[Path("report.txt")])
    report.invoke("Who signed it?").text
    (report | StrOutputParser()).batch(["When?", "Where?"])
    ```

    Each question is answered on a copy of the documents' cache. A list of messages is a conversation about them, of
    which each turn reads only the new messages. With the model's `sessions_dir` another process reuses the cache.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: ChatZSMerge
    documents: list[Document | Path | str]
    """Texts, paths of UTF-8 text files, or LangChain documents. A string is a text, not a path."""
    session_id: str | None = None
    """Name of the session that holds the documents; by default one is derived from their text."""
    probe: str | None = None
    """The expected questions: a cache smaller than the documents keeps the tokens that they attend to."""
    notes: str | bool = False
    """Whether the model writes a note about each section, or what about, for questions about all of the documents."""

    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @field_validator("documents", mode="after")
    @classmethod
    def _not_empty(cls, documents: list[Document | Path | str]) -> list[Document | Path | str]:
        if not documents:
            raise InputError("There are no documents: give at least one text, path or Document.")
        return documents

    @langchain_errors()
    def read(self, cancel: threading.Event | None = None) -> str:
        """Read the documents unless a session holds them, and return the name of that session.

        Args:
            cancel: an event that stops reading after the current chunk.

        Raises:
            InputError: a file that cannot be read as text, or no text at all.
        """
        text = _join(self.documents)
        with self._lock:
            session = self.model.core.read_document(
                text=text, name=self.session_id, probe=self.probe, notes=self.notes, cancel=cancel
            )
        return str(session.name)

    async def aread(self) -> str:
        """Async `read`, in a thread. Cancelling the task stops reading after the current chunk."""
        return await aio.call(self.read)

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        return self.model.invoke(input, config, **{**kwargs, "session_id": self.read()})

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return await self.model.ainvoke(input, config, **{**kwargs, "session_id": await self.aread()})

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        yield from self.model.stream(input, config, **{**kwargs, "session_id": self.read()})

    async def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        async for chunk in self.model.astream(input, config, **{**kwargs, "session_id": await self.aread()}):
            yield chunk

    @langchain_errors()
    def with_structured_output(
        self,
        schema: Any,
        *,
        method: Literal["json_schema", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        retry_invalid: bool | None = None,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a runnable whose answers follow a schema. See `ChatZSMerge.with_structured_output`.

        Raises:
            ConfigError: method "function_calling". A tool's definition precedes the documents in the prompt, so they
                would be read again.
        """
        if method not in ("json_schema", "json_mode"):
            raise ConfigError(f"method={method!r} cannot be used on documents: use 'json_schema' or 'json_mode'.")
        retry = self.model.retry_invalid if retry_invalid is None else retry_invalid
        return structured_output(self, schema, method, include_raw, strict, retry)

    def __getstate__(self) -> dict[Any, Any]:
        return {**super().__getstate__(), "__pydantic_private__": None}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__({**state, "__pydantic_private__": {"_lock": threading.Lock()}})


def _join(documents: list[Document | Path | str]) -> str:
    """Return one text. Several documents stand under their titles, where they have one."""
    parts = [_title_and_text(document) for document in documents]
    if len(parts) == 1:
        return parts[0][1]
    return "\n\n".join(f"{title}\n\n{text}" if title else text for title, text in parts)


def _title_and_text(document: Document | Path | str) -> tuple[str, str]:
    """Return the title of a document ("" without one) and its text."""
    if isinstance(document, Document):
        title = document.metadata.get("title") or document.metadata.get("source") or ""
        return str(title), document.page_content
    if isinstance(document, Path):
        try:
            return document.stem, document.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{document} cannot be read as text ({error}): give a UTF-8 text file.") from error
    return "", document
