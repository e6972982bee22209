"""`ZSMergeDocuments`: whole documents, read once and asked any number of times."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Literal

from langchain_core.documents import Document
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from langchain_zsmerge._tools import structured
from langchain_zsmerge.chat_models import ChatZSMerge
from zsmerge_llm import aio
from zsmerge_llm.errors import ConfigError, InputError


class ZSMergeDocuments(RunnableSerializable[LanguageModelInput, AIMessage]):
    """Answers questions about whole documents, without retrieval. They are read at the first question, and only then.

    ```python
    report = ZSMergeDocuments(model=ChatZSMerge(model="smollm2"), documents=[Path("report.txt")])
    report.invoke("Who signed it?").text
    (report | StrOutputParser()).batch(["When?", "Where?"])
    ```

    Each question is asked on a copy of what was read. A list of messages is a conversation about the documents, of
    which each turn reads only what is new. With the model's `sessions_dir` another process finds the documents read.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: ChatZSMerge
    documents: list[Document | Path | str]
    """Texts, paths of UTF-8 text files, or LangChain documents. A string is a text."""
    session_id: str | None = None
    """The session that holds the documents, for those who want to find it by name."""
    probe: str | None = Field(default=None)
    """What will be asked, as far as that is known: it decides what a cache smaller than the documents keeps."""

    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    @field_validator("documents", mode="after")
    @classmethod
    def _some(cls, documents: list[Document | Path | str]) -> list[Document | Path | str]:
        if not documents:
            raise InputError("There are no documents: give at least one text, path or Document.")
        return documents

    def read(self, cancel: threading.Event | None = None) -> str:
        """Read the documents, unless the model holds them already; the name of their session.

        Args:
            cancel: stops the reading after the current chunk.

        Raises:
            InputError: a file that cannot be read as text, or no text at all.
        """
        text = _joined(self.documents)
        with self._lock:
            session = self.model.core.read_document(text=text, name=self.session_id, probe=self.probe, cancel=cancel)
        return str(session.name)

    async def aread(self) -> str:
        """As `read`, in a thread. Cancelling the task stops the reading after the current chunk."""
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

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: Literal["json_schema", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """What a question finds in the documents, in the form of a schema. As `ChatZSMerge.with_structured_output`.

        Raises:
            ConfigError: another method. A tool would have to stand before the documents, which would be read again.
        """
        if method not in ("json_schema", "json_mode"):
            raise ConfigError(f"method={method!r} cannot be used on documents: use 'json_schema' or 'json_mode'.")
        return structured(self, schema, method, include_raw, strict)

    def __getstate__(self) -> dict[Any, Any]:
        return {**super().__getstate__(), "__pydantic_private__": None}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__({**state, "__pydantic_private__": {"_lock": threading.Lock()}})


def _joined(documents: list[Document | Path | str]) -> str:
    """One text; where there are several, each under its title, if it has one."""
    parts = [_part(document) for document in documents]
    if len(parts) == 1:
        return parts[0][1]
    return "\n\n".join(f"{title}\n\n{text}" if title else text for title, text in parts)


def _part(document: Document | Path | str) -> tuple[str, str]:
    """A document's title, or "", and its text."""
    if isinstance(document, Document):
        title = document.metadata.get("title") or document.metadata.get("source") or ""
        return str(title), document.page_content
    if isinstance(document, Path):
        try:
            return document.stem, document.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{document} cannot be read as text ({error}): give a UTF-8 text file.") from error
    return "", document
