"""The turn of a conversation: read what is new of its prompt, generate the answer, and commit both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from zsmerge_llm.engine.scheduling import Cancelled
from zsmerge_llm.generation.answer import Answer, Attempt, Request
from zsmerge_llm.generation.corrections import answer_corrected
from zsmerge_llm.generation.loops import collect, generate, generate_batch
from zsmerge_llm.generation.options import RequestOptions
from zsmerge_llm.language.messages import MessageHistory
from zsmerge_llm.retrieval.passage_search import pinned_tail_tokens
from zsmerge_llm.types import Chunk, Result, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.sessions.conversations import Conversations, Turn


def start_turn(
    engine: Engine,
    conversations: Conversations,
    begin: Callable[[], tuple[Turn | None, Attempt]],
    options: RequestOptions,
) -> Iterator[Chunk]:
    """Prepare an answer and return its stream: a cancelled one where it is stopped before. Raises as `begin`."""
    try:
        turn, attempt = begin()
    except Cancelled:
        return _cancelled_stream(options)
    return stream_turn(engine, conversations, turn, attempt, options)


def start_chat(
    engine: Engine,
    conversations: Conversations,
    begin: Callable[[MessageHistory], tuple[Turn, Attempt]],
    options: RequestOptions,
    history: MessageHistory,
) -> Iterator[Chunk]:
    """Prepare the answer to a conversation, corrected once if the options say so. Raises as `begin`."""

    def answer(history: MessageHistory) -> Iterator[Chunk]:
        return start_turn(engine, conversations, partial(begin, history), options)

    return answer_corrected(answer, history) if options.retry_invalid else answer(history)


def answer_batch(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    build: Callable[[Any], Request],
    prompts: Sequence[Any],
    options: RequestOptions,
    max_input_tokens: int | None,
) -> list[Result]:
    """Answer several prompts together, in order. build: makes a prompt's request, and raises as this does."""
    try:
        requests = [build(prompt) for prompt in prompts]
    except Cancelled:
        return [collect(_cancelled_stream(options)) for _ in prompts]
    with engine.requests.admit():
        results = generate_batch(engine, tokenizer, requests, max_input_tokens, options.cancel)
    if any(result.finish_reason == "cancelled" for result in results):
        options.check_deadline()
    return results


def _cancelled_stream(options: RequestOptions) -> Iterator[Chunk]:
    """Yield the last chunk of a request that was stopped before its prompt was known."""
    options.check_deadline()
    yield Chunk("", "cancelled", Usage(0, 0, 0, 0, 0.0, 0.0, 0))


def stream_turn(
    engine: Engine, conversations: Conversations, turn: Turn | None, attempt: Attempt, options: RequestOptions
) -> Iterator[Chunk]:
    """Read the prompt, generate the answer and commit the turn of a conversation; None: there is none.

    However it ends, the conversation is at a point from which it can be resumed.
    """
    answer: Answer | None = None
    name = ""
    with engine.requests.admit():
        try:
            read = partial(_read_prompt, engine, turn, attempt, options)
            behind_prompt = None if turn is None else partial(turn.cache_behind_prompt, engine.read)
            answer = yield from generate(engine, attempt, read, options.cancel, behind_prompt)
        finally:
            if turn is not None:
                complete = answer is not None and answer.result.finish_reason != "cancelled"
                message, tokens = (answer.message, answer.tokens) if answer is not None and complete else (None, ())
                name = conversations.commit(turn, message, tokens).name
    if answer.result.finish_reason == "cancelled":
        options.check_deadline()
    yield replace(answer.last_chunk, session=options.own_name(name))


def _read_prompt(engine: Engine, turn: Turn | None, attempt: Attempt, options: RequestOptions) -> None:
    """Read what is new of the prompt, and keep the snapshots of the conversation that later requests may resume."""
    prompt, cache = attempt.request.prompt, attempt.cache
    ids = list(prompt.ids[attempt.request.cached_tokens :])
    read = partial(
        engine.read,
        cache,
        probe=prompt.probe,
        cancel=options.cancel,
        progress=options.progress,
        priority=options.priority,
    )
    points = [] if turn is None else turn.reading_points()
    read_tokens = 0
    for kind, messages, tokens in [*points, (None, 0, len(prompt.ids))]:
        part = ids[read_tokens : tokens - attempt.request.cached_tokens]
        read_tokens += len(part)
        if part and kind == "prefix":
            read(part)
        elif part:
            pinned = pinned_tail_tokens(prompt.retrieved_tokens) - (len(ids) - read_tokens)
            read(part, multi_turn=prompt.multi_turn, pinned_tail=min(len(part), max(0, pinned)))
        if turn is not None and kind is not None:
            turn.add_snapshot(kind, messages, tokens)
