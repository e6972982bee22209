"""`ZSMergeLLM`: LangChain's plain-completion model on zsmerge-llm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import aclosing, closing
from typing import TYPE_CHECKING, Any

from langchain_core.language_models import BaseLLM
from langchain_core.outputs import Generation, GenerationChunk, LLMResult
from pydantic import ConfigDict

from langchain_zsmerge._calls import Call, run_in_thread, stream_in_thread
from langchain_zsmerge._messages import response_metadata
from langchain_zsmerge._settings import ZSMergeSettings
from zsmerge_llm import Chunk, Result, SamplingParams

if TYPE_CHECKING:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.language_models.base import LangSmithParams


class ZSMergeLLM(ZSMergeSettings, BaseLLM):
    """A local model that continues text, with a KV cache that never grows. No chat template is applied.

    `batch` and `generate` decode their prompts together. Loads at the first use; objects with the same loading
    settings share one model, with `ChatZSMerge` too.

    ```python
    ZSMergeLLM(model="smollm2", max_tokens=32).invoke("The capital of France is")
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
        return self._answers(Call(self.timeout), prompts, self._sampling(stop, self._options(kwargs)))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        call, sampling = Call(self.timeout), self._sampling(stop, self._options(kwargs))
        return await run_in_thread(lambda: self._answers(call, prompts, sampling), call.cancel)

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        sampling = self._sampling(stop, self._options(kwargs))
        for chunk in self._pieces(Call(self.timeout), prompt, sampling):
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
        call, sampling = Call(self.timeout), self._sampling(stop, self._options(kwargs))
        async with aclosing(stream_in_thread(lambda: self._pieces(call, prompt, sampling), call.cancel)) as chunks:
            async for chunk in chunks:
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _answers(self, call: Call, prompts: Sequence[str], sampling: SamplingParams) -> LLMResult:
        with call:
            results: list[Result] = (
                [self._llm.complete(prompts[0], sampling=sampling, cancel=call.cancel)]
                if len(prompts) == 1
                else self._llm.batch_complete(list(prompts), sampling=sampling, cancel=call.cancel)
            )
            for result in results:
                call.check(result.finish_reason)
        generations = [[Generation(text=result.text, generation_info=self._info(result))] for result in results]
        return LLMResult(generations=generations, llm_output=self._totals(results))

    def _pieces(self, call: Call, prompt: str, sampling: SamplingParams) -> Generator[GenerationChunk, None, None]:
        with call, closing(self._llm.stream_complete(prompt, sampling=sampling, cancel=call.cancel)) as chunks:
            for chunk in chunks:
                call.check(chunk.finish_reason)
                info = None if chunk.finish_reason is None else self._info(chunk)
                yield GenerationChunk(text=chunk.text, generation_info=info)

    def _info(self, answer: Result | Chunk) -> dict[str, Any]:
        return response_metadata(answer, self.model)

    def _totals(self, results: Sequence[Result]) -> dict[str, Any]:
        prompt = sum(result.usage.prompt_tokens for result in results)
        completion = sum(result.usage.completion_tokens for result in results)
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {"model_name": self.model, "token_usage": usage}
