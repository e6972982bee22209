"""`ChatZSMerge`: LangChain's chat model on zsmerge-llm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, Literal, cast

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from pydantic import BaseModel, ConfigDict

from langchain_zsmerge._calls import Call
from langchain_zsmerge._messages import to_ai_message, to_ai_message_chunk, to_messages
from langchain_zsmerge._settings import Request, ZSMergeSettings
from langchain_zsmerge._tools import as_choice, as_tools, structured
from zsmerge_llm import aio

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models.base import LangSmithParams
    from langchain_core.tools import BaseTool

    from zsmerge_llm import Chunk


_FORM = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "grammar")
"""Options of a call that say what its answer may look like."""


class ChatZSMerge(ZSMergeSettings, BaseChatModel):
    """A local chat model whose KV cache never grows.

    ```python
    from langchain_zsmerge import ChatZSMerge
    from zsmerge_llm import CacheConfig

    chat = ChatZSMerge(model="smollm2", cache=CacheConfig(slots=1024), temperature=0)
    chat.invoke("Why is the sky blue?")
    chat.bind(session_id="ann").invoke(messages)                                   # a conversation, by name
    chat.invoke(messages, config={"configurable": {"thread_id": "ann"}})           # the same
    chat.invoke(messages, reread=True)                     # read everything again, for this question
    ```

    A conversation is recognised by its messages; a session id only helps to find it. Constructing costs nothing: the
    model loads at the first answer (or token count). Objects with the same loading settings share one model.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    @property
    def _llm_type(self) -> str:
        return "zsmerge-chat"

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=self._stops(stop) or None, **kwargs)

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        kwargs.pop(
            "session_id", None
        )  # where an answer was computed does not change it: LangChain's cache may serve it
        return super()._get_llm_string(stop=stop, **kwargs)

    def _resolve_model_profile(self) -> Any:
        return {
            "text_inputs": True,
            "image_inputs": False,
            "image_url_inputs": False,
            "pdf_inputs": False,
            "audio_inputs": False,
            "video_inputs": False,
            "text_outputs": True,
            "tool_calling": True,
            "tool_choice": True,
            "tool_call_streaming": True,
            "structured_output": True,
            **({} if self.max_input_tokens is None else {"max_input_tokens": self.max_input_tokens}),
        }

    def _note_window(self) -> None:
        """Once the model is loaded its profile can say how much it takes."""
        profile = getattr(self, "profile", None)  # langchain-core has profiles since 1.1
        if profile is not None and "max_input_tokens" not in profile and self._llm.context_window is not None:
            profile["max_input_tokens"] = self._llm.context_window

    # A session may come with the config, which LangChain does not hand down to `_generate` and `_stream`.

    def invoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return super().invoke(input, config, stop=stop, **_with_session(config, kwargs))

    async def ainvoke(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AIMessage:
        return await super().ainvoke(input, config, stop=stop, **_with_session(config, kwargs))

    def stream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, stop=stop, **_with_session(config, kwargs))

    def astream(
        self,
        input: LanguageModelInput,
        config: RunnableConfig | None = None,
        *,
        stop: list[str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, stop=stop, **_with_session(config, kwargs))

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().stream_events(input, config, **_with_session(config, kwargs))

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().astream_events(input, config, **_with_session(config, kwargs))

    # What BaseChatModel builds everything else on.

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._answer(Call(self.timeout), messages, self._request(stop, kwargs))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = self._request(stop, kwargs)
        return await aio.call(lambda cancel: self._answer(Call(self.timeout, cancel), messages, request))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for chunk in self._pieces(Call(self.timeout), messages, self._request(stop, kwargs)):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        request = self._request(stop, kwargs)
        pieces = aio.stream(lambda cancel: self._pieces(Call(self.timeout, cancel), messages, request))
        async with aclosing(pieces) as chunks:
            async for chunk in chunks:
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _request(self, stop: list[str] | None, kwargs: dict[str, Any]) -> Request:
        """One call with the keywords of `LLM.chat`. Raises ConfigError."""
        changes = self._options(kwargs, ("session_id", "reread", *_FORM))
        tools = as_tools(kwargs.get("tools") or ())
        choice = as_choice(kwargs.get("tool_choice"), tools) if tools else None
        hints = {"tools": tools, "tool_choice": choice, "session": kwargs.get("session_id")}
        hints["reread"] = kwargs.get("reread")
        given = {name: hint for name, hint in hints.items() if hint}
        for name in ("parallel_tool_calls", "response_format", "grammar"):
            if kwargs.get(name) is not None:
                given[name] = kwargs[name]
        model = kwargs.get("model") or self.model
        return Request(self._core(model), model, {"sampling": self._sampling(stop, changes), **given})

    def _answer(self, call: Call, messages: list[BaseMessage], request: Request) -> ChatResult:
        with call:
            result = request.core.chat(to_messages(messages), cancel=call.cancel, **request.settings)
            call.check(result.finish_reason)
        self._note_window()
        return ChatResult(generations=[ChatGeneration(message=to_ai_message(result, request.model))])

    def _pieces(
        self, call: Call, messages: list[BaseMessage], request: Request
    ) -> Generator[ChatGenerationChunk, None, None]:
        calls = 0
        stream = request.core.stream(to_messages(messages), cancel=call.cancel, **request.settings)
        with call, closing(cast("Generator[Chunk]", stream)) as chunks:
            for chunk in chunks:
                call.check(chunk.finish_reason)
                if chunk.finish_reason is not None:
                    self._note_window()
                yield ChatGenerationChunk(message=to_ai_message_chunk(chunk, request.model, calls))
                calls += len(chunk.tool_calls) + len(chunk.invalid_tool_calls)

    # Tools and forms of answers

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools: pydantic classes, functions, LangChain tools or dicts of the usual formats.

        The calls come back as `tool_calls`. Their arguments always fit the tool's schema: a grammar lets nothing else
        through.

        Args:
            tool_choice: "auto" (the default: the model decides), "any" or "required" or True (some tool must be
                called), "none", or the name of the one that must be.
            parallel_tool_calls: whether one answer may hold several calls; they may by default.
            strict: True refuses schemas with keywords that cannot be enforced, which else are ignored.
            kwargs: options of the calls, such as `temperature` or `response_format`.

        Raises:
            ConfigError: a `tool_choice` that is none of these.
        """
        definitions = as_tools(tools, strict)
        choice = as_choice(tool_choice, definitions)
        given = {"tool_choice": choice, "parallel_tool_calls": parallel_tool_calls}
        return self.bind(
            tools=definitions, **{name: value for name, value in given.items() if value is not None}, **kwargs
        )

    def with_structured_output(
        self,
        schema: dict[str, Any] | type,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, dict[str, Any] | BaseModel]:
        """The model with answers of a schema: a pydantic class gives its instances, all others dicts.

        A grammar enforces the form; a constraint that no grammar can express is still checked by a pydantic class.

        Args:
            schema: a pydantic class, a TypedDict, a JSON schema, or a tool in the OpenAI format.
            method: "json_schema" writes the answer as JSON of the schema, "function_calling" as the call of a tool;
                "json_mode" enforces JSON alone, and the prompt must tell the schema.
            include_raw: answer with a dict of `raw` (the message), `parsed`, and `parsing_error` instead of raising.
            strict: as for `bind_tools`; by default a schema for JSON is strict, one of a tool is not.
            kwargs: options of the calls, such as `temperature`.

        Raises:
            ConfigError: an unknown method, or `strict` without a schema to enforce.
        """
        model = self.bind(**kwargs) if kwargs else self
        return structured(model, schema, method, include_raw, strict)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of a prompt made of these messages and tools, as the model's template writes it. Loads the model.

        For messages that can be answered it is `usage_metadata["input_tokens"]` of a new conversation. Parts that the
        template refuses by themselves, as `trim_messages` tries them, are counted as plain text.
        """
        if not messages:
            return 0
        count: int = self._llm.count_prompt_tokens(to_messages(messages), as_tools(tools or ()) or None)
        return count


def _with_session(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call, with the session named in the config's `configurable` where they name none."""
    if kwargs.get("session_id") is not None:
        return kwargs
    configurable = ensure_config(config).get("configurable") or {}
    named = configurable.get("session_id") or configurable.get("thread_id")
    return kwargs if named is None else {**kwargs, "session_id": str(named)}
