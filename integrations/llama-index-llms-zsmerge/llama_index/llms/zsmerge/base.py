"""`ZSMergeLLM`: zsmerge-llm behind LlamaIndex's `FunctionCallingLLM`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import fields
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
from llama_index.core.llms.llm import ToolSelection, default_completion_to_prompt
from llama_index.llms.zsmerge import _responses as responses
from llama_index.llms.zsmerge._messages import to_messages
from llama_index.llms.zsmerge._requests import (
    Request,
    message_request,
    refuse_unknown_settings,
    sampling_changes,
    text_request,
)
from llama_index.llms.zsmerge._structured import StructuredPrediction
from llama_index.llms.zsmerge._tools import callable_tools, to_tool, to_tool_selections
from typing_extensions import Self

from zsmerge_llm import LLM, CacheConfig, SamplingParams, SchedulingConfig, aio
from zsmerge_llm.errors import ConfigError

if TYPE_CHECKING:
    from llama_index.core.chat_engine.types import AgentChatResponse
    from llama_index.core.tools.types import BaseTool

LOGICAL_WINDOW = 1_000_000
"""Default `context_window`. The cache reads any length, but LlamaIndex needs a number to pack prompts by."""


def _path_as_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, BeforeValidator(_path_as_text)]
"""A string; a path becomes one, so that settings remain JSON."""


class ZSMergeLLM(StructuredPrediction):
    """A local model on a KV cache of constant size: documents and conversations of any length in fixed memory.

    The constructor loads nothing: the model loads at the first request. Sampling settings of a call
    (`llm.chat(messages, max_tokens=64)`) override those of the object. A call also takes `response_format=` (OpenAI's
    format), `grammar=` (a `zsmerge_llm.Grammar`), `timeout=` (seconds), `priority=` (the lowest number goes first) and
    in chats:

    - `session=` or `session_id=`: the conversation to continue; a hint, because conversations are recognised by their
      messages. What an earlier request has read is not read again.
    - `probe=`: text about what matters in the prompt; the cache keeps the tokens that it attends to.
    - `reread=True`: read the whole conversation again for this question.

    A grammar enforces tool calls and JSON, so every chat model supports them.

    With `is_chat_model=True` (default) `complete` sends the prompt as one user message through the chat template, and
    `complete(prompt, formatted=True)` or a `completion_to_prompt` of your own continues the text as it is. With
    `is_chat_model=False`, for base models, everything continues plain text; `chat` uses `messages_to_prompt`.

    Settings are read from this object at each call, except those of the model and the cache: they are fixed when the
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
    cache: CacheConfig = Field(default_factory=CacheConfig, description="Budget and eviction policy of the KV cache.")
    dtype: str = Field(default="auto", description="Type of the weights, such as 'bfloat16'.")
    device: str = Field(default="auto", description="Device of the model, such as 'cpu' or 'cuda:0'.")
    device_map: str | dict[str, Any] | None = Field(default=None, description="Placement as accelerate takes it.")
    quantization: str | None = Field(default=None, description="None, 'nf4', 'int8', 'int4' or 'fp8'.")
    compile: bool | str = Field(default="auto", description="Compiled decode steps: True, False or 'auto'.")
    chat_template: str | None = Field(default=None, description="Chat template in place of the model's own.")
    template_args: dict[str, Any] | None = Field(
        default=None, description="Variables for the chat template, such as {'enable_thinking': False}."
    )
    allow_control_tokens: bool = Field(default=False, description="Read control tokens spelled in text as tokens.")
    retrieval_tokens: int | str = Field(
        default="auto", description="Maximum tokens of dropped text retrieved before a question; 0: none."
    )
    max_input_tokens: int | None = Field(default=None, description="A longer prompt is an error; None: no limit.")
    sessions_dir: PathText | None = Field(default=None, description="Folder that stores sessions.")
    session_memory: int | str = Field(default="4GiB", description="Host memory limit of idle sessions.")
    gpu_session_memory: int | str = Field(default="auto", description="GPU memory limit of idle sessions, or 'auto'.")
    scheduling: SchedulingConfig | None = Field(default=None, description="How concurrent requests share the device.")

    max_tokens: int | None = Field(default=512, description="Maximum tokens of an answer; None: no limit.")
    temperature: float = Field(default=0.0, description="0 is greedy.")
    top_p: float = Field(default=1.0, description="Nucleus sampling: the smallest set of tokens with this probability.")
    top_k: int = Field(default=0, description="Only the k likeliest tokens; 0: all.")
    min_p: float = Field(default=0.0, description="Least probability of a token relative to the likeliest.")
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
        default=True,
        description="Announce tool calling to agents (chat models only); False: they use ReAct prompts.",
    )

    _llm: LLM = PrivateAttr()

    def __init__(self, model: str | os.PathLike[str] | None = None, *, llm: LLM | None = None, **settings: Any) -> None:
        """Take an existing `zsmerge_llm.LLM` as `llm`, with its own model and cache, or the settings of a new one."""
        if llm is not None:
            if given := sorted(
                {name for name in LOADING_SETTINGS if name in settings} | ({"model"} if model else set())
            ):
                raise ConfigError(f"llm has its own {', '.join(given)}: give llm or these settings, not both.")
            model, settings["cache"] = _model_name(llm), llm.cache
        refuse_unknown_settings(type(self), settings)
        if isinstance(settings.get("cache"), dict):
            settings["cache"] = CacheConfig.from_dict(settings["cache"])
        super().__init__(**({"model": model} if model else {}), **settings)  # type: ignore[arg-type]
        self._sampling_params({})  # refuses bad values now, not at the first request
        if llm is None:
            llm = LLM(self.model, **{name: getattr(self, name) for name in LOADING_SETTINGS})
        self._llm = llm

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; weights and sessions are shared."""
        return super().__deepcopy__({**(memo or {}), id(self._llm): self._llm})

    @classmethod
    def class_name(cls) -> str:
        return "ZSMergeLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """Window, output length and abilities, by which LlamaIndex builds prompts. Does not load the model."""
        return LLMMetadata(
            context_window=self.context_window,
            num_output=self.max_tokens or DEFAULT_NUM_OUTPUTS,
            is_chat_model=self.is_chat_model,
            is_function_calling_model=self.is_chat_model and self.is_function_calling_model,
            model_name=self.model,
        )

    @property
    def llm(self) -> LLM:
        """The underlying `zsmerge_llm.LLM`, to share with other objects."""
        return self._llm

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of `text` without special tokens, for `Settings.tokenizer`. Loads the model."""
        return list(self._llm.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def warm_up(self) -> Self:
        """Load the model now, not at its first use: loading may block an event loop."""
        self._llm.warm_up()
        return self

    def _sampling_params(self, options: dict[str, Any]) -> SamplingParams:
        """Return this object's settings with the changes of a call. Raises ConfigError: an unknown or bad option."""
        changes = sampling_changes(options, SAMPLING_SETTINGS)
        return SamplingParams().replace(**{**{name: getattr(self, name) for name in SAMPLING_SETTINGS}, **changes})

    def _text_request(self, text: str, options: dict[str, Any]) -> Request:
        return text_request(self._llm, text, self._sampling_params(options), options)

    def _message_request(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Request:
        return message_request(self._llm, to_messages(messages), self._sampling_params(options), options)

    def _chat_request(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Request:
        if self.is_chat_model:
            return self._message_request(messages, {"session_id": self.session, **options})
        assert self.messages_to_prompt is not None  # set by the base class
        return self._text_request(self.messages_to_prompt(messages), options)

    def _complete_request(self, prompt: str, formatted: bool, options: dict[str, Any]) -> Request:
        """Return a request for plain text if the prompt is formatted, by a function or already; else for one message.

        The `session` of this object does not apply: a single prompt does not continue a conversation.
        """
        if formatted:
            return self._text_request(prompt, options)
        if self.is_chat_model and self.completion_to_prompt is default_completion_to_prompt:
            return self._message_request([ChatMessage(role=MessageRole.USER, content=prompt)], options)
        assert self.completion_to_prompt is not None  # set by the base class
        return self._text_request(self.completion_to_prompt(prompt), options)

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        request = self._chat_request(messages, kwargs)
        return responses.chat_response(request.result(), self.model)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        request = self._chat_request(messages, kwargs)
        return responses.chat_responses(request.stream(), self.model)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        request = self._chat_request(messages, kwargs)
        return responses.chat_response(await aio.call(request.result), self.model)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        request = self._chat_request(messages, kwargs)
        return aio.stream(lambda cancel: responses.chat_responses(request.stream(cancel), self.model))

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        request = self._complete_request(prompt, formatted, kwargs)
        return responses.completion_response(request.result(), self.model)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        request = self._complete_request(prompt, formatted, kwargs)
        return responses.completion_responses(request.stream(), self.model)

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        request = self._complete_request(prompt, formatted, kwargs)
        return responses.completion_response(await aio.call(request.result), self.model)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        request = self._complete_request(prompt, formatted, kwargs)
        return aio.stream(lambda cancel: responses.completion_responses(request.stream(cancel), self.model))

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
        """Return the arguments for `chat`. `tool_choice` overrides `tool_required`; a grammar enforces both."""
        messages = list(chat_history or [])
        if isinstance(user_msg, str):
            user_msg = ChatMessage(role=MessageRole.USER, content=user_msg)
        if user_msg is not None:
            messages.append(user_msg)
        choice = kwargs.pop("tool_choice", None) or ("required" if tool_required else None)
        return {
            "messages": messages,
            "tools": [to_tool(tool) for tool in tools],
            "tool_choice": choice,
            "allow_parallel_tool_calls": allow_parallel_tool_calls,
            **kwargs,
        }

    def predict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Let the model choose a tool, and run it.

        The model must call one unless `error_on_no_tool_call=False`. With `is_function_calling_model=False` a ReAct
        prompt is used.
        """
        return super().predict_and_call(callable_tools(tools), *args, **self._calling_options(kwargs))

    async def apredict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        """Async `predict_and_call`."""
        return await super().apredict_and_call(callable_tools(tools), *args, **self._calling_options(kwargs))

    def _calling_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return `options` with the one that requires a call, or with a ReAct agent's parts, which LlamaIndex omits."""
        if self.metadata.is_function_calling_model:
            return {"tool_required": options.get("error_on_no_tool_call", True), **options}
        from llama_index.core.agent.react import ReActChatFormatter, ReActOutputParser

        return {"react_chat_formatter": ReActChatFormatter(), "output_parser": ReActOutputParser(), **options}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls of a response. Raises ValueError if there is none and `error_on_no_tool_call`."""
        return to_tool_selections(response, error_on_no_tool_call)


_PARAMETERS = inspect.signature(LLM).parameters.keys() - {"model"}
LOADING_SETTINGS = tuple(name for name in ZSMergeLLM.model_fields if name in _PARAMETERS)
"""Fields that describe the model and its cache: the keywords of `zsmerge_llm.LLM`."""
_SAMPLING_FIELDS = {field.name for field in fields(SamplingParams)}
SAMPLING_SETTINGS = tuple(name for name in ZSMergeLLM.model_fields if name in _SAMPLING_FIELDS)
"""Fields of `SamplingParams`."""


def _model_name(llm: LLM) -> str:
    """Return the name of a shared LLM. `llm.name` would load a model that was given as an object."""
    return str(llm.model) if isinstance(llm.model, str | os.PathLike) else type(llm.model).__name__
