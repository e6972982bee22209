"""`ZSMergeDocumentQueryEngine`: questions about whole documents instead of about retrieved nodes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from typing import Any

from llama_index.core import instrumentation
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, CompletionResponse, MessageRole
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
    """Answer questions about whole documents, which are read once, at the first question.

    Each question is answered on a copy of the documents' cache: it reads its own tokens only, and does not see other
    questions. `response.metadata["usage"]` is the usage of an answer (of a streamed one, at its end); `source_nodes`
    are the documents.

    Args:
        documents: documents, nodes or texts; they are joined in this order.
        llm: a `ZSMergeLLM`. None: `Settings.llm`.
        name: name of the documents' session, to reuse it in another process (`sessions_dir`).
        probe: the expected questions; a cache smaller than the documents keeps the tokens that they attend to.
        notes: whether the model writes a note about each section, or what about, for questions about all of it.
        output_cls: answer with objects of this class (`PydanticResponse`) instead of text.
        streaming: answer with `StreamingResponse`, from `aquery` with `AsyncStreamingResponse`.

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
        notes: str | bool = False,
        output_cls: type[BaseModel] | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        if streaming and output_cls is not None:
            raise ConfigError("output_cls cannot be streamed: leave out streaming.")
        self._sources = as_sources(documents)
        self._reader = DocumentReader(llm, name, probe, notes)
        self._llm = self._reader.llm
        self._output_cls = output_cls
        self._streaming = streaming
        super().__init__(callback_manager or self._llm.callback_manager)

    def _get_prompt_modules(self) -> PromptMixinType:
        return {}

    def retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """Return all documents, whatever the question."""
        return list(self._sources)

    def synthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Answer from these nodes, which are read once too. Other nodes than the engine's are another document."""
        with _Synthesis(self.callback_manager, query_bundle) as synthesis:
            sources = [*nodes, *(additional_source_nodes or ())]
            messages, options = self._chat_arguments(query_bundle, self._reader.read(nodes))
            if self._streaming:
                metadata = _source_metadata(sources)
                stream = _stream_text(self._llm.stream_chat(messages, **options), metadata)
                return synthesis.end(StreamingResponse(stream, source_nodes=sources, metadata=metadata))
            if self._output_cls is None:
                return synthesis.end(self._response(self._llm.chat(messages, **options), sources))
            answer = self._llm.structured_answer(self._output_cls, messages, options)
            return synthesis.end(self._response(answer, sources))

    async def asynthesize(
        self,
        query_bundle: QueryBundle,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
    ) -> RESPONSE_TYPE:
        """Async `synthesize`."""
        with _Synthesis(self.callback_manager, query_bundle) as synthesis:
            sources = [*nodes, *(additional_source_nodes or ())]
            messages, options = self._chat_arguments(query_bundle, await self._reader.aread(nodes))
            if self._streaming:
                metadata = _source_metadata(sources)
                stream = _astream_text(await self._llm.astream_chat(messages, **options), metadata)
                return synthesis.end(AsyncStreamingResponse(stream, source_nodes=sources, metadata=metadata))
            if self._output_cls is None:
                return synthesis.end(self._response(await self._llm.achat(messages, **options), sources))
            answer = await self._llm.astructured_answer(self._output_cls, messages, options)
            return synthesis.end(self._response(answer, sources))

    def _query(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(CBEventType.QUERY, payload=_query_payload(query_bundle)) as event:
            response = self.synthesize(query_bundle, self.retrieve(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    async def _aquery(self, query_bundle: QueryBundle) -> RESPONSE_TYPE:
        with self.callback_manager.event(CBEventType.QUERY, payload=_query_payload(query_bundle)) as event:
            response = await self.asynthesize(query_bundle, self.retrieve(query_bundle))
            event.on_end(payload={EventPayload.RESPONSE: response})
        return response

    def _chat_arguments(self, query_bundle: QueryBundle, session: str) -> tuple[list[ChatMessage], dict[str, Any]]:
        """Return messages and options of the call that asks about a document's session."""
        question = ChatMessage(role=MessageRole.USER, content=query_bundle.query_str)
        messages = self._llm._extend_messages([question])
        return messages, {"session": session}

    def _response(self, response: ChatResponse | CompletionResponse, sources: list[NodeWithScore]) -> RESPONSE_TYPE:
        metadata, text = {**_source_metadata(sources), "usage": usage_of(response)}, text_of(response)
        if self._output_cls is not None:
            return PydanticResponse(parse(self._output_cls, response), source_nodes=sources, metadata=metadata)
        return Response(text, source_nodes=sources, metadata=metadata)


class _Synthesis:
    """Dispatches the events of one synthesis to callbacks and instrumentation."""

    def __init__(self, callback_manager: CallbackManager, query: QueryBundle) -> None:
        self._event = callback_manager.event(CBEventType.SYNTHESIZE, payload=_query_payload(query))
        self._query = query

    def __enter__(self) -> _Synthesis:
        self._context = self._event.__enter__()
        instrumentation.get_dispatcher(__name__).event(SynthesizeStartEvent(query=self._query))
        return self

    def __exit__(self, *error: Any) -> None:
        self._event.__exit__(*error)

    def end(self, response: RESPONSE_TYPE) -> RESPONSE_TYPE:
        """Dispatch the end events and return `response`."""
        self._context.on_end(payload={EventPayload.RESPONSE: response})
        instrumentation.get_dispatcher(__name__).event(SynthesizeEndEvent(query=self._query, response=response))
        return response


def _query_payload(query: QueryBundle) -> dict[str, Any]:
    return {EventPayload.QUERY_STR: query.query_str}


def _source_metadata(sources: Sequence[NodeWithScore]) -> dict[str, Any]:
    """Return the metadata of each source by its id, as in every response of LlamaIndex."""
    return {source.node.node_id: source.node.metadata for source in sources}


def _stream_text(responses: Any, metadata: dict[str, Any]) -> Generator[str, None, None]:
    """Yield the deltas of a streamed answer and add its usage to `metadata`. Closing it closes `responses`."""
    with closing(responses):
        for response in responses:
            yield response.delta or ""
            metadata["usage"] = usage_of(response)


async def _astream_text(responses: Any, metadata: dict[str, Any]) -> AsyncGenerator[str, None]:
    async with aclosing(responses):
        async for response in responses:
            yield response.delta or ""
            metadata["usage"] = usage_of(response)
