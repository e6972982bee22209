"""`KeepWholeHistory`: agents whose history is never summarized or trimmed. Needs the package langchain."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from langchain_core.messages import AnyMessage

from langchain_zsmerge._errors import langchain_errors
from zsmerge_llm.errors import ConfigError, MissingDependencyError

try:
    from langchain.agents.middleware import AgentMiddleware, ModelRequest, ModelResponse
except ImportError as error:
    raise MissingDependencyError(
        "KeepWholeHistory is for the agents of langchain: pip install 'langchain-zsmerge[agents]'."
    ) from error


class KeepWholeHistory(AgentMiddleware[Any, Any, Any]):
    """Give the model the whole history of an agent: nothing is summarized, cleared or trimmed.

    ```python
    create_deep_agent(chat, middleware=[KeepWholeHistory()])
    create_agent(chat, tools, middleware=[*others, KeepWholeHistory()])
    ```

    A compressed KV cache has the same size at any length, and each step reads only what is new. A summary would cost
    an answer of its own, and the changed history would be read again.

    It has the name of `SummarizationMiddleware`. So it takes the place of the one that `create_deep_agent` adds, also
    in the general-purpose subagent. `create_agent` refuses an agent with both. Stand it last: messages that another
    middleware leaves out of a request are an error.

    Raises, at a request:
        ConfigError: a middleware before it removed or cleared messages; a model that reads a limited length.
    """

    @property
    def name(self) -> str:
        """The name of the middleware whose place it takes."""
        return "SummarizationMiddleware"

    def wrap_model_call(self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Any]) -> Any:
        """Pass a request on that has the whole history."""
        _check(request)
        return handler(request)

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> Any:
        """Async `wrap_model_call`."""
        _check(request)
        return await handler(request)


@langchain_errors()
def _check(request: ModelRequest[Any]) -> None:
    """Raise ConfigError where the model may not or cannot read the whole history."""
    limit = (request.model.profile or {}).get("max_input_tokens")
    if limit is not None:
        raise ConfigError(
            f"KeepWholeHistory is for a cache that reads any length, and this model reads {limit:,} tokens at most: "
            "give it a cache with slots and no max_input_tokens, or leave KeepWholeHistory out."
        )
    history = request.state["messages"]
    kept = {message.id for message in request.messages if not _is_cleared(message)}
    num_missing = sum(message.id not in kept for message in history)
    if num_missing:
        raise ConfigError(
            f"A middleware before KeepWholeHistory removed or cleared {num_missing} of {len(history)} messages. "
            "ContextEditingMiddleware does so, for example. Leave it out: the history has no cost here."
        )


def _is_cleared(message: AnyMessage) -> bool:
    """Return whether LangChain's ContextEditingMiddleware replaced the message's text."""
    return bool(message.response_metadata.get("context_editing", {}).get("cleared"))
