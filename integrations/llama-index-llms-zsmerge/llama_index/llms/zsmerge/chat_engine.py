"""Chat engines whose conversations only grow: about whole documents, and with retrieved text appended."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms.llm import LLM
from llama_index.core.memory import BaseMemory
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.prompts import PromptTemplate
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.settings import Settings
from llama_index.core.tools import ToolOutput
from llama_index.llms.zsmerge._conversation import ConversationEngine, Turn, new_memory, prefix, said
from llama_index.llms.zsmerge.documents import DocumentReader, as_sources

CONTEXT_TEMPLATE = (
    "Use the context below.\n--------------------\n{context_str}\n--------------------\n\n{query_str}"  # the last line
    # is the question: by it the cache decides what to keep of a long context
)
_SHOWN = "context_nodes"


class ZSMergeDocumentChatEngine(ConversationEngine):
    """A conversation about whole documents, which are read once, with the first message.

    Each turn reads its own tokens only; `response.metadata["usage"]` says so. `source_nodes` are the documents.

    Args:
        documents: documents, nodes or texts; they become one document, in their order.
        llm: a `ZSMergeLLM`. None: `Settings.llm`.
        memory: of the conversation. None: one that drops nothing.
        prefix_messages: what stands before the conversation.
        name, probe: as for `ZSMergeDocumentQueryEngine`.

    Raises:
        InputError: no documents. ConfigError: another LLM.
    """

    def __init__(
        self,
        documents: Sequence[BaseNode | NodeWithScore | str],
        llm: LLM | None = None,
        memory: BaseMemory | None = None,
        prefix_messages: Sequence[ChatMessage] = (),
        *,
        name: str | None = None,
        probe: str | None = None,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._sources = as_sources(documents)
        self._reader = DocumentReader(llm, name, probe)
        model = self._reader.llm
        super().__init__(model, memory or new_memory(model, None), prefix_messages, callback_manager)

    @classmethod
    def from_defaults(
        cls,
        documents: Sequence[BaseNode | NodeWithScore | str],
        llm: LLM | None = None,
        *,
        chat_history: list[ChatMessage] | None = None,
        memory: BaseMemory | None = None,
        system_prompt: str | None = None,
        prefix_messages: Sequence[ChatMessage] | None = None,
        name: str | None = None,
        probe: str | None = None,
    ) -> ZSMergeDocumentChatEngine:
        """The engine with a system prompt and a history."""
        llm = llm or Settings.llm
        before = prefix(llm, system_prompt, prefix_messages)
        return cls(documents, llm, memory or new_memory(llm, chat_history), before, name=name, probe=probe)

    def _turn(self, message: str, history: list[ChatMessage]) -> Turn:
        return Turn(said(message), self._sources, {"session": self._reader.read(self._sources)})

    async def _aturn(self, message: str, history: list[ChatMessage]) -> Turn:
        return Turn(said(message), self._sources, {"session": await self._reader.aread(self._sources)})


class AppendingContextChatEngine(ConversationEngine):
    """Retrieves text for each message and puts it into that message.

    LlamaIndex's own ContextChatEngine writes it into the system message, so that a model has to read the whole
    conversation again at every turn. Here nothing that was read changes: a turn reads the retrieved text and the
    message. Nodes that stand in the conversation already are not appended again.

    Args:
        retriever: finds nodes for a message.
        llm: any LLM; what was read is only kept by one that keeps its cache, as `ZSMergeLLM` does.
        memory: of the conversation. It holds messages as the model reads them, with their context.
        prefix_messages: what stands before the conversation.
        node_postprocessors: applied to the retrieved nodes, in their order.
        context_template: has `{context_str}` and, best at its end, `{query_str}`.
    """

    def __init__(
        self,
        retriever: BaseRetriever,
        llm: LLM,
        memory: BaseMemory,
        prefix_messages: Sequence[ChatMessage] = (),
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        context_template: str | PromptTemplate = CONTEXT_TEMPLATE,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(llm, memory, prefix_messages, callback_manager)
        self._retriever = retriever
        self._node_postprocessors = list(node_postprocessors)
        for postprocessor in self._node_postprocessors:
            postprocessor.callback_manager = self.callback_manager
        if isinstance(context_template, str):
            context_template = PromptTemplate(context_template)
        self._context_template = context_template

    @classmethod
    def from_defaults(
        cls,
        retriever: BaseRetriever,
        llm: LLM | None = None,
        *,
        chat_history: list[ChatMessage] | None = None,
        memory: BaseMemory | None = None,
        system_prompt: str | None = None,
        prefix_messages: Sequence[ChatMessage] | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        context_template: str | PromptTemplate = CONTEXT_TEMPLATE,
    ) -> AppendingContextChatEngine:
        """The engine with a system prompt and a history."""
        llm = llm or Settings.llm
        before = prefix(llm, system_prompt, prefix_messages)
        memory = memory or new_memory(llm, chat_history)
        return cls(retriever, llm, memory, before, node_postprocessors, context_template)

    def _turn(self, message: str, history: list[ChatMessage]) -> Turn:
        nodes, query = self._retriever.retrieve(message), QueryBundle(message)
        for postprocessor in self._node_postprocessors:
            nodes = postprocessor.postprocess_nodes(nodes, query_bundle=query)
        return self._with_context(message, nodes, history)

    async def _aturn(self, message: str, history: list[ChatMessage]) -> Turn:
        nodes, query = await self._retriever.aretrieve(message), QueryBundle(message)
        for postprocessor in self._node_postprocessors:
            nodes = await postprocessor.apostprocess_nodes(nodes, query_bundle=query)
        return self._with_context(message, nodes, history)

    def _with_context(self, message: str, nodes: list[NodeWithScore], history: list[ChatMessage]) -> Turn:
        shown = {node_id for earlier in history for node_id in earlier.additional_kwargs.get(_SHOWN, ())}
        new = [node for node in nodes if node.node.node_id not in shown]
        if not new:
            return Turn(said(message), nodes, sources=_sources(message, nodes))
        context = "\n\n".join(node.node.get_content(metadata_mode=MetadataMode.LLM).strip() for node in new)
        text = self._context_template.format(context_str=context, query_str=message)
        ids = [node.node.node_id for node in new]
        return Turn(said(text, **{_SHOWN: ids}), nodes, sources=_sources(message, nodes))


def _sources(message: str, nodes: list[NodeWithScore]) -> list[ToolOutput]:
    """What was retrieved, in the form of LlamaIndex's own context engine."""
    found = ToolOutput(tool_name="retriever", content=str(nodes), raw_input={"message": message}, raw_output=nodes)
    return [found]
