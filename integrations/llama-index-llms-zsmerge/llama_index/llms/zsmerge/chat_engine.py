"""Chat engines about whole documents, and with retrieved text appended to the conversation."""

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
from llama_index.llms.zsmerge._conversation import ConversationEngine, Turn, new_memory, prefix, user_message
from llama_index.llms.zsmerge.documents import DocumentReader, as_sources
from llama_index.llms.zsmerge.memory import WholeHistoryMemory

CONTEXT_TEMPLATE = "Use the context below.\n--------------------\n{context_str}\n--------------------\n\n{query_str}"
"""The question comes last: the cache ranks the tokens of a long context by its attention."""
_NODE_IDS = "context_nodes"


class ZSMergeDocumentChatEngine(ConversationEngine):
    """A conversation about whole documents, which are read once, at the first message.

    Each turn reads its own tokens only: see `response.metadata["usage"]`. `source_nodes` are the documents.

    Args:
        documents: documents, nodes or texts; they are joined in this order.
        llm: a `ZSMergeLLM`. None: `Settings.llm`.
        memory: holds the conversation. None: one that removes no message.
        prefix_messages: messages before the conversation.
        name, probe, notes: as for `ZSMergeDocumentQueryEngine`.

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
        notes: str | bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        self._sources = as_sources(documents)
        self._reader = DocumentReader(llm, name, probe, notes)
        model = self._reader.llm
        super().__init__(model, memory or WholeHistoryMemory.from_defaults(), prefix_messages, callback_manager)

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
        notes: str | bool = False,
    ) -> ZSMergeDocumentChatEngine:
        """Create the engine with a system prompt and a history."""
        llm = llm or Settings.llm
        before = prefix(llm, system_prompt, prefix_messages)
        memory = memory or WholeHistoryMemory.from_defaults(chat_history)
        return cls(documents, llm, memory, before, name=name, probe=probe, notes=notes)

    def _turn(self, message: str, history: list[ChatMessage]) -> Turn:
        return Turn(user_message(message), self._sources, {"session": self._reader.read(self._sources)})

    async def _aturn(self, message: str, history: list[ChatMessage]) -> Turn:
        return Turn(user_message(message), self._sources, {"session": await self._reader.aread(self._sources)})


class AppendingContextChatEngine(ConversationEngine):
    """Retrieve text for each message and append it to the conversation with that message.

    LlamaIndex's ContextChatEngine writes it into the system message, so the model must read the whole conversation
    again at every turn. Here the conversation so far stays the same, and a turn reads the retrieved text and the
    message. Nodes that the conversation holds already are not appended again.

    Args:
        retriever: finds nodes for a message.
        llm: any LLM; only one that keeps its KV cache between turns, such as `ZSMergeLLM`, saves the reading.
        memory: holds the conversation: messages as the model reads them, with their context.
        prefix_messages: messages before the conversation.
        node_postprocessors: applied to the retrieved nodes, in this order.
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
        """Create the engine with a system prompt and a history."""
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
        known = {node_id for earlier in history for node_id in earlier.additional_kwargs.get(_NODE_IDS, ())}
        new = [node for node in nodes if node.node.node_id not in known]
        if not new:
            return Turn(user_message(message), nodes, sources=_tool_outputs(message, nodes))
        context = "\n\n".join(node.node.get_content(metadata_mode=MetadataMode.LLM).strip() for node in new)
        text = self._context_template.format(context_str=context, query_str=message)
        ids = [node.node.node_id for node in new]
        return Turn(user_message(text, **{_NODE_IDS: ids}), nodes, sources=_tool_outputs(message, nodes))


def _tool_outputs(message: str, nodes: list[NodeWithScore]) -> list[ToolOutput]:
    """Return the retrieved nodes as LlamaIndex's ContextChatEngine does."""
    output = ToolOutput(tool_name="retriever", content=str(nodes), raw_input={"message": message}, raw_output=nodes)
    return [output]
