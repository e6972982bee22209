"""The turn of a conversation: read what is new of its prompt, generate the answer, and commit both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from zsmerge_llm.generation.answer import Answer, Attempt
from zsmerge_llm.generation.loops import generate
from zsmerge_llm.generation.options import RequestOptions
from zsmerge_llm.retrieval.passage_search import pinned_tail_tokens
from zsmerge_llm.types import Chunk

if TYPE_CHECKING:
    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.sessions.conversations import Conversations, Turn


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
            behind_prompt = None if turn is None else turn.cache_behind_prompt
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
    first = prompt.system_tokens if turn is not None else 0
    if not cache.fits(first):
        first = 0  # compressed for this question, a prefix would be worth little to other conversations
    if turn is not None and first:
        read(ids[:first])
        turn.add_snapshot("prefix", int(turn.messages[0]["role"] == "system"), first)
    if ids[first:]:
        pinned_tail = pinned_tail_tokens(prompt.retrieved_tokens)
        read(ids[first:], multi_turn=prompt.multi_turn, pinned_tail=pinned_tail)
    if turn is not None:
        turn.add_snapshot("prompt", len(turn.messages), len(turn.tokens))
