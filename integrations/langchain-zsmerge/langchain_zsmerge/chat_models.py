"""`ChatZSMerge`: LangChain's chat model on zsmerge-llm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, cast

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from pydantic import ConfigDict

from langchain_zsmerge._errors import langchain_errors
from langchain_zsmerge._generation import Request, ZSMergeGeneration
from langchain_zsmerge._messages import to_ai_message, to_ai_message_chunk, to_messages
from langchain_zsmerge._structured import structured_output
from langchain_zsmerge._tools import to_tool_choice, to_tools
from zsmerge_llm.types import session_name

if TYPE_CHECKING:
    from langchain_core.tools import BaseTool

    from zsmerge_llm import Chunk


_SESSION_OPTIONS = ("session_id", "namespace", "reread")
_REASONING_OPTIONS = ("template_args", "reasoning_effort")
_FORMAT_OPTIONS = ("tools", "tool_choice", "parallel_tool_calls", "response_format", "grammar")
"""Options of a call that constrain its answer."""
_SUPPORTED = ("text_inputs", "text_outputs", "tool_calling", "tool_choice", "tool_call_streaming", "structured_output")
_UNSUPPORTED = ("image_inputs", "image_url_inputs", "pdf_inputs", "audio_inputs", "video_inputs")
"""Entries of LangChain's model profile."""


class ChatZSMerge(ZSMergeGeneration, BaseChatModel):  # type: ignore[misc]  # it names the prompt `messages`
    """A local chat model on a KV cache of constant size.

    ```python
    from langchain_zsmerge import ChatZSMerge
    from zsmerge_llm import CacheConfig

    chat = ChatZSMerge(model="smollm2", cache=CacheConfig(slots=1024), temperature=0)
    chat.invoke("Why is the sky blue?")
    chat.bind(session_id="ann").invoke(messages)                          # name the session
    chat.invoke(messages, config={"configurable": {"thread_id": "ann"}})  # the same
    chat.invoke(messages, reread=True)                                    # read everything again for this question
    ```

    A conversation is recognised by its messages; a session id only helps to find it. The constructor loads nothing: the
    model loads at the first answer or token count. Objects with the same loading settings share one model.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    reasoning_effort: str | None = None
    """How much the model reasons before it answers, from "none" to "max", as far as its template knows it. A call's
    `template_args` set other variables of the template."""

    @property
    def _llm_type(self) -> str:
        return "zsmerge-chat"

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        kwargs.pop("session_id", None)  # LangChain's cache of answers may serve every session
        return f"{super()._get_llm_string(stop=stop, **kwargs)}---{self._fingerprint(kwargs.get('model'))}"

    def _resolve_model_profile(self) -> Any:
        limit = {} if self.max_input_tokens is None else {"max_input_tokens": self.max_input_tokens}
        return {**dict.fromkeys(_SUPPORTED, True), **dict.fromkeys(_UNSUPPORTED, False), **limit}

    def _add_window_to_profile(self) -> None:
        """Add the context window of an exact cache to the profile: it is known once the model is loaded.

        A compressed cache has none. With one in the profile, agents would summarize a history that costs nothing here.
        """
        profile = self.profile
        if profile is not None and "max_input_tokens" not in profile and self._llm.cache.slots is None:
            profile |= {"max_input_tokens": window} if (window := self._llm.context_window) is not None else {}

    # LangChain does not pass the config, which may name the session, to `_generate` and `_stream`.

    def invoke(self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any) -> AIMessage:
        return super().invoke(input, config, **_with_session(config, kwargs))

    async def ainvoke(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AIMessage:
        return await super().ainvoke(input, config, **_with_session(config, kwargs))

    def stream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[AIMessageChunk]:
        return super().stream(input, config, **_with_session(config, kwargs))

    def astream(
        self, input: LanguageModelInput, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[AIMessageChunk]:
        return super().astream(input, config, **_with_session(config, kwargs))

    def stream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().stream_events(input, config, **_with_session(config, kwargs))

    def astream_events(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        return super().astream_events(input, config, **_with_session(config, kwargs))

    def _request(self, stop: list[str] | None, kwargs: dict[str, Any]) -> Request:
        changes = self._sampling_options(kwargs, (*_SESSION_OPTIONS, *_FORMAT_OPTIONS, *_REASONING_OPTIONS))
        if self.reasoning_effort is not None:
            kwargs = {"reasoning_effort": self.reasoning_effort, **kwargs}
        tools = to_tools(kwargs.get("tools") or ())
        choice = to_tool_choice(kwargs.get("tool_choice"), tools) if tools else None
        options = {"tools": tools, "tool_choice": choice, "session": session_name(kwargs.get("session_id"))}
        options |= {name: kwargs.get(name) for name in ("namespace", "reread")}
        given = {name: option for name, option in options.items() if option}
        for name in ("parallel_tool_calls", "response_format", "grammar", *_REASONING_OPTIONS):
            if kwargs.get(name) is not None:
                given[name] = kwargs[name]
        model = kwargs.get("model") or self.model
        return Request(self._llm_for(model), model, {**self._request_options(stop, changes, kwargs), **given})

    def _result(self, cancel: Event | None, prompt: list[BaseMessage], request: Request) -> ChatResult:
        result = request.llm.chat(to_messages(prompt), cancel=cancel, **request.options)
        self._add_window_to_profile()
        return ChatResult(generations=[ChatGeneration(message=to_ai_message(result, request.model))])

    def _chunks(
        self, cancel: Event | None, prompt: list[BaseMessage], request: Request
    ) -> Generator[ChatGenerationChunk, None, None]:
        stream = request.llm.stream(to_messages(prompt), cancel=cancel, **request.options)
        with closing(cast("Generator[Chunk]", stream)) as chunks:
            for chunk in chunks:
                if chunk.finish_reason is not None:
                    self._add_window_to_profile()
                yield ChatGenerationChunk(message=to_ai_message_chunk(chunk, request.model))

    @langchain_errors()
    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | bool | dict[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """Return the model with tools: pydantic classes, functions, LangChain tools or dicts of the usual formats.

        The calls come back as `tool_calls`. A grammar makes their arguments fit the tool's schema.

        Args:
            tool_choice: "auto" (default: the model decides), "any", "required" or True (it must call some tool),
                "none", or the name of the tool it must call.
            parallel_tool_calls: whether one answer may hold several calls. Default: it may.
            strict: True refuses schemas with keywords that cannot be enforced while decoding. By default they are left
                out; a call that breaks one is named in `response_metadata["format_error"]`.
            kwargs: options of the calls, such as `temperature` or `response_format`.

        Raises:
            ConfigError: a `tool_choice` that is none of these.
        """
        definitions = to_tools(tools, strict)
        choice = to_tool_choice(tool_choice, definitions)
        given = {"tool_choice": choice, "parallel_tool_calls": parallel_tool_calls}
        return self.bind(
            tools=definitions, **{name: value for name, value in given.items() if value is not None}, **kwargs
        )

    @langchain_errors()
    def with_structured_output(
        self,
        schema: Any,
        *,
        method: Literal["json_schema", "function_calling", "json_mode"] = "json_schema",
        include_raw: bool = False,
        strict: bool | None = None,
        retry_invalid: bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, Any]:
        """Return a runnable whose answers follow a schema: instances of a type, JSON values for other schemas.

        A grammar enforces the schema while the answer is decoded. What no grammar can express is checked afterwards, by
        the class or by jsonschema. An answer that was ended early to fit into `max_tokens` warns with
        `ShortenedOutputWarning`; `raw.response_metadata["finish_reason"]` is "length" then.

        Args:
            schema: a pydantic class, a dataclass or another type such as `list[Person]`; a TypedDict (gives dicts); a
                JSON schema with any root; OpenAI's `{"name": ..., "schema": ..., "strict": ...}`; a tool.
            method: "json_schema" enforces JSON of the schema, "function_calling" the call of a tool with that schema,
                "json_mode" JSON of any form: the prompt must describe the schema.
            include_raw: return a dict of `raw` (the message), `parsed` and `parsing_error` instead of raising.
            strict: True refuses schemas with keywords that cannot be enforced while decoding.
            retry_invalid: answer once more, and show the model the error, where an answer is not valid. Default: the
                setting of this object. Such answers are not streamed.
            kwargs: options of the calls, such as `temperature`.

        Raises:
            ConfigError: an unknown method or schema, or `strict` without a schema to enforce.
            UnsupportedSchemaError: a type without a JSON schema; at the call, a strict schema that is not enforceable.
            StructuredOutputError: at the call, an answer that was cut or is not valid; an OutputParserException.
        """
        model = self.bind(**kwargs) if kwargs else self
        retry = self.retry_invalid if retry_invalid is None else retry_invalid
        return structured_output(model, schema, method, include_raw, strict, retry)

    @langchain_errors()
    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Count the tokens of the prompt that the model's template makes of messages and tools. Loads the model.

        For messages that can be answered this is `usage_metadata["input_tokens"]` of a new conversation. Messages that
        the template refuses by themselves, as `trim_messages` tries them, are counted as plain text.
        """
        if not messages:
            return 0
        count: int = self._llm.count_prompt_tokens(to_messages(messages), to_tools(tools or ()) or None)
        return count


def _with_session(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a call; where they name no session, with the one in the config's `configurable`."""
    if kwargs.get("session_id") is not None:
        return kwargs
    configurable = ensure_config(config).get("configurable") or {}
    named = configurable.get("session_id") or configurable.get("thread_id")
    return kwargs if named is None else {**kwargs, "session_id": str(named)}
