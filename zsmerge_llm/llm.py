"""`LLM`: messages in, text out. Joins loader, engine, chat template and sampling, and only composes them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, RLock
from typing import TYPE_CHECKING, Any

from zsmerge_llm.chat import Template, normalise
from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.errors import ConfigError, ContextLimitError, InputError
from zsmerge_llm.types import Chunk, FinishReason, Message, Result, Usage

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from zsmerge_llm.cache import Cache
    from zsmerge_llm.engine import Engine
    from zsmerge_llm.loader import Loaded

PROBE_TOKENS = 64
"""How much of a prompt's end says what will be asked: a question and the template's closing."""

Messages = str | Sequence[Message]


@dataclass
class _Request:
    """One request on its way: what is read, and what came of it."""

    cache: Cache
    ids: list[int]
    sampling: SamplingParams
    cancel: Event | None = None
    progress: Callable[[int, int], None] | None = None
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def usage(self, ended: bool) -> Usage:
        return Usage(
            prompt_tokens=self.cached + len(self.ids),
            cached_tokens=self.cached,
            completion_tokens=len(self.tokens) + ended,
            merged_tokens=self.cache.merged,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            cache_bytes=self.cache.nbytes,
        )


class LLM:
    """A local model on a cache of constant size. Cheap to make: the model loads on first use.

    Args:
        model: a Hub id, a local folder, a .gguf file, the built-in name "smollm2", or a loaded transformers model.
        cache: the cache's budget and rule.
        dtype: "auto" (bfloat16 where the hardware has it), a name such as "float32", or a torch dtype.
        device: "auto", "cpu", "cuda", ...; device_map: as in transformers, instead of `device`.
        quantization: None, "nf4" or "int8" (bitsandbytes).
        tokenizer: for a model object whose tokenizer cannot be found by its name.
        chat_template: Jinja text instead of the model's own.
        template_args: variables for the chat template, such as {"enable_thinking": False}.
        chunk: tokens read in one forward pass.
        max_input_tokens: a longer prompt raises ContextLimitError; None sets no limit. Nothing is ever truncated.
        progress: called with a line of text at each step of loading.

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
        max_input_tokens: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if cache is not None and not isinstance(cache, CacheConfig):
            raise ConfigError(f"cache must be a CacheConfig, not a {type(cache).__name__}.")
        if quantization not in (None, "nf4", "int8"):
            raise ConfigError(f"quantization must be None, 'nf4' or 'int8', not {quantization!r}.")
        if device_map is not None and device != "auto":
            raise ConfigError("Give either device or device_map, not both.")
        self.model = model
        self.cache = cache or CacheConfig()
        self.chunk = chunk
        self.max_input_tokens = max_input_tokens
        self._loading: dict[str, Any] = {
            "tokenizer": tokenizer,
            "dtype": dtype,
            "device": device,
            "device_map": device_map,
            "quantization": quantization,
            "chat_template": chat_template,
            "progress": progress,
        }
        self._template_args = template_args
        self._lock = RLock()
        self._ready: tuple[Loaded, Engine, Template] | None = None

    # -- what is behind it -------------------------------------------------------------------------------------------

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._ready is not None

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model if isinstance(self.model, str) else self._load()[0].name

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's transformers tokenizer."""
        return self._load()[0].tokenizer

    @property
    def engine(self) -> Engine:
        """The engine below: token ids in and out."""
        return self._load()[1]

    @property
    def context_window(self) -> int | None:
        """Positions the model was trained on, where its config says so. Longer prompts can be read all the same."""
        return self.engine.window

    def count_tokens(self, text: str) -> int:
        """Tokens of a plain text, without special tokens."""
        return len(self._load()[2].encode(text))

    def _load(self) -> tuple[Loaded, Engine, Template]:
        with self._lock:
            if self._ready is None:
                from zsmerge_llm.engine import Engine
                from zsmerge_llm.loader import load

                loaded = load(self.model, **self._loading)
                engine = Engine(loaded.model, self.cache, self.chunk)
                self._ready = loaded, engine, Template(loaded.tokenizer, args=self._template_args)
            return self._ready

    # -- chat --------------------------------------------------------------------------------------------------------

    def chat(
        self,
        messages: Messages,
        *,
        sampling: SamplingParams | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        cancel: Event | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Answer a conversation. See `stream`."""
        return _collect(self.stream(messages, sampling=sampling, tools=tools, cancel=cancel, progress=progress))

    def stream(
        self,
        messages: Messages,
        *,
        sampling: SamplingParams | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        cancel: Event | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Chunk]:
        """Answer a conversation, piece by piece; the last chunk has `finish_reason` and `usage`.

        Args:
            messages: a string (one user message) or a list of dicts in the OpenAI format.
            tools: definitions in the OpenAI format, shown to the model by its template.
            cancel: an event that stops reading after the current chunk and decoding within one token. Closing the
                iterator does the same.
            progress: called with (tokens read, tokens to read) while the prompt is read.

        Raises:
            InputError: messages that cannot be used, before anything is read. MissingTemplateError: no chat template.
            ContextLimitError: more than `max_input_tokens`.
        """
        checked = normalise(messages)
        template = self._load()[2]
        ids = template.encode(template.render(checked, tools))
        return self._answer(self._request(ids, sampling, cancel, progress))

    def batch(
        self, conversations: Sequence[Messages], *, sampling: SamplingParams | None = None, cancel: Event | None = None
    ) -> list[Result]:
        """Answer several conversations together, in order. Raises as `stream`, before anything is read."""
        checked = [normalise(messages) for messages in conversations]
        template = self._load()[2]
        return self._answer_all([template.encode(template.render(each)) for each in checked], sampling, cancel)

    # -- plain completion --------------------------------------------------------------------------------------------

    def complete(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        cancel: Event | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Continue a plain text, without a chat template. See `stream_complete`."""
        return _collect(self.stream_complete(prompt, sampling=sampling, cancel=cancel, progress=progress))

    def stream_complete(
        self,
        prompt: str,
        *,
        sampling: SamplingParams | None = None,
        cancel: Event | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Chunk]:
        """Continue a plain text, piece by piece. Arguments and errors as for `stream`."""
        return self._answer(self._request(self._prompt_ids(prompt), sampling, cancel, progress))

    def batch_complete(
        self, prompts: Sequence[str], *, sampling: SamplingParams | None = None, cancel: Event | None = None
    ) -> list[Result]:
        """Continue several texts together, in order. Raises as `stream_complete`, before anything is read."""
        return self._answer_all([self._prompt_ids(prompt) for prompt in prompts], sampling, cancel)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if not isinstance(prompt, str) or not prompt:
            raise InputError("The prompt is empty: give some text to continue.")
        return self._load()[2].encode_prompt(prompt)

    # -- how an answer comes about -----------------------------------------------------------------------------------

    def _request(
        self,
        ids: list[int],
        sampling: SamplingParams | None,
        cancel: Event | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> _Request:
        params, limit, window = sampling or SamplingParams(), self.max_input_tokens, self.engine.window
        if limit is not None and len(ids) > limit:
            raise ContextLimitError(
                f"The prompt has {len(ids)} tokens and max_input_tokens is {limit}: raise the limit or shorten the prompt."
            )
        if window is not None and len(ids) + (params.max_tokens or 0) > window:
            warnings.warn(
                f"Prompt and answer may reach {len(ids) + (params.max_tokens or 0)} tokens and the model was trained on "
                f"{window} positions: it reads on, but answers beyond get worse.",
                stacklevel=4,
            )
        return _Request(self.engine.new_cache(), ids, params, cancel, progress)

    def _answer(self, request: _Request) -> Iterator[Chunk]:
        from zsmerge_llm.engine import Cancelled
        from zsmerge_llm.sampling import TextStream

        text = TextStream(self.tokenizer, request.sampling.stop)
        finish: FinishReason = "stop"
        try:
            for token in self._tokens(request):
                request.tokens.append(token)
                if piece := text.push(token):
                    yield Chunk(piece)
                if text.stopped:
                    break
            else:
                finish = "length" if len(request.tokens) == request.sampling.max_tokens else "stop"
        except Cancelled:
            finish = "cancelled"
        rest = text.finish()
        ended = finish == "stop" and not text.stopped
        yield Chunk(rest, "stop" if text.stopped else finish, request.usage(ended))

    def _tokens(self, request: _Request) -> Iterator[int]:
        """The engine's tokens, timed: until the first is reading, then decoding."""
        started = time.perf_counter()
        self.engine.read(
            request.cache, request.ids, probe=_probe(request.ids), cancel=request.cancel, progress=request.progress
        )
        request.prefill_seconds = time.perf_counter() - started
        for (token,) in self.engine.decode(request.cache, [request.sampling], [request.ids], cancel=request.cancel):
            request.decode_seconds = time.perf_counter() - started - request.prefill_seconds
            assert token is not None
            yield token

    def _answer_all(
        self, prompts: list[list[int]], sampling: SamplingParams | None, cancel: Event | None
    ) -> list[Result]:
        if not prompts:
            return []
        from zsmerge_llm.cache import Cache
        from zsmerge_llm.engine import Cancelled
        from zsmerge_llm.sampling import TextStream

        requests = [self._request(ids, sampling, cancel) for ids in prompts]
        texts = [TextStream(self.tokenizer, request.sampling.stop) for request in requests]
        results: list[Result] = []
        pieces = [""] * len(prompts)
        finish: list[FinishReason] = ["stop"] * len(prompts)
        started = time.perf_counter()
        batch = None
        try:
            for request in requests:
                self.engine.read(request.cache, request.ids, probe=_probe(request.ids), cancel=cancel)
            batch = Cache.stack([request.cache for request in requests])
            read = time.perf_counter() - started
            for chosen in self.engine.decode(batch, [request.sampling for request in requests], prompts, cancel=cancel):
                for row, token in enumerate(chosen):
                    if token is not None and not texts[row].stopped:
                        requests[row].tokens.append(token)
                        pieces[row] += texts[row].push(token)
                        requests[row].decode_seconds = time.perf_counter() - started - read
                if all(text.stopped for text in texts):
                    break
        except Cancelled:
            finish = ["cancelled"] * len(prompts)
        for row, request in enumerate(requests):
            pieces[row] += texts[row].finish()
            results.append(Result(pieces[row], finish[row], request.usage(False)))
        return results


def _probe(ids: list[int]) -> list[int]:
    """What will be asked, as far as the prompt says: its end."""
    return ids[-PROBE_TOKENS:]


def _collect(chunks: Iterator[Chunk]) -> Result:
    text = ""
    for chunk in chunks:
        text += chunk.text
    assert chunk.usage is not None
    assert chunk.finish_reason is not None
    return Result(text, chunk.finish_reason, chunk.usage, chunk.tool_calls)
