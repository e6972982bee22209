"""`LLM`: messages in, text out. Joins loader, engine, sessions, chat template and sampling, and only composes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event, RLock
from typing import TYPE_CHECKING, Any, Literal

from zsmerge_llm.config import CacheConfig, SamplingParams, parse_bytes
from zsmerge_llm.errors import InputError
from zsmerge_llm.generation import Answer, check_length, collect, speak, together
from zsmerge_llm.language.chat_template import normalize_messages
from zsmerge_llm.language.grammar import Grammar
from zsmerge_llm.language.messages import MessageHistory
from zsmerge_llm.retrieval.documents import read_text
from zsmerge_llm.retrieval.passage_search import DEFAULT_TOKENS, pinned_tail_tokens
from zsmerge_llm.retrieval.query_probe import (
    GENERIC_QUESTION,
    chat_probe,
    completion_probe,
    is_multi_turn,
    message_probe,
)
from zsmerge_llm.runtime import Runtime, assemble, check_settings
from zsmerge_llm.sessions.prompt import Prompt
from zsmerge_llm.types import Chunk, Message, Progress, ResponseFormat, Result, ToolChoice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.sessions.conversations import Turn
    from zsmerge_llm.sessions.session import Session
    from zsmerge_llm.sessions.store import Store

Messages = str | Sequence[Message]


class LLM:
    """A local model on a cache of constant size. Cheap to make: the model loads on first use.

    Args:
        model: a Hub id, a local folder, a .gguf file, the built-in name "smollm2", or a loaded transformers model.
        cache: the cache's budget and rule.
        dtype: "auto" (bfloat16 where the hardware has it), a name such as "float32", or a torch dtype.
        device: "auto", "cpu", "cuda", ...; device_map: as in transformers, instead of `device`.
        quantization: "int4" or "int8" on a CPU, "nf4" or "int8" on a GPU (bitsandbytes); None keeps `dtype`.
        tokenizer: for a model object whose tokenizer cannot be found by its name.
        chat_template: Jinja text instead of the model's own.
        template_args: variables for the chat template, such as {"enable_thinking": False}.
        chunk: tokens read in one forward pass.
        compile: whether decode steps run through compiled layers: True compiles while loading; "auto" later, once
            enough was decoded for it to pay; False never. Where it is not possible, that is logged, and nothing else.
        retrieval_tokens: tokens of earlier text that fit a question and are read again before it, where the cache has lost
            some; half of its slots at most. 0: none.
        max_input_tokens: a longer prompt raises ContextLimitError; None sets no limit. Nothing is ever truncated.
        sessions_dir: where conversations are kept for good, to go on after a restart; None keeps them for this process.
        session_memory: bytes that all conversations together may hold in memory, such as "4GiB"; the least recently
            used ones go to disk. A ceiling too small for one conversation raises StoreFullError when the model loads.
        progress: called with a line of text at each step of loading, and of finding the profile (`profile.py`).

    Raises:
        ConfigError: settings that contradict each other. LoadError, on first use: a model that cannot be loaded.
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
        chunk: int = 512,
        compile: bool | Literal["auto"] = "auto",
        retrieval_tokens: int = DEFAULT_TOKENS,
        max_input_tokens: int | None = None,
        sessions_dir: str | Path | None = None,
        session_memory: int | str = "4GiB",
        progress: Callable[[str], None] | None = None,
    ) -> None:
        check_settings(cache, device, device_map, quantization, compile, retrieval_tokens)
        self.model = model
        self.cache = cache or CacheConfig()
        self.chunk = chunk
        self.compile = compile
        self.max_input_tokens = max_input_tokens
        loading = {
            "tokenizer": tokenizer,
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "quantization": quantization,
            "chat_template": chat_template,
            "progress": progress,
        }
        memory = parse_bytes(session_memory)
        self._assemble = partial(
            assemble, model, self.cache, chunk, compile, loading, template_args, retrieval_tokens, sessions_dir, memory
        )
        self._lock = RLock()
        self._parts: Runtime | None = None

    # -- what is behind it -------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._parts is not None

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
        """The engine below: token ids in and out."""
        return self._load().engine

    @property
    def context_window(self) -> int | None:
        """Positions the model was trained on, where its config says so. Longer prompts can be read all the same."""
        return self.engine.window

    def count_tokens(self, text: str) -> int:
        """Tokens of a plain text, without special tokens."""
        return len(self._load().template.encode(text))

    def count_prompt_tokens(self, messages: Messages, tools: Sequence[dict[str, Any]] | None = None) -> int:
        """Tokens of a prompt made of these messages: `usage.prompt_tokens` of a new conversation.

        Parts of a conversation count too, such as one that ends with an answer. Raises InputError as `stream`.
        """
        return self._load().template.count(normalize_messages(messages, partial=True), tools)

    @property
    def store(self) -> Store:
        """All conversations, with their sizes."""
        return self._load().conversations.store

    def warm_up(self) -> None:
        """Load the model, what grammars need, and the kernels that read, now rather than at the first use.

        Native code holds all threads for up to half a second at a time: call it before an event loop serves others.
        """
        self.engine.fusion.load_reading()
        self.complete("a", grammar=Grammar.choice("a"), sampling=SamplingParams(max_tokens=1))

    def _load(self) -> Runtime:
        with self._lock:
            if self._parts is None:
                self._parts = self._assemble()
            return self._parts

    # -- chat --------------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Messages,
        *,
        sampling: SamplingParams | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        response_format: ResponseFormat | None = None,
        grammar: Grammar | None = None,
        session: str | Session | None = None,
        probe: str | None = None,
        reread: bool = False,
        cancel: Event | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Answer a conversation. See `stream`."""
        return collect(
            self.stream(
                messages,
                sampling=sampling,
                tools=tools,
                tool_choice=tool_choice,
                parallel_tool_calls=parallel_tool_calls,
                response_format=response_format,
                grammar=grammar,
                session=session,
                probe=probe,
                reread=reread,
                cancel=cancel,
                progress=progress,
            )
        )

    def stream(
        self,
        messages: Messages,
        *,
        sampling: SamplingParams | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        response_format: ResponseFormat | None = None,
        grammar: Grammar | None = None,
        session: str | Session | None = None,
        probe: str | None = None,
        reread: bool = False,
        cancel: Event | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Chunk]:
        """Answer a conversation, piece by piece; the last chunk has `finish_reason`, `usage` and tool calls.

        What was read or said earlier in this conversation is recognised by its content and not read again.

        Args:
            messages: a string (one user message) or a list of dicts in the OpenAI format.
            tools: definitions in the OpenAI format, shown to the model by its template. Calls always fit their schema
                and never show in the text; the last chunk has them.
            tool_choice: "auto" (default), "required", "none", or `{"type": "function", "function": {"name": ...}}`.
            parallel_tool_calls: whether one answer may hold several calls.
            response_format: `{"type": "json_object"}` or `{"type": "json_schema", "json_schema": {"name": ...,
                "schema": {...}}}`. The model is told, and can write nothing else (but calls, if there are tools).
            grammar: a form that the answer must have, such as `Grammar.regex("yes|no")`. The model is not told.
            session: a name for the conversation, or a session. It helps to find it and never mixes two; that of a
                document (`read_document`) asks about the document.
            probe: text that says what matters in this prompt, for the cache to keep; by default the last line of
                the last message.
            reread: read the whole conversation again, and keep what this question needs: for one about something that
                earlier ones did not need. It costs what a new conversation costs.
            cancel: an event that stops reading after the current chunk and decoding within one token. Closing the
                iterator does the same.
            progress: called with (tokens read, tokens to read) while the prompt is read.

        Raises:
            InputError: messages, tools or a form that cannot be used, before anything is read.
            MissingTemplateError: no chat template. ContextLimitError: more than `max_input_tokens`.
        """
        history, params = self._check(messages, session), sampling or SamplingParams()
        parts, checked = self._load(), history.messages
        form = parts.forms.chat(checked, tools, tool_choice, parallel_tool_calls, response_format, grammar)
        turn = parts.conversations.begin(history, form.noted(checked), tools, session, reread=reread)
        check_length(len(turn.tokens) - turn.retrieved_tokens, params, self.max_input_tokens, parts.engine.exact_limit)
        asking = chat_probe(parts.template, probe) if probe else message_probe(parts.template, checked[-1]["content"])
        answer = Answer(
            turn.cache,
            turn.tokens,
            params,
            parts.tokenizer,
            cached=turn.cache.seen,
            reuse=turn.reuse,
            form=form,
            recalled=turn.retrieved_tokens,
        )
        return self._run(turn, answer, asking, cancel, progress)

    def batch(
        self,
        conversations: Sequence[Messages],
        *,
        sampling: SamplingParams | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        parallel_tool_calls: bool = True,
        response_format: ResponseFormat | None = None,
        grammar: Grammar | None = None,
        cancel: Event | None = None,
    ) -> list[Result]:
        """Answer several conversations together, in order. Raises as `stream`, before anything is read."""
        parts = self._load()
        checked = [normalize_messages(messages) for messages in conversations]
        wanted = (tools, tool_choice, parallel_tool_calls, response_format, grammar)
        forms = [parts.forms.chat(each, *wanted) for each in checked]
        prompts = [
            parts.conversations.prompts.build(form.noted(each), tools)
            for form, each in zip(forms, checked, strict=True)
        ]
        params = sampling or SamplingParams()
        return together(parts.engine, parts.tokenizer, prompts, forms, params, self.max_input_tokens, cancel)

    # -- sessions ----------------------------------------------------------------------------------------------------

    def session(self, name: str) -> Session:
        """The conversation of that name, with its `.cache`, `.tokens`, `.nbytes`, `.fork(name)` and `.save(path)`.

        Raises:
            SessionNotFoundError: there is none.
        """
        return self.store.get(name)

    def load_session(self, path: str | Path) -> Session:
        """Bring back a conversation that `Session.save` wrote: requests that continue it are recognised again.

        Raises:
            SessionNotFoundError, SessionCorruptError, SessionMismatchError: see the errors.
        """
        return self.store.load(path)

    def add_session(self, session: Session) -> Session:
        """Keep a session made by `Session.fork` among this model's conversations."""
        self.store.commit(session)
        return session

    def read_document(
        self,
        document: str | Path | None = None,
        *,
        text: str | None = None,
        name: str | None = None,
        probe: str | None = None,
        cancel: Event | None = None,
        progress: Progress | None = None,
    ) -> Session:
        """Read a document once, to ask any number of questions about it: `llm.chat(question, session=document)`.

        Args:
            document: the text, or a path to a text file (a `Path`, or a string that names an existing file).
            text: the text, in place of `document`, where it must never be taken for the name of a file.
            name: the session's name; a document read under that name before, with the same text, is taken up.
            probe: what will be asked, as far as it is known; decides what is kept. cancel, progress: as for `stream`.

        Raises:
            InputError: no text, or a file that is no text. Cancelled: `cancel` was set; nothing is kept.
        """
        read, title = read_text(document, text)
        parts = self._load()
        documents = parts.conversations.documents
        reading = documents.open(read, name, title, question_known=probe is not None)
        if reading.new_ids:
            check_length(len(reading.tokens), SamplingParams(), self.max_input_tokens, parts.engine.exact_limit)
            asking = chat_probe(parts.template, probe or GENERIC_QUESTION)
            parts.engine.read(reading.cache, reading.new_ids, probe=asking, cancel=cancel, progress=progress)
            documents.keep(reading)
        return reading.session

    # -- plain completion --------------------------------------------------------------------------------------------

    def complete(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        response_format: ResponseFormat | None = None,
        grammar: Grammar | None = None,
        cancel: Event | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Continue a plain text, without a chat template. See `stream_complete`."""
        chunks = self.stream_complete(
            prompt,
            sampling=sampling,
            response_format=response_format,
            grammar=grammar,
            cancel=cancel,
            progress=progress,
        )
        return collect(chunks)

    def stream_complete(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        response_format: ResponseFormat | None = None,
        grammar: Grammar | None = None,
        cancel: Event | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Chunk]:
        """Continue a plain text, piece by piece. Arguments and errors as for `stream`; the prompt stays as it is."""
        ids, params = self._prompt_ids(prompt), sampling or SamplingParams()
        parts = self._load()
        check_length(len(ids), params, self.max_input_tokens, parts.engine.exact_limit)
        form = parts.forms.plain(response_format, grammar)
        cache = parts.engine.new_cache(parts.profile.config(len(ids)))
        answer = Answer(cache, ids, params, parts.tokenizer, continues=True, form=form)
        return self._run(None, answer, completion_probe(parts.template, ids, prompt), cancel, progress)

    def batch_complete(
        self,
        prompts: Sequence[str],
        *,
        sampling: SamplingParams | None = None,
        response_format: ResponseFormat | None = None,
        grammar: Grammar | None = None,
        cancel: Event | None = None,
    ) -> list[Result]:
        """Continue several texts together, in order. Raises as `stream_complete`, before anything is read."""
        ids, parts = [self._prompt_ids(prompt) for prompt in prompts], self._load()
        read = [
            Prompt(own, parts.profile.config(len(own)), completion_probe(parts.template, own, prompt))
            for own, prompt in zip(ids, prompts, strict=True)
        ]
        forms, limit = [parts.forms.plain(response_format, grammar)] * len(ids), self.max_input_tokens
        params = sampling or SamplingParams()
        return together(parts.engine, parts.tokenizer, read, forms, params, limit, cancel, continues=True)

    def _check(self, messages: Messages, session: str | Session | None) -> MessageHistory:
        """Check messages before the model is loaded; later, only those that its sessions do not know."""
        if self._parts is None:
            return MessageHistory().normalize(messages)
        return self._parts.conversations.check(messages, session)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str) or not prompt:
            raise InputError("The prompt is empty: give some text to continue.")
        return self._load().template.encode_prompt(prompt)

    # -- how an answer comes about -----------------------------------------------------------------------------------

    def _run(
        self,
        turn: Turn | None,
        answer: Answer,
        probe: list[int],
        cancel: Event | None,
        progress: Progress | None,
    ) -> Iterator[Chunk]:
        """Read, decode, commit. However it ends, the conversation is at a point it can go on from."""
        from zsmerge_llm.engine.engine import Cancelled

        conversations = self._load().conversations
        reply: Message | None = None
        try:
            self._read(turn, answer, probe, cancel, progress)
            with closing(speak(self.engine, answer, cancel)) as pieces:
                yield from pieces
            answer.cache.compress_stage()
            last = answer.finish()
            reply = answer.message()
        except Cancelled:
            last = answer.finish(cancelled=True)
        finally:
            if turn is not None:
                conversations.commit(turn, reply, answer.tokens)
        yield last

    def _read(
        self, turn: Turn | None, answer: Answer, probe: list[int], cancel: Event | None, progress: Progress | None
    ) -> None:
        """Read what is new of the prompt, and keep the points worth going back to."""
        started, ids = time.perf_counter(), list(answer.prompt[answer.cached :])
        read = partial(self.engine.read, answer.cache, probe=probe, cancel=cancel, progress=progress)
        multi_turn = turn is not None and not turn.single_question and is_multi_turn(turn.messages)
        first = turn.system_tokens if turn is not None else 0
        if not answer.cache.fits(first):
            first = 0  # compressed for this question, a beginning would be worth little to the next
        if turn is not None and first:
            read(ids[:first])
            turn.add_snapshot("prefix", int(turn.messages[0]["role"] == "system"), first)
        if ids[first:]:
            read(ids[first:], multi_turn=multi_turn, pinned_tail=pinned_tail_tokens(answer.recalled))
        if turn is not None:
            turn.add_snapshot("prompt", len(turn.messages), len(turn.tokens))
        answer.begin(time.perf_counter() - started)
