"""`ZSMergeLLM`: zsmerge-llm behind LlamaIndex's `FunctionCallingLLM`."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    LLMMetadata,
    MessageRole,
)
from llama_index.core.bridge.pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr
from llama_index.core.constants import DEFAULT_NUM_OUTPUTS
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.llms.zsmerge import _responses as responses
from llama_index.llms.zsmerge._bridge import run_in_thread, stream_in_thread
from llama_index.llms.zsmerge._messages import arguments, to_messages, tool_calls, with_id

from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.types import Chunk, Message, Result

if TYPE_CHECKING:
    from llama_index.core.chat_engine.types import AgentChatResponse
    from llama_index.core.tools.types import BaseTool

LOGICAL_WINDOW = 1_000_000
"""Tokens announced as the context window. The cache reads any length; LlamaIndex only needs a number to pack by."""

_LOADING = ("cache", "dtype", "device", "device_map", "quantization", "chat_template", "sessions_dir")
_NOT_SAMPLING = (
    "tools",
    "tool_choice",
    "allow_parallel_tool_calls",
    "session",
    "session_id",
    "extra_headers",  # LlamaIndex's DocumentContextExtractor sends HTTP headers to every model
)
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, BeforeValidator(_text)]
"""A string, or a path kept as one, so that settings remain JSON."""


@dataclass(frozen=True)
class _Request:
    """One request, ready to run: whole or streamed, in this thread or in another."""

    engine: LLM
    prompt: str | list[Message]
    """Plain text to continue, or messages for the chat template."""
    options: dict[str, Any] = field(default_factory=dict)
    parallel: bool = True

    def whole(self, cancel: threading.Event | None = None) -> Result:
        if isinstance(self.prompt, str):
            return self.engine.complete(self.prompt, cancel=cancel, **self.options)
        return self.engine.chat(self.prompt, cancel=cancel, **self.options)

    def stream(self, cancel: threading.Event | None = None) -> Generator[Chunk, None, None]:
        if isinstance(self.prompt, str):
            yield from self.engine.stream_complete(self.prompt, cancel=cancel, **self.options)
        else:
            yield from self.engine.stream(self.prompt, cancel=cancel, **self.options)


class ZSMergeLLM(FunctionCallingLLM):
    """A local model on a KV cache of constant size: whole documents and endless conversations in fixed memory.

    Constructing is cheap; the model is loaded with the first request. Sampling settings given to a call
    (`llm.chat(messages, max_tokens=64)`) go before those of the object. `session=` (or `session_id=`), as a field or
    for a call, is a hint which conversation to continue; what was read before is not read again.

    With `is_chat_model` (the default) `complete` sends the prompt as one user message through the model's chat
    template, and `complete(prompt, formatted=True)`, or a `completion_to_prompt` of your own, continues the text as it
    is. With `is_chat_model=False`, for base models, everything continues plain text; `chat` uses `messages_to_prompt`.

    Settings are read from this object at each call, except those of the model and the cache: they are taken when the
    object is made.

    Raises:
        zsmerge_llm.errors.ConfigError: a setting that cannot work.
        pydantic.ValidationError: an unknown setting or one of the wrong type.

    Examples:
        ```python
        from llama_index.llms.zsmerge import ZSMergeLLM

        llm = ZSMergeLLM(model="smollm2", max_tokens=64)
        print(llm.complete("What is the capital of France?"))
        ```
    """

    model_config = ConfigDict(extra="forbid")

    model: PathText = Field(default="smollm2", description="Built-in name, Hub id, model folder or .gguf file.")
    cache: CacheConfig = Field(default_factory=CacheConfig, description="Budget and rule of the compressed cache.")
    dtype: str = Field(default="auto", description="Type of the weights, such as 'bfloat16'.")
    device: str = Field(default="auto", description="Device of the model, such as 'cpu' or 'cuda:0'.")
    device_map: str | dict[str, Any] | None = Field(default=None, description="Placement as accelerate takes it.")
    quantization: str | None = Field(default=None, description="None, 'nf4' or 'int8' (bitsandbytes).")
    chat_template: str | None = Field(default=None, description="Chat template in place of the model's own.")
    sessions_dir: PathText | None = Field(default=None, description="Folder in which sessions are kept.")

    max_tokens: int | None = Field(default=512, description="Longest answer in tokens; None: until it ends.")
    temperature: float = Field(default=0.0, description="0 is greedy.")
    top_p: float = Field(default=1.0, description="Nucleus: smallest set of tokens of this probability.")
    top_k: int = Field(default=0, description="Only the k likeliest tokens; 0: all.")
    min_p: float = Field(default=0.0, description="Only tokens at least this share as likely as the likeliest.")
    repetition_penalty: float = Field(default=1.0, description="Above 1: tokens seen before become less likely.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    stop: list[str] = Field(default_factory=list, description="Strings that end the answer.")

    session: str | None = Field(default=None, description="Conversation to continue when a call names none.")
    context_window: int = Field(
        default=LOGICAL_WINDOW,
        gt=0,
        description="Tokens LlamaIndex may put into one prompt; memory does not depend on it.",
    )
    is_chat_model: bool = Field(default=True, description="False for base models without a chat template.")
    is_function_calling_model: bool = Field(
        default=False, description="Announce tool calling to agents; for models whose chat template takes tools."
    )

    _llm: LLM = PrivateAttr()

    def __init__(self, model: str | os.PathLike[str] | None = None, *, llm: LLM | None = None, **settings: Any) -> None:
        """`llm` is a `zsmerge_llm.LLM` to share between objects; it has its own model and cache."""
        if llm is not None:
            if own := sorted({name for name in _LOADING if name in settings} | ({"model"} if model else set())):
                raise ConfigError(f"llm comes with its own {', '.join(own)}: give llm or these settings, not both.")
            model, settings["cache"] = _name(llm), llm.cache
        if isinstance(settings.get("cache"), dict):
            settings["cache"] = CacheConfig.from_dict(settings["cache"])
        super().__init__(**({"model": model} if model else {}), **settings)
        self._sampling({})  # refuses bad settings now, not at the first request
        self._llm = llm if llm is not None else self._new_llm()

    def _new_llm(self) -> LLM:
        loading = {name: getattr(self, name) for name in _LOADING if name != "sessions_dir"}
        return LLM(self.model, **loading, **_given(LLM, sessions_dir=self.sessions_dir))

    @classmethod
    def class_name(cls) -> str:
        return "ZSMergeLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex plans by. Does not load the model."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_tokens or DEFAULT_NUM_OUTPUTS,
            is_chat_model=self.is_chat_model,
            is_function_calling_model=self.is_function_calling_model,
            model_name=self.model,
        )

    @property
    def llm(self) -> LLM:
        """The `zsmerge_llm.LLM` underneath, to share with other objects."""
        return self._llm

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens. Loads the model. For `Settings.tokenizer = llm.tokenize`."""
        return list(self._llm.tokenizer.encode(text, add_special_tokens=False))

    # -- Requests --

    def _sampling(self, changes: dict[str, Any]) -> SamplingParams:
        return SamplingParams().replace(**{**{name: getattr(self, name) for name in _SAMPLING}, **changes})

    def _text_request(self, text: str, options: dict[str, Any]) -> _Request:
        """A request that continues `text`. Raises ConfigError on an unknown option or one that needs a chat."""
        for name in ("tools", "session", "session_id"):
            if options.get(name):
                raise ConfigError(
                    f"{name} needs a chat; this continues plain text. Use chat() with is_chat_model=True."
                )
        sampling = {name: value for name, value in options.items() if name not in _NOT_SAMPLING}
        return _Request(self._llm, text, {"sampling": self._sampling(sampling)})

    def _message_request(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> _Request:
        """A request for an answer to `messages`. Raises ConfigError on an unknown option or a bad value."""
        sampling = {name: value for name, value in options.items() if name not in _NOT_SAMPLING}
        request = {
            "sampling": self._sampling(sampling),
            "tools": _offered(options.get("tools") or [], options.get("tool_choice")) or None,
            **_given(self._llm.chat, session=options.get("session", options.get("session_id"))),
        }
        return _Request(self._llm, to_messages(messages), request, options.get("allow_parallel_tool_calls", True))

    def _chat_request(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> _Request:
        if self.is_chat_model:
            return self._message_request(messages, {"session_id": self.session, **options})
        assert self.messages_to_prompt is not None  # set by the base class
        return self._text_request(self.messages_to_prompt(messages), options)

    def _complete_request(self, prompt: str, formatted: bool, options: dict[str, Any]) -> _Request:
        """Plain text where the prompt is formatted already, or by the user; one user message otherwise.

        The `session` of this object stays out of it: a lone prompt does not continue a conversation.
        """
        if formatted:
            return self._text_request(prompt, options)
        if self.is_chat_model and self.completion_to_prompt is default_completion_to_prompt:
            return self._message_request([ChatMessage(role=MessageRole.USER, content=prompt)], options)
        assert self.completion_to_prompt is not None  # set by the base class
        return self._text_request(self.completion_to_prompt(prompt), options)

    # -- The eight methods --

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        request = self._chat_request(messages, kwargs)
        return responses.chat_response(request.whole(), self.model, request.parallel)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        request = self._chat_request(messages, kwargs)
        return responses.chat_responses(request.stream(), self.model, request.parallel)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        request = self._chat_request(messages, kwargs)
        return responses.chat_response(await run_in_thread(request.whole), self.model, request.parallel)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        request = self._chat_request(messages, kwargs)
        return stream_in_thread(
            lambda cancel: responses.chat_responses(request.stream(cancel), self.model, request.parallel)
        )

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        request = self._complete_request(prompt, formatted, kwargs)
        return responses.completion_response(request.whole(), self.model)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        request = self._complete_request(prompt, formatted, kwargs)
        return responses.completion_responses(request.stream(), self.model)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        request = self._complete_request(prompt, formatted, kwargs)
        return responses.completion_response(await run_in_thread(request.whole), self.model)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        request = self._complete_request(prompt, formatted, kwargs)
        return stream_in_thread(lambda cancel: responses.completion_responses(request.stream(cancel), self.model))

    # -- Tools --

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Arguments for `chat`. A required call is asked for, not yet enforced: the model may answer in words."""
        messages = list(chat_history or [])
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        if user_msg is not None:
            messages.append(user_msg)
        choice = kwargs.pop("tool_choice", None) or ("required" if tool_required else None)
        return {
            "messages": messages,
            "tools": [tool.metadata.to_openai_tool(skip_length_check=True) for tool in tools],
            "tool_choice": choice,
            "allow_parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def predict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Choose a tool and run it: by tool calling if the model is said to have it, else by a ReAct prompt."""
        return super().predict_and_call(tools, *args, **self._react(kwargs))

    async def apredict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Choose a tool and run it: by tool calling if the model is said to have it, else by a ReAct prompt."""
        return await super().apredict_and_call(tools, *args, **self._react(kwargs))

    def _react(self, options: dict[str, Any]) -> dict[str, Any]:
        """`options` with the parts of a ReAct agent where they are needed; the core hands None to it without them."""
        if self.is_function_calling_model:
            return options
        from llama_index.core.agent.react import ReActChatFormatter, ReActOutputParser

        return {"react_chat_formatter": ReActChatFormatter(), "output_parser": ReActOutputParser(), **options}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tools the model chose. Raises ValueError if there is none and `error_on_no_tool_call`."""
        calls = [with_id(call) for call in tool_calls(response.message)]
        if not calls and error_on_no_tool_call:
            raise ValueError(f"The model called no tool; it answered {response.message.content!r}.")
        return [
            ToolSelection(tool_id=call["id"], tool_name=call["function"]["name"], tool_kwargs=arguments(call))
            for call in calls
        ]


def _name(llm: LLM) -> str:
    """What to call a shared LLM; `llm.name` would load the model where it is given as an object."""
    return str(llm.model) if isinstance(llm.model, str | os.PathLike) else type(llm.model).__name__


def _given(call: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """The options that are set, for `call`. Raises ConfigError if the installed zsmerge-llm does not take them."""
    given = {name: value for name, value in options.items() if value is not None}
    if missing := sorted(set(given) - set(inspect.signature(call).parameters)):
        raise ConfigError(f"The installed zsmerge-llm takes no {', '.join(missing)}: update it, or leave this out.")
    return given


def _offered(tools: list[dict[str, Any]], choice: str | dict[str, Any] | None) -> list[dict[str, Any]]:
    """The tools shown to the model under `choice`: None, "auto", "required" or "any", "none", or one tool's name."""
    if choice in (None, "auto", "required", "any"):
        return tools
    if choice == "none":
        return []
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else choice
    named = [tool for tool in tools if tool["function"]["name"] == name]
    if not named:
        known = ", ".join(tool["function"]["name"] for tool in tools) or "no tools"
        raise ConfigError(f"tool_choice names {name!r}, which is not among the tools: {known}.")
    return named
