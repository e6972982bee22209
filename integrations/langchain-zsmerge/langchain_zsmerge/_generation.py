"""How LangChain's four generation methods run a request: in this thread or another, whole or streamed, cancellable."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import aclosing
from types import TracebackType
from typing import Any, NamedTuple

from langchain_zsmerge._settings import ZSMergeSettings
from zsmerge_llm import LLM, aio


class Request(NamedTuple):
    """One call: the LLM that answers it, the model's name, and keywords for the LLM's method."""

    llm: LLM
    model: str
    options: dict[str, Any]


class Deadline:
    """Sets the cancel event of one request when its time is over, and when the block is left.

    Args:
        timeout: seconds the request may take; None for no limit.
        cancel: the event; a new one by default.
    """

    def __init__(self, timeout: float | None = None, cancel: threading.Event | None = None) -> None:
        self.cancel = cancel or threading.Event()
        self._timeout = timeout
        self._expired = False
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Deadline:
        if self._timeout is not None:
            self._timer = threading.Timer(self._timeout, self._expire)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel.set()
        if self._timer is not None:
            self._timer.cancel()

    def check(self, finish_reason: str | None) -> None:
        """Raise TimeoutError if the time limit cut the answer."""
        if finish_reason == "cancelled" and self._expired:
            raise TimeoutError(f"No complete answer within {self._timeout:g} s: raise timeout or lower max_tokens.")

    def _expire(self) -> None:
        self._expired = True
        self.cancel.set()


class ZSMergeGeneration(ZSMergeSettings):
    """`_generate` and `_stream`, sync and async, for both classes. `prompt` is what LangChain passes: messages, a text
    or several texts."""

    @abstractmethod
    def _request(self, stop: list[str] | None, kwargs: dict[str, Any]) -> Request:
        """Return the request of one call. Raises ConfigError: an unknown option or a bad value."""

    @abstractmethod
    def _result(self, deadline: Deadline, prompt: Any, request: Request) -> Any:
        """Return the whole answer in LangChain's type."""

    @abstractmethod
    def _chunks(self, deadline: Deadline, prompt: Any, request: Request) -> Generator[Any, None, None]:
        """Yield the answer in LangChain's chunks."""

    def _generate(self, prompt: Any, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any) -> Any:
        return self._result(Deadline(self.timeout), prompt, self._request(stop, kwargs))

    async def _agenerate(
        self, prompt: Any, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Any:
        request = self._request(stop, kwargs)
        return await aio.call(lambda cancel: self._result(Deadline(self.timeout, cancel), prompt, request))

    def _stream(
        self, prompt: Any, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[Any]:
        for chunk in self._chunks(Deadline(self.timeout), prompt, self._request(stop, kwargs)):
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    async def _astream(
        self, prompt: Any, stop: list[str] | None = None, run_manager: Any = None, **kwargs: Any
    ) -> AsyncIterator[Any]:
        request = self._request(stop, kwargs)
        chunks = aio.stream(lambda cancel: self._chunks(Deadline(self.timeout, cancel), prompt, request))
        async with aclosing(chunks):
            async for chunk in chunks:
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
