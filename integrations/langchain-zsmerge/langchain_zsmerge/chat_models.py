"""`ChatZSMerge`: LangChain's chat model on zsmerge-llm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseChatModel, LanguageModelInput
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, get_buffer_string
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict

from langchain_zsmerge._calls import Call, run_in_thread, stream_in_thread
from langchain_zsmerge._messages import to_ai_message, to_ai_message_chunk, to_messages
from langchain_zsmerge._settings import ZSMergeSettings
from zsmerge_llm import Result
from zsmerge_llm.errors import ConfigError

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models.base import LangSmithParams
    from langchain_core.tools import BaseTool


class ChatZSMerge(ZSMergeSettings, BaseChatModel):
    """A local chat model whose KV cache never grows.

    ```python
    from langchain_zsmerge import ChatZSMerge
    from zsmerge_llm import CacheConfig

    chat = ChatZSMerge(model="smollm2", cache=CacheConfig(slots=1024), temperature=0)
    chat.invoke("Why is the sky blue?")
    chat.bind(session_id="ann").invoke(messages)                                   # a conversation, by name
    chat.invoke(messages, config={"configurable": {"thread_id": "ann"}})           # the same
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
            "tool_choice": False,
            "structured_output": False,
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
        call, request = Call(self.timeout), self._request(stop, kwargs)
        return await run_in_thread(lambda: self._answer(call, messages, request), call.cancel)

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
        call, request = Call(self.timeout), self._request(stop, kwargs)
        async with aclosing(stream_in_thread(lambda: self._pieces(call, messages, request), call.cancel)) as chunks:
            async for chunk in chunks:
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _request(self, stop: list[str] | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords of one call as those of `LLM.chat`. Raises ConfigError."""
        changes = self._options(kwargs, ("session_id", "tools"))
        hints = {"tools": kwargs.get("tools"), "session": kwargs.get("session_id")}
        return {"sampling": self._sampling(stop, changes), **{name: hint for name, hint in hints.items() if hint}}

    def _answer(self, call: Call, messages: list[BaseMessage], request: dict[str, Any]) -> ChatResult:
        with call:
            result: Result = self._llm.chat(to_messages(messages), cancel=call.cancel, **request)
            call.check(result.finish_reason)
        self._note_window()
        message = to_ai_message(result, self.model)
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _pieces(
        self, call: Call, messages: list[BaseMessage], request: dict[str, Any]
    ) -> Generator[ChatGenerationChunk, None, None]:
        calls = 0
        with call, closing(self._llm.stream(to_messages(messages), cancel=call.cancel, **request)) as chunks:
            for chunk in chunks:
                call.check(chunk.finish_reason)
                if chunk.finish_reason is not None:
                    self._note_window()
                yield ChatGenerationChunk(message=to_ai_message_chunk(chunk, self.model, calls))
                calls += len(chunk.tool_calls)

    # Tools

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """The model with tools in its prompt: pydantic classes, functions, LangChain tools or OpenAI dicts.

        The model decides whether to call one.

        Raises:
            ConfigError: any `tool_choice` but "auto".
        """
        if tool_choice not in (None, "auto"):
            raise ConfigError(
                f"tool_choice={tool_choice!r} is not supported yet: leave it out and ask for the call in the prompt."
            )
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    def with_structured_output(self, schema: dict[str, Any] | type, **kwargs: Any) -> Any:
        """Not supported yet. Raises ConfigError."""
        raise ConfigError(
            "with_structured_output is not supported yet: put an output parser behind the model, "
            "as in `prompt | chat | PydanticOutputParser(pydantic_object=...)`."
        )

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """Tokens of a prompt made of these messages: `usage_metadata["input_tokens"]` of a new conversation.

        Parts of a conversation that the model's template refuses (an answer without its question, as `trim_messages`
        tries them) are counted as plain text. Loads the model.
        """
        from jinja2 import TemplateError

        if not messages:
            return 0
        formatted = [convert_to_openai_tool(tool) for tool in tools or ()]
        tokenizer = self._llm.tokenizer
        try:
            text = tokenizer.apply_chat_template(
                to_messages(messages), tools=formatted or None, tokenize=False, add_generation_prompt=True
            )
        except TemplateError:
            return sum(self.get_num_tokens(get_buffer_string([message])) for message in messages)
        return len(self.get_token_ids(text))


def _with_session(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call, with the session named in the config's `configurable` where they name none."""
    if kwargs.get("session_id") is not None:
        return kwargs
    configurable = ensure_config(config).get("configurable") or {}
    named = configurable.get("session_id") or configurable.get("thread_id")
    return kwargs if named is None else {**kwargs, "session_id": str(named)}
