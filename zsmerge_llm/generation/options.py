"""The keyword arguments of `LLM`'s requests, listed once: for type checkers, for `help`, and as one object inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from threading import Event
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.engine.scheduling import Deadline
from zsmerge_llm.errors import did_you_mean
from zsmerge_llm.generation.arguments import check_types
from zsmerge_llm.language.grammar import Grammar
from zsmerge_llm.language.json_values import MAX_SCHEMA, MAX_TOOLS, plain_json
from zsmerge_llm.language.output_format import OutputFormat, OutputFormats
from zsmerge_llm.language.reasoning_tags import effort_args
from zsmerge_llm.types import Message, Progress, ResponseFormat, ToolChoice

if TYPE_CHECKING:
    from zsmerge_llm.language.chat_template import ChatTemplate
    from zsmerge_llm.sessions.session import Session

Method = TypeVar("Method", bound=Callable[..., Any])


class BatchCompletionOptions(TypedDict, total=False):
    """Keyword arguments of `LLM.batch_complete`."""

    sampling: SamplingParams | None
    response_format: ResponseFormat | None
    grammar: Grammar | None
    cancel: Event | None
    timeout: float | None
    priority: int


class CompletionOptions(BatchCompletionOptions, total=False):
    """Keyword arguments of `LLM.complete` and `LLM.stream_complete`."""

    progress: Progress | None


class BatchOptions(BatchCompletionOptions, total=False):
    """Keyword arguments of `LLM.batch`."""

    tools: Sequence[dict[str, Any]] | None
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool
    template_args: Mapping[str, Any] | None
    reasoning_effort: str | None


class ChatOptions(BatchOptions, total=False):
    """Keyword arguments of `LLM.chat` and `LLM.stream`."""

    session: str | Session | None
    namespace: str | None
    probe: str | None
    reread: bool
    retry_invalid: bool
    progress: Progress | None


@dataclass(frozen=True)
class RequestOptions:
    """The keyword arguments of any request, with their defaults. `LLM.stream` documents them."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    tools: Sequence[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    template_args: Mapping[str, Any] | None = None
    reasoning_effort: str | None = None
    response_format: ResponseFormat | None = None
    grammar: Grammar | None = None
    session: str | Session | None = None
    namespace: str | None = None
    probe: str | None = None
    reread: bool = False
    retry_invalid: bool = False
    cancel: Event | None = None
    timeout: float | None = None
    priority: int = 0
    progress: Progress | None = None

    @classmethod
    def parse(cls, allowed: type, given: Mapping[str, Any]) -> RequestOptions:
        """Return the options of a method whose keyword arguments the TypedDict `allowed` lists.

        The time of `timeout` runs from now on.

        Raises:
            TypeError: an unknown keyword argument. InputError: an argument of a wrong type; tools or a response format
                that are no JSON, too long or too deep.
        """
        known = allowed.__annotations__
        if unknown := [name for name in given if name not in known]:
            sampling = {each.name: f"sampling=SamplingParams({each.name}=...)" for each in fields(SamplingParams)}
            misplaced = [sampling[name] for name in unknown if name in sampling]
            raise TypeError(
                f"Unknown keyword argument {', '.join(unknown)}: known are {', '.join(known)}. Settings of sampling, "
                "such as max_tokens, go into sampling=SamplingParams(...)."
                + (f" Write {', '.join(misplaced)}." if misplaced else did_you_mean(unknown, [*known, *sampling]))
            )
        options = cls(**{**given, "sampling": SamplingParams() if given.get("sampling") is None else given["sampling"]})
        check_types(options)
        json_values = {
            name: plain_json(value, name, max_chars)
            for name, max_chars in (("tools", MAX_TOOLS), ("response_format", MAX_SCHEMA))
            if (value := getattr(options, name)) is not None
        }
        if options.namespace is not None and isinstance(options.session, str):
            options = replace(options, session=f"{options.namespace}/{options.session}")
        if options.timeout is not None:
            options = replace(options, cancel=Deadline(options.cancel, options.timeout))
        return replace(options, **json_values) if json_values else options

    def own_name(self, session: str) -> str:
        """Return the name of a session as the caller gives it: without the namespace."""
        return session if self.namespace is None else session.removeprefix(f"{self.namespace}/")

    def check_deadline(self) -> None:
        """Raise DeadlineExceededError if `timeout` has passed; for answers that were stopped."""
        if isinstance(self.cancel, Deadline):
            self.cancel.check()

    def request_args(self, template: ChatTemplate) -> dict[str, Any]:
        """Return the variables of the chat template for this request alone."""
        if self.reasoning_effort is None and not self.template_args:
            return {}
        return {**effort_args(template.source(self.tools), self.reasoning_effort), **(self.template_args or {})}

    def output_format(self, formats: OutputFormats, messages: Sequence[Message]) -> OutputFormat:
        """Return the format of the answer to `messages`. Raises as `OutputFormats.chat`."""
        return formats.chat(
            messages, self.tools, self.tool_choice, self.parallel_tool_calls, self.response_format, self.grammar
        )


def with_options(options: type) -> Callable[[Method], Method]:
    """Show the keys of a TypedDict as keyword arguments in the signature of a method that takes them as `**options`."""
    defaults = {each.name: None if each.name == "sampling" else each.default for each in fields(RequestOptions)}

    def decorate(method: Method) -> Method:
        signature = inspect.signature(method)
        positional = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        keywords = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=hint.__forward_arg__
            )
            for name, hint in options.__annotations__.items()
        ]
        method.__signature__ = signature.replace(parameters=[*positional, *keywords])  # type: ignore[attr-defined]
        return method

    return decorate
