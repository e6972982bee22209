"""One answer as it comes about: its tokens, its text, and what it cost."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from threading import Event
from typing import TYPE_CHECKING

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import ContextLimitError
from zsmerge_llm.forms import FREE, Form
from zsmerge_llm.messages import spoken
from zsmerge_llm.toolcalls import Parsed
from zsmerge_llm.types import Chunk, FinishReason, Message, Result, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.cache import Cache
    from zsmerge_llm.engine import Engine


class Answer:
    """Collects the tokens of one answer.

    Args:
        cache: what it is based on.
        prompt: ids of the whole logical prompt; the first `cached` of them were read by an earlier request.
        reuse: how the conversation was taken up, for the usage.
        continues: whether the answer goes on in the prompt's own text (completion) or begins one of its own.
        form: what it must look like.

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
        form: Form = FREE,
    ) -> None:
        from zsmerge_llm.sampling import TextStream

        self.cache = cache
        self.prompt = list(prompt)
        self.sampling = sampling
        self.cached = cached
        self.reuse = reuse
        self.tokens: list[int] = []
        self.text = ""
        self.constraint = form.constraint(sampling)
        self._calls = form.calls()
        self._parsed = Parsed()
        context = self.prompt[-16:] if continues else ()
        self._stream = TextStream(tokenizer, sampling.stop, context=context, shown=form.shown)
        self._prefill_seconds = 0.0
        self._started = self._latest = time.perf_counter()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come up."""
        return self._stream.stopped

    def begin(self, prefill_seconds: float) -> None:
        """The prompt is read; decoding begins now."""
        self._prefill_seconds = prefill_seconds
        self._started = self._latest = time.perf_counter()

    def push(self, token: int) -> str:
        """Take one token; the text that can be shown now."""
        self.tokens.append(token)
        self._latest = time.perf_counter()
        piece = self._stream.push(token)
        if self._calls is not None:
            piece = self._calls.push(piece)
        self.text += piece
        return piece

    def finish(self, cancelled: bool = False) -> Chunk:
        """The last chunk, with the rest of the text, why it ended, and the usage."""
        rest = self._stream.finish()
        if self._calls is not None:
            rest = self._calls.push(rest)
            cut = self.constraint is not None and not self.constraint.complete
            held, self._parsed = self._calls.finish(broken=cut)
            rest += held
        self.text += rest
        full = not self.stopped and len(self.tokens) == self.sampling.max_tokens
        ended = not (self.stopped or full or cancelled)  # then the end token is generated too
        if self.constraint is not None:
            full = self.constraint.shortened or (full and not self.constraint.done)
            ended = self.constraint.ended
        reason: FinishReason = "length" if full else "tool_calls" if self._parsed.calls else "stop"
        usage = Usage(
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
            completion_tokens=len(self.tokens) + ended,
            merged_tokens=self.cache.merged,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._latest - self._started,
            cache_bytes=self.cache.nbytes,
            reuse=self.reuse,
        )
        return Chunk(rest, "cancelled" if cancelled else reason, usage, self._parsed.calls, self._parsed.invalid)

    def message(self) -> Message:
        """The answer as the message that a caller sends back with the next request."""
        return spoken(self.text, self._parsed.calls)


def collect(chunks: Iterable[Chunk]) -> Result:
    """The whole answer from its chunks."""
    text = ""
    for chunk in chunks:
        text += chunk.text
    assert chunk.usage is not None
    assert chunk.finish_reason is not None
    return Result(text, chunk.finish_reason, chunk.usage, chunk.tool_calls, chunk.invalid_tool_calls)


def together(
    engine: Engine, answers: Sequence[Answer], probes: Sequence[Sequence[int]], cancel: Event | None
) -> list[Result]:
    """Read the prompts of these answers one by one, each with its probe, and decode them together."""
    from zsmerge_llm.cache import Cache
    from zsmerge_llm.engine import Cancelled

    cancelled = False
    try:
        for answer, probe in zip(answers, probes, strict=True):
            started = time.perf_counter()
            engine.read(answer.cache, answer.prompt, probe=probe, cancel=cancel)
            answer.begin(time.perf_counter() - started)
        batch = Cache.stack([answer.cache for answer in answers])
        sampling, prompts = [answer.sampling for answer in answers], [answer.prompt for answer in answers]
        limits = [answer.constraint for answer in answers]
        for chosen in engine.decode(batch, sampling, prompts, constraints=limits, cancel=cancel):
            for answer, token in zip(answers, chosen, strict=True):
                if token is not None and not answer.stopped:
                    answer.push(token)
            if all(answer.stopped for answer in answers):
                break
    except Cancelled:
        cancelled = True
    return [collect(iter([Chunk(answer.text), answer.finish(cancelled)])) for answer in answers]


def check_length(prompt: int, params: SamplingParams, limit: int | None, window: int | None) -> None:
    """Refuse a prompt of more tokens than `limit`; warn where prompt and answer go beyond the model's `window`.

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
            "it reads on, but answers beyond get worse.",
            stacklevel=4,
        )
