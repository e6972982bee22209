"""What OpenAI's chat completions and completions have in common: fields of requests, and what a request cost."""

from __future__ import annotations

from typing import Any

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.server.errors import invalid
from zsmerge_llm.server.requests import Body, Context, own_counts, refuse
from zsmerge_llm.types import Usage


class StreamOptions(Body):
    """OpenAI's `stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationBody(Body):
    """A request. Fields in the last group are accepted and have no effect here."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    # of this server
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    # refused where they ask for something
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    # without effect
    user: str | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether the last event of a stream is one of the usage alone."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, context: Context) -> None:
        """Refuse another model, and fields that are not supported. Raises RequestError."""
        context.check_model(self.model)
        refuse(
            logit_bias=self.logit_bias,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )
        refuse_several(n=self.n)

    def sampling(self, context: Context, *limits: int | None, logprobs: int | None = None) -> SamplingParams:
        """Return sampling parameters. limits: of the answer's tokens; they go before `max_tokens`."""
        return context.sampling(
            *limits,
            self.max_tokens,
            stop=self.stop,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            logprobs=logprobs,
        )


def refuse_several(**fields: int | None) -> None:
    """Refuse numbers of answers other than one. Raises RequestError."""
    for name, number in fields.items():
        if number not in (None, 1):
            raise invalid(f"{name} must be 1: ask again for another answer.", name)


def usage_json(usage: Usage) -> dict[str, Any]:
    """Return what a request cost, as OpenAI counts it, and our own counts."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": usage.prompt_tokens - usage.cached_tokens,
        },
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "zsmerge": own_counts(usage),
    }
