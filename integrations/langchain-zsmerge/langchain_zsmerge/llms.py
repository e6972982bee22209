"""`ZSMergeLLM`: LangChain's plain-completion model on zsmerge-llm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any, cast

from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from langchain_zsmerge._calls import Call
from langchain_zsmerge._messages import response_metadata
from langchain_zsmerge._settings import Request, ZSMergeSettings
from zsmerge_llm import aio

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models.base import LangSmithParams

    from zsmerge_llm import Chunk, Result


_FORM = ("response_format", "grammar")
"""Options of a call that say what its text may look like."""


class ZSMergeLLM(ZSMergeSettings, BaseLLM):
    """A local model that continues text, with a KV cache that never grows. No chat template is applied.

    `batch` and `generate` decode their prompts together. Loads at the first use; objects with the same loading
    settings share one model, with `ChatZSMerge` too.

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

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        return super()._get_ls_params(stop=self._stops(stop) or None, **kwargs)

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._answers(Call(self.timeout), prompts, self._request(stop, kwargs))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        request = self._request(stop, kwargs)
        return await aio.call(lambda cancel: self._answers(Call(self.timeout, cancel), prompts, request))

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        for chunk in self._pieces(Call(self.timeout), prompt, self._request(stop, kwargs)):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        request = self._request(stop, kwargs)
        pieces = aio.stream(lambda cancel: self._pieces(Call(self.timeout, cancel), prompt, request))
        async with aclosing(pieces) as chunks:
            async for chunk in chunks:
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _request(self, stop: list[str] | None, kwargs: dict[str, Any]) -> Request:
        """One call with the keywords of `LLM.complete`. Raises ConfigError."""
        changes = self._options(kwargs, _FORM)
        given = {name: kwargs[name] for name in _FORM if kwargs.get(name) is not None}
        model = kwargs.get("model") or self.model
        return Request(self._core(model), model, {"sampling": self._sampling(stop, changes), **given})

    def _answers(self, call: Call, prompts: Sequence[str], request: Request) -> LLMResult:
        core, settings = request.core, request.settings
        with call:
            results = (
                [core.complete(prompts[0], cancel=call.cancel, **settings)]
                if len(prompts) == 1
                else core.batch_complete(list(prompts), cancel=call.cancel, **settings)
            )
            for result in results:
                call.check(result.finish_reason)
        infos = [response_metadata(result, request.model) for result in results]
        generations = [
            [Generation(text=result.text, generation_info=info)] for result, info in zip(results, infos, strict=True)
        ]
        return LLMResult(generations=generations, llm_output=_totals(results, request.model))

    def _pieces(self, call: Call, prompt: str, request: Request) -> Generator[GenerationChunk, None, None]:
        stream = request.core.stream_complete(prompt, cancel=call.cancel, **request.settings)
        with call, closing(cast("Generator[Chunk]", stream)) as chunks:
            for chunk in chunks:
                call.check(chunk.finish_reason)
                info = None if chunk.finish_reason is None else response_metadata(chunk, request.model)
                yield GenerationChunk(text=chunk.text, generation_info=info)


def _totals(results: Sequence[Result], model: str) -> dict[str, Any]:
    prompt = sum(result.usage.prompt_tokens for result in results)
    completion = sum(result.usage.completion_tokens for result in results)
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"model_name": model, "token_usage": usage}
