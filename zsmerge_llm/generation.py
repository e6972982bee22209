"""One answer as it comes about: its tokens, its text, and what it cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import ContextLimitError
from zsmerge_llm.language.messages import assistant_message
from zsmerge_llm.language.output_format import UNCONSTRAINED, OutputFormat
from zsmerge_llm.language.tool_calls import ParsedAnswer, canonical
from zsmerge_llm.retrieval.passage_search import pinned_tail_tokens
from zsmerge_llm.sessions.prompt import Prompt
from zsmerge_llm.types import Chunk, FinishReason, Message, Result, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.engine.sampler import Detokenizer
    from zsmerge_llm.kvcache.cache import Cache


class Answer:
    """Collects the tokens of one answer.

    Args:
        cache: what it is based on.
        prompt: ids of the whole logical prompt; the first `cached` of them were read by an earlier request.
        reuse: how the conversation was taken up, for the usage.
        continues: whether the answer goes on in the prompt's own text (completion) or begins one of its own.
        form: what it must look like.
        recalled: how many of the prompt's ids repeat what was said before, for the usage.

    Raises:
        InputError: a form that cannot be enforced.
    """

    def __init__(
        self,
        cache: Cache,
        prompt: Sequence[int],
        sampling: SamplingParams,
        tokenizer: PreTrainedTokenizerBase,
        cached: int = 0,
        reuse: str = "new",
        continues: bool = False,
        form: OutputFormat = UNCONSTRAINED,
        recalled: int = 0,
    ) -> None:
        self.cache = cache
        self.prompt = prompt
        self.sampling = sampling
        self.cached = cached
        self.reuse = reuse
        self.recalled = recalled
        self._tokenizer = tokenizer
        self._context = list(prompt[-16:]) if continues else []
        self._prefill_seconds = 0.0
        self._started = self._latest = time.perf_counter()
        self._start(form)

    def _start(self, form: OutputFormat) -> None:
        """Begin an answer of this form; what another one gave is forgotten."""
        self.form = form
        self.tokens: list[int] = []
        self.text = self.reasoning = ""
        self.constraint = form.constraint(self.sampling)
        self._calls = form.calls()
        self._parsed = ParsedAnswer()
        self._settled = False
        self._rest = "", ""
        self._thoughts = form.thoughts()
        self._reasoned = 0
        self._stream = self._text_stream(self.sampling.stop if self._thoughts is None else ())

    def _text_stream(self, stop: tuple[str, ...]) -> Detokenizer:
        from zsmerge_llm.engine.sampler import Detokenizer

        return Detokenizer(self._tokenizer, stop, context=[*self._context, *self.tokens[-16:]], shown=self.form.shown)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come up."""
        return self._stream.stopped

    @property
    def repeats(self) -> bool:
        """Whether it does nothing but call where no call is wanted any more. No more tokens may come."""
        self._settle()
        return self.form.instead is not None and self._needless()

    def begin(self, prefill_seconds: float) -> None:
        """The prompt is read; decoding begins now."""
        self._prefill_seconds = prefill_seconds
        self._started = self._latest = time.perf_counter()

    def again(self, cache: Cache) -> None:
        """Begin once more, from the cache as it was behind the prompt, with the form for an answer that repeats."""
        assert self.form.instead is not None
        self.cache.replace_with(cache)
        self._start(self.form.instead)

    def take(self, token: int) -> Chunk | None:
        """Take one token; what of the answer can be shown now, if anything."""
        self.tokens.append(token)
        self._latest = time.perf_counter()
        parts = self._apart(self._stream.push(token))
        self._reasoned += self._thoughts is not None and (bool(parts[0]) or self._thoughts.inside)
        return self._shown(*parts)

    def _apart(self, piece: str) -> tuple[str, str]:
        """What a piece holds of the thought and of the text. Stop strings count from the text on."""
        if self._thoughts is None:
            return "", piece
        before = self._thoughts.open
        parts = self._thoughts.push(piece)
        if before and not self._thoughts.open:
            self._stream = self._text_stream(self.sampling.stop)
        return parts

    def _shown(self, thought: str, text: str) -> Chunk | None:
        if self._calls is not None:
            text = self._calls.push(text)
        self.reasoning += thought
        self.text += text
        return Chunk(text, reasoning=thought) if text or thought else None

    def finish(self, cancelled: bool = False) -> Chunk:
        """The last chunk, with the rest of the text, why it ended, and the usage."""
        self._settle()
        reason: FinishReason = "cancelled" if cancelled else self._reason()
        calls, invalid = self._parsed.calls, self._parsed.invalid
        return Chunk(self._rest[1], reason, self._usage(cancelled), calls, invalid, self._rest[0])

    def _settle(self) -> None:
        """No more tokens come: take what was held back, and the calls."""
        if self._settled:
            return
        self._settled = True
        thought, text = self._apart(self._stream.finish())
        if self._thoughts is not None:
            ends = self._thoughts.finish()
            thought, text = thought + ends[0], text + ends[1]
        if self._calls is not None:
            text = self._calls.push(text)
            cut = self.constraint is not None and not self.constraint.complete
            held, self._parsed = self._calls.finish(broken=cut)
            text += held
        self._rest = thought, text
        self.reasoning += thought
        self.text += text
        if self.text and self._needless():
            self._parsed.calls = []  # the words are the answer then

    def _needless(self) -> bool:
        """Whether it calls, and all calls were made in this turn before or stand without the mark they need."""
        calls = self._parsed.calls
        if self.form.marked and self._parsed.bare:
            return bool(calls)
        return bool(calls) and all(canonical(call) in self.form.made for call in calls)

    def _full(self) -> bool:
        return not self.stopped and len(self.tokens) == self.sampling.max_tokens

    def _reason(self) -> FinishReason:
        full = self._full()
        if self.constraint is not None:
            full = self.constraint.shortened or (full and not self.constraint.done)
        return "length" if full else "tool_calls" if self._parsed.calls else "stop"

    def _usage(self, cancelled: bool) -> Usage:
        ended = not (self.stopped or self._full() or cancelled)  # then the end token is generated too
        if self.constraint is not None:
            ended = self.constraint.ended
        return Usage(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            completion_tokens=len(self.tokens) + ended,
            dropped_tokens=self.cache.dropped_tokens,
            merged_tokens=self.cache.merged_tokens,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._latest - self._started,
            cache_bytes=self.cache.nbytes,
            reuse=self.reuse,
            reasoning_tokens=self._reasoned,
            retrieved_tokens=self.recalled,
        )

    def message(self) -> Message:
        """The answer as the message that a caller sends back with the next request."""
        return assistant_message(self.text, self._parsed.calls)


def collect(chunks: Iterable[Chunk]) -> Result:
    """The whole answer from its chunks."""
    text = reasoning = ""
    for chunk in chunks:
        text += chunk.text
        reasoning += chunk.reasoning
    assert chunk.usage is not None
    assert chunk.finish_reason is not None
    return Result(text, chunk.finish_reason, chunk.usage, chunk.tool_calls, chunk.invalid_tool_calls, reasoning)


def speak(engine: Engine, answer: Answer, cancel: Event | None) -> Generator[Chunk, None, None]:
    """Decode one answer, whose prompt has been read: its pieces. `Answer.finish` gives the last one.

    One that only makes needless calls is forgotten and decoded again, in the form for that.
    """
    behind_prompt = answer.cache.clone() if answer.form.instead is not None else None
    while True:
        sampling, prompt, limit = [answer.sampling], [answer.prompt], [answer.constraint]
        for (token,) in engine.decode(answer.cache, sampling, prompt, constraints=limit, cancel=cancel):
            assert token is not None
            if chunk := answer.take(token):
                yield chunk
            if answer.stopped:
                break
        if behind_prompt is None or not answer.repeats:
            return
        answer.again(behind_prompt)
        behind_prompt = None


def together(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    forms: Sequence[OutputFormat],
    params: SamplingParams,
    limit: int | None,
    cancel: Event | None,
    continues: bool = False,
) -> list[Result]:
    """Read several prompts one by one, and decode their answers together.

    limit: tokens that a prompt may have. Raises as `Answer` and `check_length`, before anything is read.
    """
    from zsmerge_llm.engine.engine import Cancelled

    if not prompts:
        return []
    for each in prompts:
        check_length(len(each.ids) - each.retrieved_tokens, params, limit, engine.exact_limit)
    caches = [engine.new_cache(each.config) for each in prompts]
    answers = [
        Answer(cache, each.ids, params, tokenizer, continues=continues, form=form, recalled=each.retrieved_tokens)
        for cache, each, form in zip(caches, prompts, forms, strict=True)
    ]
    cancelled = False
    try:
        for answer, each in zip(answers, prompts, strict=True):
            started = time.perf_counter()
            behind = pinned_tail_tokens(each.retrieved_tokens)
            engine.read(
                answer.cache, each.ids, probe=each.probe, multi_turn=each.multi_turn, pinned_tail=behind, cancel=cancel
            )
            answer.begin(time.perf_counter() - started)
        _speak_together(engine, answers, cancel)
        if repeating := [answer for answer in answers if answer.repeats]:
            for answer in repeating:  # its cache is as it was behind the prompt: what was decoded is in the batch's own
                answer.again(answer.cache)
            _speak_together(engine, repeating, cancel)
    except Cancelled:
        cancelled = True
    lasts = [answer.finish(cancelled) for answer in answers]
    wholes = zip(answers, lasts, strict=True)
    return [collect([replace(last, text=answer.text, reasoning=answer.reasoning)]) for answer, last in wholes]


def _speak_together(engine: Engine, answers: Sequence[Answer], cancel: Event | None) -> None:
    """Decode answers, those of the same budget at once, as many as a step should take."""
    for config in dict.fromkeys(answer.cache.config for answer in answers):
        alike = [answer for answer in answers if answer.cache.config == config]
        most = engine.max_decode_batch or len(alike)
        for start in range(0, len(alike), most):
            _speak_alike(engine, alike[start : start + most], cancel)


def _speak_alike(engine: Engine, answers: Sequence[Answer], cancel: Event | None) -> None:
    from zsmerge_llm.kvcache.cache import Cache

    batch = Cache.stack([answer.cache for answer in answers])
    sampling, prompts = [answer.sampling for answer in answers], [answer.prompt for answer in answers]
    limits = [answer.constraint for answer in answers]
    for chosen in engine.decode(batch, sampling, prompts, constraints=limits, cancel=cancel):
        for answer, token in zip(answers, chosen, strict=True):
            if token is not None and not answer.stopped:
                answer.take(token)
        if all(answer.stopped for answer in answers):
            return


def check_length(prompt: int, params: SamplingParams, limit: int | None, window: int | None) -> None:
    """Refuse a prompt of more tokens than `limit`; warn where prompt and answer go beyond `window`.

    window: positions the model was trained on, if going beyond them makes answers worse (the exact cache).

    Raises:
        ContextLimitError: too many tokens.
    """
    if limit is not None and prompt > limit:
        raise ContextLimitError(
            f"The prompt has {prompt} tokens and max_input_tokens is {limit}: raise it or shorten the prompt."
        )
    reach = prompt + (params.max_tokens or 0)
    if window is not None and reach > window:
        warnings.warn(
            f"Prompt and answer may reach {reach} tokens and the model was trained on {window} positions: "
            "the exact cache reads on, but answers beyond get worse. A compressed cache (slots=...) goes on.",
            stacklevel=4,
        )
