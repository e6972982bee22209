"""A request, and its answer as the tokens arrive: parsed into reasoning, text and tool calls, with what it cost."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.generation.logprobs import LogprobRecorder
from zsmerge_llm.language.messages import assistant_message
from zsmerge_llm.language.output_format import UNCONSTRAINED, OutputFormat
from zsmerge_llm.language.reasoning import AnswerPiece, text_behind
from zsmerge_llm.language.tool_call_stream import RepetitionGate, merge_deltas, whole_call
from zsmerge_llm.language.tool_calls import ParsedAnswer
from zsmerge_llm.sessions.prompt import Prompt
from zsmerge_llm.types import Chunk, FinishReason, Message, Result, TokenLogprob, ToolCallDelta, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.kvcache.cache import Cache

CONTEXT_TOKENS = 16
"""Tokens of the prompt that a continued text is decoded with, for the space before its first word."""
HEADER_TOKENS = 32
"""Tokens at the end of a prompt that show whether it has opened or closed the reasoning."""


@dataclass(frozen=True)
class Request:
    """One prompt and what its answer must be like."""

    prompt: Prompt
    sampling: SamplingParams
    output_format: OutputFormat = UNCONSTRAINED
    cached_tokens: int = 0
    """How many ids of the prompt an earlier request has read."""
    reuse: str = "new"
    """How the conversation was resumed, for the usage."""
    continues_prompt: bool = False
    """Whether the answer continues the prompt's own text (a completion)."""
    priority: int = 0
    """Where several requests wait for the device, the lowest number goes first."""


@dataclass(frozen=True)
class Answer:
    """One finished answer."""

    result: Result
    last_chunk: Chunk
    """The end of a stream: text that was held back, finish reason, usage and tool calls."""
    tokens: Sequence[int]
    retry_format: OutputFormat | None
    """The format of another attempt, where this one only made redundant calls or repeated the prompt."""

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

    Attributes:
        reasoning_tokens: how many tokens are reasoning.
        reasoning_end: how many tokens there are before the text: reasoning, and spaces behind it.
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
        self._repetition = RepetitionGate()
        self._new_deltas: list[ToolCallDelta] = []
        self._echoes = output_format.echo_filter()
        self._num_tokens = 0
        self.reasoning_tokens = 0
        self.reasoning_end = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string, an echo or a call that repeats another one was found."""
        return self._stop.stopped or bool(self.echoed) or self._repetition.repeats

    @property
    def stop_string(self) -> str:
        """The stop string that ended the text; "" if none did."""
        return self._stop.found

    @property
    def is_reasoning(self) -> bool:
        """Whether the reasoning has begun and not ended."""
        return self._reasoning is not None and self._reasoning.is_inside

    @property
    def echoed(self) -> str:
        """The first word of a text in the prompt that the answer repeats; "" while it repeats none."""
        return "" if self._echoes is None else self._echoes.echoed

    def push(self, token: int) -> AnswerPiece:
        """Add a token; return what of the answer is certain now."""
        piece = self._detokenizer.push(token)
        reasoning, text = self._split(piece)
        self._num_tokens += 1
        if reasoning or self.is_reasoning:
            self.reasoning_tokens += 1
        if piece and self._reasoning is not None and self._reasoning.is_before_text:
            self.reasoning_end = self._num_tokens
        text = self._stop.push(text)
        text = text if self._tool_calls is None else self._tool_calls.push(text)
        self._follow_calls()
        return AnswerPiece(reasoning, text if self._echoes is None else self._echoes.push(text))

    def take_deltas(self) -> list[ToolCallDelta]:
        """Return what was written of calls since the last time, without those that repeat earlier ones."""
        deltas, self._new_deltas = self._new_deltas, []
        return deltas

    def _follow_calls(self) -> None:
        if self._tool_calls is not None:
            deltas, self._tool_calls.deltas = self._tool_calls.deltas, []
            self._new_deltas += self._repetition.push(deltas)

    @property
    def has_unmarked_call(self) -> bool:
        """Whether a call without a marker has begun."""
        return self._tool_calls is not None and self._tool_calls.parsed.has_unmarked

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
            self._follow_calls()
            if self._repetition.repeats:
                # What follows these calls is the repetition.
                parsed = replace(parsed, calls=self._repetition.calls, invalid=[])
        if self._echoes is not None:
            text = self._echoes.push(text) + self._echoes.finish()
        return AnswerPiece(reasoning, text), parsed

    def _split(self, piece: str) -> AnswerPiece:
        return AnswerPiece("", piece) if self._reasoning is None else self._reasoning.push(piece)


class Attempt:
    """One try at answering a request, from a cache that has read or will read its prompt.

    Another one follows where an answer only made redundant tool calls, or repeated what was added to the prompt. Its
    reasoning was passed on by then, so the next attempt begins with it, and passes on what follows.

    Args:
        output_format: instead of the request's.
        reasoning: ids of an earlier attempt that this one begins with.

    Raises:
        InputError: the output format cannot be enforced.
    """

    def __init__(
        self,
        request: Request,
        cache: Cache,
        tokenizer: PreTrainedTokenizerBase,
        output_format: OutputFormat | None = None,
        reasoning: Sequence[int] = (),
    ) -> None:
        self.request = request
        self.cache = cache
        self.output_format = _behind_prompt(output_format or request.output_format, request.prompt, tokenizer)
        self.constraint = self.output_format.constraint(request.sampling, reasoning)
        num_top = request.sampling.logprobs
        self.recorder = None if num_top is None else LogprobRecorder(self.constraint, tokenizer, num_top)
        self.prefill_seconds = self.decode_seconds = 0.0
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._num_known = len(reasoning)
        self._text = self._reasoning = ""
        self._logprobs: list[TokenLogprob] = []
        self._new_logprobs: list[TokenLogprob] = []  # their text has not been returned
        context = list(request.prompt.ids[-CONTEXT_TOKENS:]) if request.continues_prompt else ()
        # A call that is cut off could not be taken back.
        self._streams_calls = bool(self.constraint and self.constraint.completes) and not request.sampling.stop
        self._gate = self.output_format.redundancy_gate()
        self._parser = AnswerParser(tokenizer, self.output_format, request.sampling.stop, context)

    @property
    def stopped(self) -> bool:
        """Whether a stop string, an echo or a call that repeats another one was found. No tokens may follow."""
        return self._parser.stopped

    def push(self, token: int) -> Chunk | None:
        """Add a token; return what of the answer is certain now, if anything."""
        self._tokens.append(token)
        reasoning_tokens = self._parser.reasoning_tokens
        piece = self._parser.push(token)
        if self._parser.reasoning_tokens != reasoning_tokens:
            self._new_logprobs = []  # the mark at the beginning of reasoning
        elif self.recorder is not None:
            self._new_logprobs.append(self.recorder.take())
        chunk = self._chunk(piece, self._new_deltas() if self._streams_calls else ())
        return chunk if len(self._tokens) > self._num_known else None

    def retry(self, output_format: OutputFormat) -> Attempt:
        """Return another attempt in another format. The cache must be as it was behind the prompt."""
        reasoning = self._tokens[: self._parser.reasoning_end]
        attempt = Attempt(self.request, self.cache, self._tokenizer, output_format, reasoning)
        attempt.prefill_seconds, attempt.decode_seconds = self.prefill_seconds, self.decode_seconds
        return attempt

    def finish(self, cancelled: bool = False) -> Answer:
        """Return the answer. No tokens may follow."""
        piece, parsed = self._parser.finish(truncated=self.constraint is not None and not self.constraint.complete)
        chunk = self._chunk(piece)
        redundant = self.output_format.calls_are_redundant(parsed)
        # Text beside redundant calls is the answer: only an answer without any is generated again.
        calls = [] if self._text and redundant else parsed.calls
        reason = "cancelled" if cancelled else self._finish_reason(bool(calls))
        usage = self._usage(cancelled)
        error = "" if cancelled else self.output_format.error(self._text, calls)
        logprobs = [*(chunk.logprobs if chunk else ()), *(() if calls else self._take_logprobs())]
        return Answer(
            result=Result(
                *(self._text, reason, usage, calls, parsed.invalid, self._reasoning),
                format_error=error,
                stop_string=self._parser.stop_string,
                logprobs=self._logprobs,
            ),
            last_chunk=Chunk(
                *(piece.text, reason, usage, calls, parsed.invalid, piece.reasoning),
                format_error=error,
                tool_call_deltas=self._last_deltas(calls),
                stop_string=self._parser.stop_string,
                logprobs=logprobs,
            ),
            tokens=[*self._tokens, *self._closing_ids(cancelled)],
            retry_format=None if self._text or cancelled else self._retry_format(bool(calls), redundant),
        )

    def _closing_ids(self, cancelled: bool) -> list[int]:
        """Return ids that end the reasoning where the answer has not, so that the next turn is read behind its end."""
        if not self._parser.is_reasoning:
            return []
        if not cancelled:
            limit = self.request.sampling.max_tokens
            warnings.warn(
                f"The answer is empty: it ended within its reasoning (max_tokens={limit}). Raise max_tokens, or ask "
                'for less reasoning: reasoning_effort="none".',
                stacklevel=2,
            )
        tags = self.output_format.reasoning_tags
        closing = tags.close + text_behind(tags) + tags.answer_open
        return list(self._tokenizer(closing, add_special_tokens=False)["input_ids"])

    def _retry_format(self, has_calls: bool, redundant: bool) -> OutputFormat | None:
        """Return the format of another attempt, for an answer without text; None if its calls are the answer."""
        if has_calls:
            return self.output_format.fallback if redundant else None
        return self.output_format.without_echo(echoed) if (echoed := self._parser.echoed) else None

    def _new_deltas(self) -> list[ToolCallDelta]:
        """Return what is new of calls that the answer will have in any case."""
        deltas = self._parser.take_deltas()
        if self.output_format.require_marker and self._parser.has_unmarked_call:
            return []  # redundant
        return self._gate.push(deltas) if deltas else []

    def _last_deltas(self, calls: Sequence[dict[str, Any]]) -> list[ToolCallDelta]:
        """Return what was held back of these calls."""
        if not calls:
            return []
        if not self._streams_calls:
            return [whole_call(index, call) for index, call in enumerate(calls)]
        return merge_deltas([*self._new_deltas(), *self._gate.flush()])

    def _chunk(self, piece: AnswerPiece, deltas: Sequence[ToolCallDelta] = ()) -> Chunk | None:
        self._reasoning += piece.reasoning
        self._text += piece.text
        if not (piece.text or piece.reasoning or deltas):
            return None
        logprobs = self._take_logprobs() if piece.text else []
        return Chunk(piece.text, reasoning=piece.reasoning, tool_call_deltas=merge_deltas(deltas), logprobs=logprobs)

    def _take_logprobs(self) -> list[TokenLogprob]:
        """Return the tokens whose text is returned now."""
        taken, self._new_logprobs = self._new_logprobs, []
        self._logprobs += taken
        return taken

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
            prompt_tokens=len(self.request.prompt.ids),
            cached_tokens=self.request.cached_tokens,
            completion_tokens=len(self._tokens) + ended,
            dropped_tokens=self.cache.dropped_tokens,
            merged_tokens=self.cache.merged_tokens,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            cache_bytes=self.cache.nbytes,
            reuse=self.request.reuse,
            reasoning_tokens=self._parser.reasoning_tokens,
            retrieved_tokens=self.request.prompt.retrieved_tokens,
        )


def _behind_prompt(output_format: OutputFormat, prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> OutputFormat:
    """Return a format for an answer to this prompt, which may have opened or closed the reasoning."""
    if output_format.reasoning == "off":
        return output_format
    return output_format.behind(str(tokenizer.decode(list(prompt.ids[-HEADER_TOKENS:]))))
