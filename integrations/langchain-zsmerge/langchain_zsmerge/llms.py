"""`ZSMergeLLM`: LangChain's plain-completion model on zsmerge-llm."""

from __future__ import annotations

import builtins
from collections.abc import Generator, Sequence
from contextlib import closing
from threading import Event
from typing import TYPE_CHECKING, Any, cast

from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from langchain_zsmerge._generation import Request, ZSMergeGeneration
from langchain_zsmerge._messages import response_metadata

if TYPE_CHECKING:
    from zsmerge_llm import Chunk, Result


_FORMAT_OPTIONS = ("response_format", "grammar")
"""Options of a call that constrain its text."""


class ZSMergeLLM(ZSMergeGeneration, BaseLLM):  # type: ignore[misc]  # it names the prompt `prompts`
    """A local model that continues text, on a KV cache of constant size. No chat template is applied.

    `batch` and `generate` decode their prompts together. The model loads at its first use; objects with the same
    loading settings share one model, with `ChatZSMerge` too.

    ```python
    llm = ZSMergeLLM(model="smollm2", max_tokens=32)
    llm.invoke("The capital of France is")
    llm.bind(grammar=Grammar.choice("Paris", "Lyon")).invoke("The capital of France is ")
    ```
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    @property
    def _llm_type(self) -> str:
        return "zsmerge"

    def dict(self, **kwargs: Any) -> builtins.dict[str, Any]:
        """Return the settings, which are the key of LangChain's cache, where it is used: then the weights count too."""
        settings = super().dict(**kwargs)
        return {**settings, "fingerprint": self._fingerprint()} if self._uses_cache() else settings

    def _request(self, stop: list[str] | None, kwargs: builtins.dict[str, Any]) -> Request:
        changes = self._sampling_options(kwargs, _FORMAT_OPTIONS)
        given = {name: kwargs[name] for name in _FORMAT_OPTIONS if kwargs.get(name) is not None}
        model = kwargs.get("model") or self.model
        return Request(self._llm_for(model), model, {**self._request_options(stop, changes, kwargs), **given})

    def _result(self, cancel: Event | None, prompt: Sequence[str], request: Request) -> LLMResult:
        llm, options = request.llm, request.options
        if len(prompt) == 1:
            results = [llm.complete(prompt[0], cancel=cancel, **options)]
        else:
            results = llm.batch_complete(list(prompt), cancel=cancel, **options)
        generations = [
            [Generation(text=result.text, generation_info=response_metadata(result, request.model))]
            for result in results
        ]
        return LLMResult(generations=generations, llm_output=_total_usage(results, request.model))

    def _chunks(self, cancel: Event | None, prompt: str, request: Request) -> Generator[GenerationChunk, None, None]:
        stream = request.llm.stream_complete(prompt, cancel=cancel, **request.options)
        with closing(cast("Generator[Chunk]", stream)) as chunks:
            for chunk in chunks:
                info = None if chunk.finish_reason is None else response_metadata(chunk, request.model)
                yield GenerationChunk(text=chunk.text, generation_info=info)


def _total_usage(results: Sequence[Result], model: str) -> builtins.dict[str, Any]:
    prompt = sum(result.usage.prompt_tokens for result in results)
    completion = sum(result.usage.completion_tokens for result in results)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"model_name": model, "token_usage": usage}
