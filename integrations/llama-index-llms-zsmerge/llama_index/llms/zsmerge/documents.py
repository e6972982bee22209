"""Whole documents in one session of the model: read once, asked any number of times."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore
from llama_index.llms.zsmerge.base import ZSMergeLLM

from zsmerge_llm import aio
from zsmerge_llm.errors import ConfigError, InputError

if TYPE_CHECKING:
    from llama_index.core.llms.llm import LLM


class DocumentReader:
    """Reads nodes as one document, at most once however many ask at the same time.

    Args:
        llm: the model. None: `Settings.llm`.
        name: of the session that keeps the document, to find it again in another process (`sessions_dir`).
        probe: what will be asked, as far as that is known. It decides what a cache smaller than the document keeps.

    Raises:
        ConfigError: `llm` is another LLM than `ZSMergeLLM`, or a base model.
    """

    def __init__(self, llm: LLM | None = None, name: str | None = None, probe: str | None = None) -> None:
        self.llm = _checked(llm)
        self._name = name
        self._probe = probe
        self._lock = threading.Lock()

    def read(self, nodes: Sequence[NodeWithScore], cancel: threading.Event | None = None) -> str:
        """The name of the session that holds these nodes' text; reads them only if the model has not yet.

        Raises:
            InputError: the nodes hold no text.
        """
        text = "\n\n".join(node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes)
        if not text.strip():
            raise InputError("The documents hold no text: give some to read.")
        with self._lock:
            session = self.llm.llm.read_document(text=text, name=self._name, probe=self._probe, cancel=cancel)
        return session.name

    async def aread(self, nodes: Sequence[NodeWithScore]) -> str:
        """As `read`, in a thread. Cancelling the task stops the reading after the current chunk."""
        return await aio.call(lambda cancel: self.read(nodes, cancel))


def as_sources(documents: Sequence[BaseNode | NodeWithScore | str]) -> list[NodeWithScore]:
    """Documents, nodes or plain texts as source nodes.

    Raises:
        InputError: there are none, or something else is among them.
    """
    if isinstance(documents, str) or not documents:
        raise InputError("Give a list with at least one document, node or text.")
    return [_source(document) for document in documents]


def _source(document: Any) -> NodeWithScore:
    from llama_index.core.schema import Document

    if isinstance(document, NodeWithScore):
        return document
    if isinstance(document, str):
        document = Document(text=document)
    if not isinstance(document, BaseNode):
        raise InputError(f"A document is a Document, a node or a text, not a {type(document).__name__}.")
    return NodeWithScore(node=document)


def _checked(llm: LLM | None) -> ZSMergeLLM:
    if llm is None:
        from llama_index.core.settings import Settings

        llm = Settings.llm
    if not isinstance(llm, ZSMergeLLM) or not llm.is_chat_model:
        raise ConfigError(
            f"A document session needs a ZSMergeLLM with a chat template, not {llm.class_name()} "
            f"{llm.metadata.model_name!r}: pass one as llm=, or set Settings.llm."
        )
    return llm
