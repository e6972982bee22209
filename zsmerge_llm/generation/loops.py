"""Generate answers: one as a stream, several as a batch; and refuse prompts that are too long."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from threading import Event
from typing import TYPE_CHECKING

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import ContextLimitError
from zsmerge_llm.generation.answer import Answer, Attempt, Request
from zsmerge_llm.retrieval.passage_search import pinned_tail_tokens
from zsmerge_llm.types import Chunk, Result

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.kvcache.cache import Cache


def generate(
    engine: Engine,
    attempt: Attempt,
    read: Callable[[], object],
    cancel: Event | None,
    behind_prompt: Callable[[], Cache] | None = None,
) -> Generator[Chunk, None, Answer]:
    """Generate one answer: yield its pieces but the last, and return it.

    Args:
        read: reads the request's prompt into the attempt's cache.
        behind_prompt: makes a copy of the cache as it was then, for another attempt. None: there is one attempt.
        cancel: an event that stops it within one token; the answer says so in its finish reason.
    """
    from zsmerge_llm.engine.scheduling import Cancelled

    try:
        attempt.prefill_seconds = _seconds(read)
        while True:
            yield from _decode(engine, attempt.cache, [attempt], cancel)
            attempt.cache.compress_stage()
            answer = attempt.finish()
            if behind_prompt is None or answer.retry_format is None:
                return answer
            attempt.cache.replace_with(behind_prompt())
            attempt = attempt.retry(answer.retry_format)
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
    from zsmerge_llm.engine.scheduling import Cancelled

    if not requests:
        return []
    for request in requests:
        length = len(request.prompt.ids) - request.prompt.retrieved_tokens
        check_length(length, request.sampling, max_input_tokens, engine.exact_limit)
    attempts = [Attempt(request, engine.new_cache(request.prompt.config), tokenizer) for request in requests]
    answers: dict[int, Answer] = {}
    pending = list(range(len(attempts)))
    try:
        for attempt in attempts:
            attempt.prefill_seconds = _seconds(partial(_read, engine, attempt, cancel))
        while pending:
            _decode_together(engine, [attempts[at] for at in pending], cancel)
            answers |= {at: attempts[at].finish() for at in pending}
            formats = {at: retry for at in pending if (retry := answers[at].retry_format) is not None}
            pending = list(formats)
            for at in pending:  # its own cache is as it was behind the prompt: what was decoded is in the batch's
                attempts[at] = attempts[at].retry(formats[at])
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
    sampling, prompts = [request.sampling for request in requests], [request.prompt.ids for request in requests]
    constraints = [attempt.recorder or attempt.constraint for attempt in attempts]
    started = [time.perf_counter() - attempt.decode_seconds for attempt in attempts]
    priority = min(request.priority for request in requests)
    steps = engine.decode(cache, sampling, prompts, constraints=constraints, cancel=cancel, priority=priority)
    for tokens in steps:
        for attempt, token, start in zip(attempts, tokens, started, strict=True):
            if token is not None and not attempt.stopped:
                attempt.decode_seconds = time.perf_counter() - start
                if chunk := attempt.push(token):
                    yield chunk
        if all(attempt.stopped for attempt in attempts):
            return


def _read(engine: Engine, attempt: Attempt, cancel: Event | None) -> None:
    prompt = attempt.request.prompt
    engine.read(
        attempt.cache,
        prompt.ids,
        probe=prompt.probe,
        multi_turn=prompt.multi_turn,
        pinned_tail=pinned_tail_tokens(prompt.retrieved_tokens),
        cancel=cancel,
        priority=attempt.request.priority,
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
    calls = (last.tool_calls, last.invalid_tool_calls)
    end = (last.session, last.format_error, last.stop_string)
    logprobs = [each for piece in pieces for each in piece.logprobs]
    return Result(text, last.finish_reason, last.usage, *calls, reasoning, *end, logprobs)


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
