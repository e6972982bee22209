"""`ZSMergeDocumentQueryEngine`: questions to whole documents instead of to what a retriever found in them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any

from llama_index.core import instrumentation
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole
from llama_index.core.base.response.schema import (
    RESPONSE_TYPE,
    AsyncStreamingResponse,
    PydanticResponse,
    Response,
    StreamingResponse,
)
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.callbacks.base import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.llms.llm import LLM
from llama_index.core.prompts.mixin import PromptMixinType
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from llama_index.llms.zsmerge._parsing import parse, text_of
from llama_index.llms.zsmerge._responses import usage_of
from llama_index.llms.zsmerge.documents import DocumentReader, as_sources

from zsmerge_llm.errors import ConfigError


class ZSMergeDocumentQueryEngine(BaseQueryEngine):
    """Answers from whole documents. They are read once, with the first question; each question goes on from there on a
    copy of the cache, so it costs its own tokens only, and no question sees another.

    `response.metadata["usage"]` says what an answer cost (of a streamed one, when it has ended), `source_nodes` are the
    documents.

    Args:
        documents: documents, nodes or texts; they become one document, in their order.
        llm: a `ZSMergeLLM`. None: `Settings.llm`.
        name: of the session that keeps the document, to find it again in another process (`sessions_dir`).
        probe: what will be asked, as far as that is known. It decides what a cache smaller than the document keeps.
        output_cls: answer with objects of this class (`PydanticResponse`) instead of text.
        streaming: answer with `StreamingResponse`s, from `aquery` with `AsyncStreamingResponse`s.

    Raises:
        InputError: no documents. ConfigError: another LLM, or `streaming` together with `output_cls`.

    Examples:
        ```python
        engine = ZSMergeDocumentQueryEngine(SimpleDirectoryReader("reports").load_data(), llm=ZSMergeLLM("smollm2"))
        print(engine.query("Who signed the last report?"))
        ```
    """

    def __init__(
        self,
        documents: Sequence[BaseNode | NodeWithScore | str],
        llm: LLM | None = None,
        *,
        name: str | None = None,
        probe: str | None = None,
        output_cls: type[BaseModel] | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if streaming and output_cls is not None:
            raise ConfigError("An object of output_cls comes whole: leave out streaming.")
        self._sources = as_sources(documents)
        self._reader = DocumentReader(llm, name, probe)
        self._llm = self._reader.llm
        self._output_cls = output_cls
        self._streaming = streaming
        super().__init__(callback_manager or self._llm.callback_manager)

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """All documents, whatever the question."""
        return list(self._sources)

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """An answer from these nodes, which are read once too. Other nodes than the engine's are another document."""
        with _Synthesis(self.callback_manager, query_bundle) as synthesis:
            sources = [*nodes, *(additional_source_nodes or ())]
            messages, options = self._question(query_bundle, self._reader.read(nodes))
            if self._streaming:
                metadata = _metadata(sources)
                pieces = _pieces(self._llm.stream_chat(messages, **options), metadata)
                return synthesis.ended(StreamingResponse(pieces, source_nodes=sources, metadata=metadata))
            return synthesis.ended(self._answer(self._llm.chat(messages, **options), sources))

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """As `synthesize`."""
        with _Synthesis(self.callback_manager, query_bundle) as synthesis:
            sources = [*nodes, *(additional_source_nodes or ())]
            messages, options = self._question(query_bundle, await self._reader.aread(nodes))
            if self._streaming:
                metadata = _metadata(sources)
                pieces = _apieces(await self._llm.astream_chat(messages, **options), metadata)
                return synthesis.ended(AsyncStreamingResponse(pieces, source_nodes=sources, metadata=metadata))
            return synthesis.ended(self._answer(await self._llm.achat(messages, **options), sources))

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(CBEventType.QUERY, payload=_asked(query_bundle)) as event:
            response = self.synthesize(query_bundle, self.retrieve(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(CBEventType.QUERY, payload=_asked(query_bundle)) as event:
            response = await self.asynthesize(query_bundle, self.retrieve(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _question(self, query_bundle: QueryBundle, session: str) -> tuple[list[ChatMessage], dict[str, Any]]:
        """Messages and options of the call that asks about a document's session."""
        question = ChatMessage(role=MessageRole.USER, content=query_bundle.query_str)
        messages = self._llm._extend_messages([question])
        if self._output_cls is None:
            return messages, {"session": session}
        _, _, options = self._llm.structured_request(self._output_cls, messages, {"session": session})
        return messages, options

    def _answer(self, response: ChatResponse, sources: list[NodeWithScore]) -> RESPONSE_TYPE:
        metadata, text = {**_metadata(sources), "usage": usage_of(response)}, text_of(response)
        if self._output_cls is not None:
            return PydanticResponse(parse(self._output_cls, text), source_nodes=sources, metadata=metadata)
        return Response(text, source_nodes=sources, metadata=metadata)


class _Synthesis:
    """The events around one synthesis, for callbacks and instrumentation."""

    def __init__(self, callback_manager: CallbackManager, query: QueryBundle) -> None:
        self._event = callback_manager.event(CBEventType.SYNTHESIZE, payload=_asked(query))
        self._query = query

    def __enter__(self) -> _Synthesis:
        self._context = self._event.__enter__()
        instrumentation.get_dispatcher(__name__).event(SynthesizeStartEvent(query=self._query))
        return self

    def __exit__(self, *error: Any) -> None:
        self._event.__exit__(*error)

    def ended(self, response: RESPONSE_TYPE) -> RESPONSE_TYPE:
        """Tells that `response` is there, and gives it back."""
        self._context.on_end(payload={EventPayload.RESPONSE: response})
        instrumentation.get_dispatcher(__name__).event(SynthesizeEndEvent(query=self._query, response=response))
        return response


def _asked(query: QueryBundle) -> dict[str, Any]:
    return {EventPayload.QUERY_STR: query.query_str}


def _metadata(sources: Sequence[NodeWithScore]) -> dict[str, Any]:
    """The metadata of each source by its id, as in every response of LlamaIndex."""
    return {source.node.node_id: source.node.metadata for source in sources}


def _pieces(answers: Any, metadata: dict[str, Any]) -> Generator[str, None, None]:
    """The text of a streamed answer; when it has ended, `metadata` knows its usage. Closing it closes `answers`."""
    with closing(answers):
        for answer in answers:
            yield answer.delta or ""
            metadata["usage"] = usage_of(answer)


async def _apieces(answers: Any, metadata: dict[str, Any]) -> AsyncGenerator[str, None]:
    async with aclosing(answers):
        async for answer in answers:
            yield answer.delta or ""
            metadata["usage"] = usage_of(answer)
