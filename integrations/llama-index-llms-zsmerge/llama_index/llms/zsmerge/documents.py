"""Whole documents in one session of the model: read once, for any number of questions."""

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
    """Read nodes as one document, once for all concurrent questions.

    Args:
        llm: the model. None: `Settings.llm`.
        name: name of the document's session, to reuse it in another process (`sessions_dir`).
        probe: the expected questions; a cache smaller than the document keeps the tokens that they attend to.
        notes: whether the model writes a note about each section, or what about, for questions about the whole.

    Raises:
        ConfigError: `llm` is no `ZSMergeLLM`, or a base model.
    """

    def __init__(
        self, llm: LLM | None = None, name: str | None = None, probe: str | None = None, notes: str | bool = False
    ) -> None:
        self.llm = _check_llm(llm)
        self._name = name
        self._probe = probe
        self._notes = notes
        self._lock = threading.Lock()

    def read(self, nodes: Sequence[NodeWithScore], cancel: threading.Event | None = None) -> str:
        """Read the text of these nodes unless a session holds it, and return the name of that session.

        Raises:
            InputError: the nodes have no text.
        """
        text = "\n\n".join(node.node.get_content(metadata_mode=MetadataMode.LLM) for node in nodes)
        if not text.strip():
            raise InputError("The documents have no text: give some to read.")
        with self._lock:
            session = self.llm.llm.read_document(
                text=text, name=self._name, probe=self._probe, notes=self._notes, cancel=cancel
            )
        return session.name

    async def aread(self, nodes: Sequence[NodeWithScore]) -> str:
        """Async `read`, in a thread. Cancelling the task stops reading after the current chunk."""
        return await aio.call(lambda cancel: self.read(nodes, cancel))


def as_sources(documents: Sequence[BaseNode | NodeWithScore | str]) -> list[NodeWithScore]:
    """Convert documents, nodes or plain texts to source nodes.

    Raises:
        InputError: an empty list, or an element of another type.
    """
    if isinstance(documents, str) or not documents:
        raise InputError("Give a list with at least one document, node or text.")
    return [_source_node(document) for document in documents]


def _source_node(document: Any) -> NodeWithScore:
    from llama_index.core.schema import Document

    if isinstance(document, NodeWithScore):
        return document
    if isinstance(document, str):
        document = Document(text=document)
    if not isinstance(document, BaseNode):
        raise InputError(f"A document is a Document, a node or a text, not a {type(document).__name__}.")
    return NodeWithScore(node=document)


def _check_llm(llm: LLM | None) -> ZSMergeLLM:
    if llm is None:
        from llama_index.core.settings import Settings

        llm = Settings.llm
    if not isinstance(llm, ZSMergeLLM) or not llm.is_chat_model:
        raise ConfigError(
            f"Questions about documents need a ZSMergeLLM with a chat template, not {llm.class_name()} "
            f"{llm.metadata.model_name!r}: pass one as llm=, or set Settings.llm."
        )
    return llm
