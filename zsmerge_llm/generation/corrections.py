"""Ask once more where an answer breaks its schema, and show the model the error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from zsmerge_llm.errors import ContextLimitError, InvalidOutputError
from zsmerge_llm.language.messages import MessageHistory, assistant_message
from zsmerge_llm.types import Chunk, Message

AnswerStream = Callable[[MessageHistory], Iterator[Chunk]]
"""Begins the answer to a conversation."""


def answer_corrected(answer: AnswerStream, history: MessageHistory) -> Iterator[Chunk]:
    """Answer a conversation; where that breaks the schema of its format or tools, answer a request to correct it.

    Nothing of the first answer is passed on before it is complete: neither text nor reasoning of one that is discarded.
    The model's second answer is passed on as it comes, valid or not. Raises as `answer`.
    """
    return _corrected(answer(history), answer, history)


def _corrected(first: Iterator[Chunk], answer: AnswerStream, history: MessageHistory) -> Iterator[Chunk]:
    chunks = list(first)
    second: Iterator[Chunk] = iter(chunks)
    if chunks[-1].format_error:
        messages = [*history.given, *_request_correction(chunks)]
        with suppress(ContextLimitError):  # no room to ask again
            second = answer(history.normalize(messages, shared=len(history.given)))
    yield from second


def _request_correction(chunks: Sequence[Chunk]) -> Iterator[Message]:
    """Yield an invalid answer, and its error as the result of its calls or as the user's next message."""
    last = chunks[-1]
    content: dict[str, Any] = {"content": InvalidOutputError(last.format_error).correction}
    yield assistant_message("".join(chunk.text for chunk in chunks), last.tool_calls)
    for call in last.tool_calls:
        yield {"role": "tool", "tool_call_id": call["id"], **content}
    if not last.tool_calls:
        yield {"role": "user", **content}
