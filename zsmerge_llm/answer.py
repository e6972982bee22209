"""One answer as it comes about: its tokens, its text, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.types import Chunk, FinishReason, Result, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.cache import Cache


class Answer:
    """Collects the tokens of one answer.

    Args:
        cache: what it is based on.
        prompt: ids of the whole logical prompt; the first `cached` of them were read by an earlier request.
        reuse: how the conversation was taken up, for the usage.
        continues: whether the answer goes on in the prompt's own text (completion) or begins one of its own.
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
    ) -> None:
        from zsmerge_llm.sampling import TextStream

        self.cache = cache
        self.prompt = list(prompt)
        self.sampling = sampling
        self.cached = cached
        self.reuse = reuse
        self.tokens: list[int] = []
        self.text = ""
        self._stream = TextStream(tokenizer, sampling.stop, context=self.prompt[-16:] if continues else ())
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
        self.text += piece
        return piece

    def finish(self, cancelled: bool = False) -> Chunk:
        """The last chunk, with the rest of the text, why it ended, and the usage."""
        rest = self._stream.finish()
        self.text += rest
        reason: FinishReason = "stop"
        if cancelled:
            reason = "cancelled"
        elif not self.stopped and len(self.tokens) == self.sampling.max_tokens:
            reason = "length"
        ended = reason == "stop" and not self.stopped  # the end token is generated too
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
        return Chunk(rest, reason, usage)


def collect(chunks: Iterable[Chunk]) -> Result:
    """The whole answer from its chunks."""
    text = ""
    for chunk in chunks:
        text += chunk.text
    assert chunk.usage is not None
    assert chunk.finish_reason is not None
    return Result(text, chunk.finish_reason, chunk.usage, chunk.tool_calls)
