"""How LangChain's four generation methods run a request: in this thread or another, whole or streamed, cancellable."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import aclosing
from threading import Event
from typing import Any, NamedTuple

from langchain_zsmerge._errors import langchain_errors
from langchain_zsmerge._settings import ZSMergeSettings
from zsmerge_llm import LLM, aio


class Request(NamedTuple):
    """One call: the LLM that answers it, the model's name, and keywords for the LLM's method."""

    llm: LLM
    model: str
    options: dict[str, Any]


class ZSMergeGeneration(ZSMergeSettings):
    """`_generate` and `_stream`, sync and async, for both classes. `prompt` is what LangChain passes: messages, a text
    or several texts."""

    async def agenerate(self, *args: Any, **kwargs: Any) -> Any:
        if self._uses_cache():
            with langchain_errors():  # not in the event loop's thread: it may load the model
                await aio.call(lambda cancel: self._fingerprint(kwargs.get("model")))
        parent: Any = super()
        return await parent.agenerate(*args, **kwargs)

    @abstractmethod
    def _request(self, stop: list[str] | None, kwargs: dict[str, Any]) -> Request:
        """Return the request of one call. Raises ConfigError: an unknown option or a bad value."""

    @abstractmethod
    def _result(self, cancel: Event | None, prompt: Any, request: Request) -> Any:
        """Return the whole answer in LangChain's type."""

    @abstractmethod
    def _chunks(self, cancel: Event | None, prompt: Any, request: Request) -> Generator[Any, None, None]:
        """Yield the answer in LangChain's chunks."""

    def _generate(self, prompt: Any, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any) -> Any:
        with langchain_errors():
            return self._result(None, prompt, self._request(stop, kwargs))

    async def _agenerate(
        self, prompt: Any, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Any:
        with langchain_errors():
            request = self._request(stop, kwargs)
            return await aio.call(lambda cancel: self._result(cancel, prompt, request))

    def _stream(
        self, prompt: Any, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[Any]:
        with langchain_errors():
            for chunk in self._chunks(None, prompt, self._request(stop, kwargs)):
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self, prompt: Any, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        with langchain_errors():
            request = self._request(stop, kwargs)
            async with aclosing(aio.stream(lambda cancel: self._chunks(cancel, prompt, request))) as chunks:
                async for chunk in chunks:
                    if run_manager is not None:
                        await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                    yield chunk
