"""`/v1/completions` as OpenAI describes it: plain text is continued, without a template and without a session."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zsmerge_llm.server.errors import invalid
from zsmerge_llm.server.logprobs import CompletionLogprobs
from zsmerge_llm.server.openai_fields import GenerationBody, refuse_several, usage_json
from zsmerge_llm.server.requests import Context, new_id, now, refuse
from zsmerge_llm.types import Chunk, Result


class CompletionBody(GenerationBody):
    """A request. The last group is refused where it asks for something."""

    prompt: str | list[Any]
    logprobs: int | None = None

    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None


def parse(body: CompletionBody, context: Context) -> tuple[str, dict[str, Any]]:
    """Return the prompt, and keyword arguments of `LLM.stream_complete`.

    Raises:
        RequestError, ConfigError: fields that are not supported, or out of range.
    """
    body.check(context)
    refuse(echo=body.echo, suffix=body.suffix)
    refuse_several(best_of=body.best_of)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if len(prompts) != 1 or not isinstance(prompts[0], str):
        raise invalid("prompt must be one text: send one request for each.", "prompt")
    return prompts[0], {
        "sampling": body.sampling(context, logprobs=body.logprobs),
        "timeout": context.settings.timeout,
    }


def response(model: str, result: Result, wants_logprobs: bool) -> dict[str, Any]:
    """Return a whole answer."""
    logprobs = CompletionLogprobs(wants_logprobs).push(result.logprobs)
    choice = {"index": 0, "text": result.text, "finish_reason": result.finish_reason, "logprobs": logprobs}
    return {**_base(model), "choices": [choice], "usage": usage_json(result.usage)}


def _base(model: str) -> dict[str, Any]:
    return {"id": new_id("cmpl-"), "object": "text_completion", "created": now(), "model": model}


class CompletionEvents:
    """Turns the chunks of an answer into OpenAI's events."""

    def __init__(self, model: str, include_usage: bool, wants_logprobs: bool) -> None:
        self._base = _base(model)
        self._logprobs = CompletionLogprobs(wants_logprobs)
        self._include_usage = include_usage

    def start(self) -> Iterator[dict[str, Any]]:
        """Yield the events before the first chunk: none."""
        yield from ()

    def push(self, chunk: Chunk) -> Iterator[dict[str, Any]]:
        """Yield the events of a chunk."""
        if chunk.text or chunk.usage is not None:
            logprobs = self._logprobs.push(chunk.logprobs)
            choice = {"index": 0, "text": chunk.text, "finish_reason": chunk.finish_reason, "logprobs": logprobs}
            yield {**self._base, "choices": [choice]}
        if chunk.usage is not None and self._include_usage:
            yield {**self._base, "choices": [], "usage": usage_json(chunk.usage)}
