"""Generation of answers: requests, parsing of tokens as they arrive, and the loops for one answer and for a batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.errors import ContextLimitError
from zsmerge_llm.language.messages import assistant_message
from zsmerge_llm.language.output_format import UNCONSTRAINED, OutputFormat
from zsmerge_llm.language.reasoning import AnswerPiece
from zsmerge_llm.language.tool_calls import ParsedAnswer
from zsmerge_llm.retrieval.passage_search import tail
from zsmerge_llm.types import Chunk, FinishReason, Message, Result, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.kvcache.cache import Cache

CONTEXT_TOKENS = 16
"""Tokens of the prompt that a continued text is decoded with, for the space before its first word."""


@dataclass(frozen=True)
class Request:
    """One prompt and what its answer must be like."""

    ids: Sequence[int]
    """Ids of the whole logical prompt."""
    sampling: SamplingParams
    query_ids: Sequence[int]
    """Ids of the question, whose attention decides what the cache keeps."""
    output_format: OutputFormat = UNCONSTRAINED
    cache_config: CacheConfig | None = None
    """Configuration of a new cache for this request; None: the engine's."""
    cached_tokens: int = 0
    """How many of `ids` an earlier request has read."""
    retrieved_tokens: int = 0
    """How many of `ids` repeat earlier text."""
    reuse: str = "new"
    """How the conversation was resumed, for the usage."""
    multi_turn: bool = False
    """Whether the prompt holds earlier answers (`Engine.read`)."""
    continues_prompt: bool = False
    """Whether the answer continues the prompt's own text (a completion)."""


@dataclass(frozen=True)
class Answer:
    """One finished answer."""

    result: Result
    last_chunk: Chunk
    """The end of a stream: text that was held back, finish reason, usage and tool calls."""
    tokens: Sequence[int]
    needs_fallback: bool
    """Whether it only holds redundant tool calls, and its format has a fallback."""

    @property
    def message(self) -> Message:
        """The answer as callers send it back with their next request."""
        return assistant_message(self.result.text, self.result.tool_calls)


class AnswerParser:
    """Parse the tokens of one answer, as they arrive, into reasoning, text and tool calls.

    Tokens pass a detokenizer, the reasoning parser, stop strings (which apply to the text alone) and the parser of tool
    calls. No tokens may follow once `stopped` is true.

    Args:
        context: ids before the answer, if it continues their text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        output_format: OutputFormat,
        stop: tuple[str, ...] = (),
        context: Sequence[int] = (),
    ) -> None:
        from zsmerge_llm.engine.detokenizer import Detokenizer, StopStrings

        visible = output_format.visible_special_ids
        self._detokenizer = Detokenizer(tokenizer, context=context, visible_special_ids=visible)
        self._reasoning = output_format.reasoning_parser()
        self._stop = StopStrings(stop)
        self._tool_calls = output_format.tool_call_parser()
        self.reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.stopped

    def push(self, token: int) -> AnswerPiece:
        """Add a token; return what of the answer is certain now."""
        reasoning, text = self._split(self._detokenizer.push(token))
        if reasoning or (self._reasoning is not None and self._reasoning.is_inside):
            self.reasoning_tokens += 1
        text = self._stop.push(text)
        return AnswerPiece(reasoning, text if self._tool_calls is None else self._tool_calls.push(text))

    def finish(self, truncated: bool = False) -> tuple[AnswerPiece, ParsedAnswer]:
        """Return what was held back, and the whole answer's tool calls.

        `truncated`: the answer was cut where its grammar does not let it end.
        """
        reasoning, text = self._split(self._detokenizer.finish())
        if self._reasoning is not None:
            rest = self._reasoning.finish()
            reasoning, text = reasoning + rest.reasoning, text + rest.text
        text = self._stop.push(text) + self._stop.finish()
        parsed = ParsedAnswer()
        if self._tool_calls is not None:
            text = self._tool_calls.push(text)
            held, parsed = self._tool_calls.finish(truncated)
            text += held
        return AnswerPiece(reasoning, text), parsed

    def _split(self, piece: str) -> AnswerPiece:
        return AnswerPiece("", piece) if self._reasoning is None else self._reasoning.push(piece)


class Attempt:
    """One try at answering a request, from a cache that has read or will read its prompt.

    A second attempt, in the fallback format, follows one that only made redundant tool calls.

    Raises:
        InputError: the output format cannot be enforced.
    """

    def __init__(
        self,
        request: Request,
        cache: Cache,
        tokenizer: PreTrainedTokenizerBase,
        output_format: OutputFormat | None = None,
    ) -> None:
        self.request = request
        self.cache = cache
        self.output_format = output_format or request.output_format
        self.constraint = self.output_format.constraint(request.sampling)
        self.prefill_seconds = self.decode_seconds = 0.0
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._text = self._reasoning = ""
        context = request.ids[-CONTEXT_TOKENS:] if request.continues_prompt else ()
        self._parser = AnswerParser(tokenizer, self.output_format, request.sampling.stop, context)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found. No tokens may follow."""
        return self._parser.stopped

    def push(self, token: int) -> Chunk | None:
        """Add a token; return what of the answer is certain now, if anything."""
        self._tokens.append(token)
        return self._chunk(self._parser.push(token))

    def fallback(self) -> Attempt:
        """Return a second attempt in the fallback format. The cache must be as it was behind the prompt."""
        attempt = Attempt(self.request, self.cache, self._tokenizer, self.output_format.fallback)
        attempt.prefill_seconds, attempt.decode_seconds = self.prefill_seconds, self.decode_seconds
        return attempt

    def finish(self, cancelled: bool = False) -> Answer:
        """Return the answer. No tokens may follow."""
        piece, parsed = self._parser.finish(truncated=self.constraint is not None and not self.constraint.complete)
        self._chunk(piece)
        redundant = self.output_format.calls_are_redundant(parsed)
        # Text beside redundant calls is the answer: only an answer without any is generated again.
        calls = [] if self._text and redundant else parsed.calls
        reason = "cancelled" if cancelled else self._finish_reason(bool(calls))
        usage = self._usage(cancelled)
        return Answer(
            result=Result(self._text, reason, usage, calls, parsed.invalid, self._reasoning),
            last_chunk=Chunk(piece.text, reason, usage, calls, parsed.invalid, piece.reasoning),
            tokens=self._tokens,
            needs_fallback=bool(calls) and redundant and self.output_format.fallback is not None,
        )

    def _chunk(self, piece: AnswerPiece) -> Chunk | None:
        self._reasoning += piece.reasoning
        self._text += piece.text
        return Chunk(piece.text, reasoning=piece.reasoning) if piece.text or piece.reasoning else None

    @property
    def _is_full(self) -> bool:
        return not self.stopped and len(self._tokens) == self.request.sampling.max_tokens

    def _finish_reason(self, calls: bool) -> FinishReason:
        cut = self._is_full
        if self.constraint is not None:
            cut = self.constraint.shortened or (cut and not self.constraint.done)
        return "length" if cut else "tool_calls" if calls else "stop"

    def _usage(self, cancelled: bool) -> Usage:
        ended = not (self.stopped or self._is_full or cancelled)  # by the end token, which counts as generated
        if self.constraint is not None:
            ended = self.constraint.ended
        return Usage(
            prompt_tokens=len(self.request.ids),
            cached_tokens=self.request.cached_tokens,
            completion_tokens=len(self._tokens) + ended,
            dropped_tokens=self.cache.dropped_tokens,
            merged_tokens=self.cache.merged_tokens,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            cache_bytes=self.cache.nbytes,
            reuse=self.request.reuse,
            reasoning_tokens=self._parser.reasoning_tokens,
            retrieved_tokens=self.request.retrieved_tokens,
        )


def generate(
    engine: Engine, attempt: Attempt, read: Callable[[], object], cancel: Event | None
) -> Generator[Chunk, None, Answer]:
    """Generate one answer: yield its pieces but the last, and return it.

    Args:
        read: reads the request's prompt into the attempt's cache.
        cancel: an event that stops it within one token; the answer says so in its finish reason.
    """
    from zsmerge_llm.engine.engine import Cancelled

    try:
        attempt.prefill_seconds = _seconds(read)
        checkpoint = attempt.cache.clone() if attempt.output_format.fallback is not None else None
        while True:
            yield from _decode(engine, attempt.cache, [attempt], cancel)
            attempt.cache.compress_stage()
            answer = attempt.finish()
            if checkpoint is None or not answer.needs_fallback:
                return answer
            attempt.cache.replace_with(checkpoint)
            attempt = attempt.fallback()
    except Cancelled:
        return attempt.finish(cancelled=True)


def generate_batch(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    max_input_tokens: int | None,
    cancel: Event | None,
) -> list[Result]:
    """Read several prompts one by one, decode their answers together, and return them in order.

    Raises as `Attempt` and `check_length`, before anything is read.
    """
    from zsmerge_llm.engine.engine import Cancelled

    if not requests:
        return []
    for request in requests:
        length = len(request.ids) - request.retrieved_tokens
        check_length(length, request.sampling, max_input_tokens, engine.exact_limit)
    attempts = [Attempt(request, engine.new_cache(request.cache_config), tokenizer) for request in requests]
    answers: dict[int, Answer] = {}
    pending = list(range(len(attempts)))
    try:
        for attempt in attempts:
            attempt.prefill_seconds = _seconds(partial(_read, engine, attempt, cancel))
        while pending:
            _decode_together(engine, [attempts[at] for at in pending], cancel)
            answers |= {at: attempts[at].finish() for at in pending}
            pending = [at for at in pending if answers[at].needs_fallback]
            for at in pending:  # its own cache is as it was behind the prompt: what was decoded is in the batch's
                attempts[at] = attempts[at].fallback()
    except Cancelled:
        answers |= {at: attempts[at].finish(cancelled=True) for at in pending}
    return [answers[at].result for at in range(len(attempts))]


def _decode_together(engine: Engine, attempts: Sequence[Attempt], cancel: Event | None) -> None:
    """Decode attempts with equal cache configurations together, as many at once as a decode step should take."""
    from zsmerge_llm.kvcache.cache import Cache

    for config in dict.fromkeys(attempt.cache.config for attempt in attempts):
        group = [attempt for attempt in attempts if attempt.cache.config == config]
        size = engine.max_decode_batch or len(group)
        for start in range(0, len(group), size):
            rows = group[start : start + size]
            for _ in _decode(engine, Cache.stack([attempt.cache for attempt in rows]), rows, cancel):
                pass


def _decode(engine: Engine, cache: Cache, attempts: Sequence[Attempt], cancel: Event | None) -> Iterator[Chunk]:
    """Decode one attempt in each row of `cache`; yield the pieces of all of them as they arrive."""
    requests = [attempt.request for attempt in attempts]
    sampling, prompts = [request.sampling for request in requests], [request.ids for request in requests]
    constraints = [attempt.constraint for attempt in attempts]
    started = [time.perf_counter() - attempt.decode_seconds for attempt in attempts]
    for tokens in engine.decode(cache, sampling, prompts, constraints=constraints, cancel=cancel):
        for attempt, token, start in zip(attempts, tokens, started, strict=True):
            if token is not None and not attempt.stopped:
                attempt.decode_seconds = time.perf_counter() - start
                if chunk := attempt.push(token):
                    yield chunk
        if all(attempt.stopped for attempt in attempts):
            return


def _read(engine: Engine, attempt: Attempt, cancel: Event | None) -> None:
    request = attempt.request
    engine.read(
        attempt.cache,
        request.ids,
        probe=request.query_ids,
        multi_turn=request.multi_turn,
        pinned_tail=tail(request.retrieved_tokens),
        cancel=cancel,
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def collect(chunks: Iterable[Chunk]) -> Result:
    """Return the whole answer of a stream."""
    pieces = list(chunks)
    last = pieces[-1]
    text, reasoning = "".join(piece.text for piece in pieces), "".join(piece.reasoning for piece in pieces)
    assert last.usage is not None
    assert last.finish_reason is not None
    return Result(text, last.finish_reason, last.usage, last.tool_calls, last.invalid_tool_calls, reasoning)


def check_length(
    tokens: int, params: SamplingParams, max_input_tokens: int | None, exact_limit: int | None, stacklevel: int = 4
) -> None:
    """Refuse a prompt longer than `max_input_tokens`; warn where prompt and answer exceed `exact_limit`.

    Args:
        tokens: length of the prompt.
        exact_limit: positions the model was trained on, with an exact cache (`Engine.exact_limit`).
        stacklevel: whose line the warning names, as for `warnings.warn`.

    Raises:
        ContextLimitError: too many tokens.
    """
    if max_input_tokens is not None and tokens > max_input_tokens:
        raise ContextLimitError(
            f"The prompt has {tokens} tokens and max_input_tokens is {max_input_tokens}: raise it or shorten the "
            "prompt."
        )
    total = tokens + (params.max_tokens or 0)
    if exact_limit is not None and total > exact_limit:
        warnings.warn(
            f"Prompt and answer may take {total} tokens and the model was trained on {exact_limit} positions: beyond "
            "them answers of the exact cache get worse. A compressed cache (slots=...) has no such limit.",
            stacklevel=stacklevel,
        )
