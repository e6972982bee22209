"""`LLM`: messages in, text out. Composes model loading, chat template, sessions, engine and output formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

from zsmerge_llm.config import CacheConfig, SamplingParams, parse_bytes
from zsmerge_llm.engine.scheduling import SchedulingConfig, check_cancelled
from zsmerge_llm.generation.answer import Attempt, Request
from zsmerge_llm.generation.arguments import check_arguments, check_batch, check_prompt, check_session
from zsmerge_llm.generation.loops import check_length, collect
from zsmerge_llm.generation.options import (
    BatchCompletionOptions,
    BatchOptions,
    ChatOptions,
    CompletionOptions,
    RequestOptions,
    with_options,
)
from zsmerge_llm.generation.turns import answer_batch, start_chat, start_turn
from zsmerge_llm.language.grammar import Grammar
from zsmerge_llm.language.messages import MessageHistory, normalize_messages
from zsmerge_llm.models.device import validate_settings
from zsmerge_llm.retrieval.documents import read_text
from zsmerge_llm.retrieval.passage_search import DEFAULT_TOKENS
from zsmerge_llm.retrieval.query_probe import (
    chat_probe,
    completion_probe,
    conversation_probe,
    is_multi_turn,
)
from zsmerge_llm.retrieval.section_notes import note_instruction
from zsmerge_llm.retrieval.selection import RetrievalTokens
from zsmerge_llm.runtime import (
    CopiedBySettings,
    LazyRuntime,
    Runtime,
    assemble,
    check_limit,
    explain,
    validate_runtime_settings,
)
from zsmerge_llm.sessions.prompt import Prompt
from zsmerge_llm.types import Chunk, Message, Progress, Result

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.planning.explanation import Explanation
    from zsmerge_llm.sessions.conversations import Turn
    from zsmerge_llm.sessions.session import Session
    from zsmerge_llm.sessions.store import Store

Messages = str | Sequence[Message]
"""One user message as text, or a list of dicts in the OpenAI format."""


class LLM(CopiedBySettings, AbstractContextManager["LLM"]):
    """A local model on a KV cache of constant size. Cheap to construct: the model loads on first use.

    Args:
        model: a Hub id, a local folder, a .gguf file, the built-in name "smollm2", or a loaded transformers model
            (adapters of peft included), which is as it was after `close`.
        cache: budget and eviction policy of the KV cache.
        dtype: "auto" (bfloat16 where the hardware has it), a name such as "float32", or a torch dtype.
        device: "auto", "cpu", "cuda", ...; device_map: as in transformers, instead of `device`.
        quantization: "int4" or "int8"; "nf4" (bitsandbytes); on a GPU also "fp8" (torchao). None keeps `dtype`.
        tokenizer: for a model object whose tokenizer cannot be found by its name.
        chat_template: Jinja text instead of the model's own. template_args: its variables, {"enable_thinking": False}.
        allow_control_tokens: read `<|im_end|>` and the like in messages, tools and documents as tokens, not as text.
        chunk: tokens read in one forward pass; "auto": 512 on a CPU, up to 2,048 on a GPU.
        compile: whether decode steps run through compiled layers: True compiles while loading; "auto" in the
            background; False never. Once compiled on a machine, both use them from the first token on. Where it is
            impossible, that is logged, and nothing else.
        retrieval_tokens: most tokens of earlier text that match a question and are read again before it, where the
            cache has dropped some; at most half of its slots. "auto": the more, the more was dropped. 0: none.
        max_input_tokens: a longer prompt raises ContextLimitError; None: no limit. Nothing is ever truncated.
        sessions_dir: folder, or its fsspec URL, that keeps conversations across restarts; None: for this process.
        session_memory: bytes of host memory for idle conversations, such as "4GiB"; the least recently used ones go to
            disk. Too few for one conversation raise StoreFullError when the model loads.
        gpu_session_memory: the same of a GPU, before they go to host memory. "auto": what is free beside the model.
        scheduling: how requests of several threads share the device, and how many there may be.
        progress: called with a line of text at each step of loading and of measuring the layer budgets.

    Raises:
        ConfigError: settings are invalid or contradict each other. LoadError, on first use: the model cannot load.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel = "smollm2",
        *,
        cache: CacheConfig | None = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        device_map: Any = None,
        quantization: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        template_args: dict[str, Any] | None = None,
        allow_control_tokens: bool = False,
        chunk: int | Literal["auto"] = "auto",
        compile: bool | Literal["auto"] = "auto",
        retrieval_tokens: RetrievalTokens = DEFAULT_TOKENS,
        max_input_tokens: int | None = None,
        sessions_dir: str | Path | None = None,
        session_memory: int | str = "4GiB",
        gpu_session_memory: int | str = "auto",
        scheduling: SchedulingConfig | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        validate_settings(dtype, device, device_map, quantization)
        validate_runtime_settings(cache, compile, retrieval_tokens, gpu_session_memory, scheduling)
        self.model = model
        self.cache = cache or CacheConfig()
        self.chunk = chunk
        self.compile = compile
        self.max_input_tokens = check_limit("max_input_tokens", max_input_tokens)
        weights = {"dtype": dtype, "device": device, "device_map": device_map, "quantization": quantization}
        loading = {**weights, "tokenizer": tokenizer, "chat_template": chat_template, "progress": progress}
        settings = (template_args, retrieval_tokens, sessions_dir, parse_bytes(session_memory), gpu_session_memory)
        how = (model, self.cache, chunk, compile, loading)
        self._explain = partial(explain, *how)
        self._runtime = LazyRuntime(partial(assemble, *how, *settings, scheduling, allow_control_tokens))

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._runtime.current is not None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model if isinstance(self.model, str) else self._load().name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's transformers tokenizer."""
        return self._load().tokenizer

    @property
    def engine(self) -> Engine:
        """The engine: token ids in, token ids out."""
        return self._load().engine

    @property
    def context_window(self) -> int | None:
        """Positions the model was trained on, where its config says so. Longer prompts are read all the same."""
        return self.engine.context_window

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a plain text, without special tokens."""
        return len(self._load().template.encode(text))

    def count_prompt_tokens(self, messages: Messages, tools: Sequence[dict[str, Any]] | None = None) -> int:
        """Return `usage.prompt_tokens` of a new conversation of these messages, or parts of one. Raises InputError."""
        return self._load().template.count(normalize_messages(messages, partial=True), tools)

    def explain(self) -> Explanation:
        """Return what this model takes of memory and how it decodes: planned, or as it is once it is loaded."""
        return self._explain(self._runtime.current)

    def warm_up(self) -> None:
        """Load the model, the tokenizer for grammars and kernels, and capture graphs, now rather than at the first use.

        Native code blocks all threads for up to half a second at a time: call it before an event loop serves others.
        """
        self.engine.warm_up()
        self.complete("a", grammar=Grammar.choice("a"), sampling=SamplingParams(max_tokens=1))

    def close(self) -> None:
        """Give a model object back as it was, or release the memory of another model. Conversations in memory are lost.

        A request that runs, and every later one, raises InputError. Once nothing references the LLM it closes itself.
        """
        self._runtime.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _load(self) -> Runtime:
        return self._runtime.load()

    # -- chat --------------------------------------------------------------------------------------------------------

    @with_options(ChatOptions)
    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> Result:
        """Answer a conversation. Arguments and errors as for `stream`."""
        return collect(self.stream(messages, **options))

    @with_options(ChatOptions)
    def stream(self, messages: Messages, **options: Unpack[ChatOptions]) -> Iterator[Chunk]:
        """Answer a conversation, piece by piece; the last chunk has `finish_reason`, `usage` and tool calls.

        What was read or generated earlier in this conversation is recognized by its content and not read again.

        Args:
            messages: a string (one user message) or a list of dicts in the OpenAI format.
            sampling: how tokens are sampled, and when the answer ends (`SamplingParams`).
            tools: definitions in the OpenAI format, rendered by the model's chat template. Arguments of calls follow
                their schema (see `Result.format_error`). Calls are no part of the text: chunks have them as they are
                written.
            tool_choice: "auto" (default), "required", "none", or `{"type": "function", "function": {"name": ...}}`.
            parallel_tool_calls: whether one answer may hold several calls.
            template_args: more variables of the chat template. reasoning_effort: those for "none" to "max" reasoning.
            response_format: `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {"name": ...,
                "schema": {...}}}`. The model is told, and can generate nothing else (but calls, if there are tools).
            grammar: a grammar of the answer, such as `Grammar.regex("yes|no")`. The model is not told.
            session: a name for the conversation, or a session. It helps to find it and never mixes two; the session of
                a document (`read_document`) asks about the document.
            namespace: one user's, where several share the model: conversations of others are not recognized.
            probe: a question that decides what of this prompt the cache keeps; by default the message's last line.
            reread: read the whole conversation again and keep what this question needs, for a question about something
                that earlier ones did not need. It costs what a new conversation costs.
            retry_invalid: where the answer breaks the schema of its format or tools (`Result.format_error`), show the
                model the error and answer once more. The first answer is passed on once it is complete and valid.
            cancel: an event that stops prefill within a chunk and decoding within a token, as closing the iterator.
            timeout: seconds for the answer. priority: of requests that wait for the device, the lowest goes first.
            progress: called with (tokens read, tokens to read) during prefill.

        Raises:
            InputError: invalid messages, tools, response format or grammar, before anything is read.
            MissingTemplateError: no chat template. ContextLimitError: more than `max_input_tokens`.
            QueueFullError, DeadlineExceededError: too many requests, `timeout` has passed; no answer is kept.
            TypeError: an unknown keyword argument.
        """
        wanted = RequestOptions.parse(ChatOptions, options)
        history, runtime = _check(messages, wanted.session, self._runtime.current), self._load()
        begin = partial(_begin_turn, runtime, options=wanted, max_input_tokens=self.max_input_tokens)
        return start_chat(runtime.engine, runtime.conversations, begin, wanted, history)

    @with_options(BatchOptions)
    def batch(self, conversations: Sequence[Messages], **options: Unpack[BatchOptions]) -> list[Result]:
        """Answer several conversations together, in order, without sessions. Arguments and errors as for `stream`."""
        wanted, given = RequestOptions.parse(BatchOptions, options), check_batch(conversations, "conversations")
        checked, runtime = [normalize_messages(messages) for messages in given], self._load()
        build = partial(_batch_request, runtime, options=wanted)
        return answer_batch(runtime.engine, runtime.tokenizer, build, checked, wanted, self.max_input_tokens)

    # -- sessions and documents --------------------------------------------------------------------------------------

    @property
    def store(self) -> Store:
        """All conversations, with their sizes."""
        return self._load().conversations.store

    def session(self, name: str) -> Session:
        """Return the conversation of that name. Raises SessionNotFoundError if there is none."""
        return self.store.get(name)

    def load_session(self, path: str | Path) -> Session:
        """Load what `Session.save` wrote; requests that continue it are recognized. Raises SessionError."""
        return self.store.load(path)

    def add_session(self, session: Session) -> Session:
        """Add a session made by `Session.fork` to this model's conversations, and return it. Raises SessionError."""
        return self.store.adopt(check_session(session))

    def read_document(
        self,
        document: str | Path | None = None,
        *,
        text: str | None = None,
        name: str | None = None,
        probe: str | None = None,
        notes: str | bool = False,
        cancel: Event | None = None,
        progress: Progress | None = None,
    ) -> Session:
        """Read a document once, to ask any number of questions about it: `llm.chat(question, session=document)`.

        Args:
            document: the text, or a path to a text file (a `Path`, or a string that names an existing file).
            text: the text, instead of `document`, where it must never be taken for the name of a file.
            name: the session's name; a document that was read under that name, with the same text, is returned.
            probe: what will be asked, as far as it is known; decides what is kept. cancel, progress: as for `stream`.
            notes: what to note about each section of a text that does not fit, for questions about all of it; or True.

        Raises:
            InputError: no text, or a file that is not text. Cancelled: `cancel` was set; nothing is kept.
        """
        check_arguments(name=name, probe=probe, notes=notes, cancel=cancel, progress=progress)
        content, reader = read_text(document, text), self._load().document_reader(self.max_input_tokens)
        return reader.read(content, name, probe, note_instruction(notes), cancel, progress)

    # -- plain completion --------------------------------------------------------------------------------------------

    @with_options(CompletionOptions)
    def complete(self, prompt: str, **options: Unpack[CompletionOptions]) -> Result:
        """Continue a plain text, without a chat template. Arguments and errors as for `stream`."""
        return collect(self.stream_complete(prompt, **options))

    @with_options(CompletionOptions)
    def stream_complete(self, prompt: str, **options: Unpack[CompletionOptions]) -> Iterator[Chunk]:
        """Continue a plain text, piece by piece, with nothing added to it. Arguments and errors as for `stream`."""
        wanted = RequestOptions.parse(CompletionOptions, options)
        text, runtime = check_prompt(prompt), self._load()
        begin = partial(_begin_completion, runtime, text, wanted, self.max_input_tokens)
        return start_turn(runtime.engine, runtime.conversations, begin, wanted)

    @with_options(BatchCompletionOptions)
    def batch_complete(self, prompts: Sequence[str], **options: Unpack[BatchCompletionOptions]) -> list[Result]:
        """Continue several texts together, in order. Arguments and errors as for `stream`."""
        wanted = RequestOptions.parse(BatchCompletionOptions, options)
        texts, runtime = [check_prompt(prompt) for prompt in check_batch(prompts, "prompts")], self._load()
        build = partial(_completion_request, runtime, options=wanted)
        return answer_batch(runtime.engine, runtime.tokenizer, build, texts, wanted, self.max_input_tokens)


def _check(messages: Messages, session: str | Session | None, runtime: Runtime | None) -> MessageHistory:
    """Check messages, also before the model is loaded; later, only those that its sessions do not know."""
    return MessageHistory().normalize(messages) if runtime is None else runtime.conversations.check(messages, session)


def _begin_turn(
    runtime: Runtime, history: MessageHistory, options: RequestOptions, max_input_tokens: int | None
) -> tuple[Turn, Attempt]:
    """Find the conversation that these messages continue, and prepare the next answer. Raises as `LLM.stream`."""
    runtime = runtime.with_template_args(options.request_args(runtime.template))
    conversations = runtime.conversations.with_check(partial(check_cancelled, options.cancel))
    messages, template = history.messages, conversations.template
    output_format = options.output_format(runtime.output_formats, messages)
    instructed = output_format.with_instruction(messages)
    owner, reread = options.namespace, options.reread
    turn = conversations.begin(history, instructed, options.tools, options.session, namespace=owner, reread=reread)
    length = len(turn.tokens) - turn.retrieved_tokens
    check_length(length, options.sampling, max_input_tokens, runtime.engine.exact_limit, stacklevel=8)
    prompt = Prompt(
        turn.tokens,
        turn.cache.config,
        chat_probe(template, options.probe) if options.probe else conversation_probe(template, messages),
        multi_turn=not turn.single_question and is_multi_turn(turn.messages),
        system_tokens=turn.system_tokens,
        retrieved_tokens=turn.retrieved_tokens,
    )
    output_format = output_format.with_added(*turn.added_texts, document=turn.document)
    settings = (options.sampling, output_format, turn.cache.seen, turn.reuse)
    return turn, Attempt(Request(prompt, *settings, priority=options.priority), turn.cache, runtime.tokenizer)


def _batch_request(runtime: Runtime, messages: list[Message], options: RequestOptions) -> Request:
    """Return the request for one conversation of a batch, which is read from its beginning."""
    runtime = runtime.with_template_args(options.request_args(runtime.template))
    output_format = options.output_format(runtime.output_formats, messages)
    prompts = runtime.conversations.with_check(partial(check_cancelled, options.cancel)).prompts
    prompt = prompts.build(output_format.with_instruction(messages), options.tools)
    output_format = output_format.with_added(*prompt.added_texts)
    return Request(prompt, options.sampling, output_format, priority=options.priority)


def _begin_completion(
    runtime: Runtime, text: str, options: RequestOptions, max_input_tokens: int | None
) -> tuple[None, Attempt]:
    """Prepare the continuation of a plain text, which is no turn of a conversation. Raises as `LLM.stream`."""
    request = _completion_request(runtime, text, options)
    check_length(len(request.prompt.ids), options.sampling, max_input_tokens, runtime.engine.exact_limit, stacklevel=6)
    return None, Attempt(request, runtime.engine.new_cache(request.prompt.config), runtime.tokenizer)


def _completion_request(runtime: Runtime, text: str, options: RequestOptions) -> Request:
    """Return the request for a plain text."""
    template = runtime.template.with_check(partial(check_cancelled, options.cancel))
    ids = template.encode_prompt(text)
    config = runtime.layer_budgets.prompt_config(len(ids))
    prompt = Prompt(ids, config, completion_probe(template, ids, text))
    output_format = runtime.output_formats.completion(options.response_format, options.grammar)
    return Request(prompt, options.sampling, output_format, continues_prompt=True, priority=options.priority)
