"""`ZSMergeLLM`: zsmerge-llm behind LlamaIndex's `FunctionCallingLLM`."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
from llama_index.llms.zsmerge._requests import OPTIONS, Request, message_request, text_request
from llama_index.llms.zsmerge._structured import StructuredPrediction
from llama_index.llms.zsmerge._tools import selections, to_tool
from typing_extensions import Self

from zsmerge_llm import LLM, CacheConfig, SamplingParams, aio
from zsmerge_llm.errors import ConfigError

if TYPE_CHECKING:
    from llama_index.core.chat_engine.types import AgentChatResponse
    from llama_index.core.tools.types import BaseTool

LOGICAL_WINDOW = 1_000_000
"""Tokens announced as the context window. The cache reads any length; LlamaIndex only needs a number to pack by."""

_LOADING = (
    "cache",
    "dtype",
    "device",
    "device_map",
    "quantization",
    "compile",
    "chat_template",
    "template_args",
    "retrieval_tokens",
    "max_input_tokens",
    "sessions_dir",
    "session_memory",
)
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "stop")


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, BeforeValidator(_text)]
"""A string, or a path kept as one, so that settings remain JSON."""


class ZSMergeLLM(StructuredPrediction):
    """A local model on a KV cache of constant size: whole documents and endless conversations in fixed memory.

    Constructing is cheap; the model is loaded with the first request. Sampling settings given to a call
    (`llm.chat(messages, max_tokens=64)`) go before those of the object. `session=` (or `session_id=`), as a field or
    for a call, is a hint which conversation to continue; what was read before is not read again. A call also takes
    `response_format=` (OpenAI's form), `grammar=` (a `zsmerge_llm.language.grammar.Grammar`) and, in chats, `probe=`, the text
    that says what matters in the prompt, and `reread=True`, which reads the conversation again for this question.

    Tool calls and JSON are enforced by grammar, so every chat model has them.

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
    quantization: str | None = Field(default=None, description="None, 'nf4', 'int8' or 'int4'.")
    compile: bool | str = Field(default="auto", description="Compiled decode steps: True, False or 'auto'.")
    chat_template: str | None = Field(default=None, description="Chat template in place of the model's own.")
    template_args: dict[str, Any] | None = Field(
        default=None, description="Variables for the chat template, such as {'enable_thinking': False}."
    )
    retrieval_tokens: int = Field(
        default=256, description="Tokens of earlier text read again before a question; 0: none."
    )
    max_input_tokens: int | None = Field(default=None, description="A longer prompt is an error; None: no limit.")
    sessions_dir: PathText | None = Field(default=None, description="Folder in which sessions are kept.")
    session_memory: int | str = Field(default="4GiB", description="What all sessions may hold in memory.")

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
        default=True,
        description="Announce tool calling to agents (chat models only); False: they prompt in ReAct's way.",
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
        super().__init__(**({"model": model} if model else {}), **settings)  # type: ignore[arg-type]
        self._sampling({})  # refuses bad settings now, not at the first request
        self._llm = llm if llm is not None else self._new_llm()

    def _new_llm(self) -> LLM:
        return LLM(self.model, **{name: getattr(self, name) for name in _LOADING})

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """A copy of the settings, on the same model: weights and sessions are shared."""
        return super().__deepcopy__({**(memo or {}), id(self._llm): self._llm})

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
            is_function_calling_model=self.is_chat_model and self.is_function_calling_model,
            model_name=self.model,
        )

    @property
    def llm(self) -> LLM:
        """The `zsmerge_llm.LLM` underneath, to share with other objects."""
        return self._llm

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens. Loads the model. For `Settings.tokenizer = llm.tokenize`."""
        return list(self._llm.tokenizer.encode(text, add_special_tokens=False))

    def warm_up(self) -> Self:
        """Load the model now rather than at the first use, before an event loop has others to serve."""
        self._llm.warm_up()
        return self

    # -- Requests --

    def _sampling(self, options: dict[str, Any]) -> SamplingParams:
        """Settings of this object, changed by those of a call. Raises ConfigError on an unknown option or bad value."""
        changes = {name: value for name, value in options.items() if name not in OPTIONS}
        return SamplingParams().replace(**{**{name: getattr(self, name) for name in _SAMPLING}, **changes})

    def _text_request(self, text: str, options: dict[str, Any]) -> Request:
        return text_request(self._llm, text, self._sampling(options), options)

    def _message_request(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Request:
        return message_request(self._llm, to_messages(messages), self._sampling(options), options)

    def _chat_request(self, messages: Sequence[ChatMessage], options: dict[str, Any]) -> Request:
        if self.is_chat_model:
            return self._message_request(messages, {"session_id": self.session, **options})
        assert self.messages_to_prompt is not None  # set by the base class
        return self._text_request(self.messages_to_prompt(messages), options)

    def _complete_request(self, prompt: str, formatted: bool, options: dict[str, Any]) -> Request:
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
        return responses.chat_response(request.whole(), self.model)

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        request = self._chat_request(messages, kwargs)
        return responses.chat_responses(request.stream(), self.model)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        request = self._chat_request(messages, kwargs)
        return responses.chat_response(await aio.call(request.whole), self.model)

    @llm_chat_callback()
    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        request = self._chat_request(messages, kwargs)
        return aio.stream(lambda cancel: responses.chat_responses(request.stream(cancel), self.model))

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
        return responses.completion_response(await aio.call(request.whole), self.model)

    @llm_completion_callback()
    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        request = self._complete_request(prompt, formatted, kwargs)
        return aio.stream(lambda cancel: responses.completion_responses(request.stream(cancel), self.model))

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
        """Arguments for `chat`. `tool_choice`, among them, goes before `tool_required`; both are enforced."""
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
        """Have the model choose a tool, and run it.

        A tool is called whatever the model would rather say, unless `error_on_no_tool_call=False`. Where tool calling
        is switched off, a ReAct prompt takes its place.
        """
        return super().predict_and_call(tools, *args, **self._calling(kwargs))

    async def apredict_and_call(self, tools: Sequence[BaseTool], *args: Any, **kwargs: Any) -> AgentChatResponse:
        """As `predict_and_call`."""
        return await super().apredict_and_call(tools, *args, **self._calling(kwargs))

    def _calling(self, options: dict[str, Any]) -> dict[str, Any]:
        """`options` with what makes the model call, or with the parts of a ReAct agent, which the core lacks."""
        if self.metadata.is_function_calling_model:
            return {"tool_required": options.get("error_on_no_tool_call", True), **options}
        from llama_index.core.agent.react import ReActChatFormatter, ReActOutputParser

        return {"react_chat_formatter": ReActChatFormatter(), "output_parser": ReActOutputParser(), **options}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The tools the model chose. Raises ValueError if there is none and `error_on_no_tool_call`."""
        return selections(response, error_on_no_tool_call)


def _name(llm: LLM) -> str:
    """What to call a shared LLM; `llm.name` would load the model where it is given as an object."""
    return str(llm.model) if isinstance(llm.model, str | os.PathLike) else type(llm.model).__name__
