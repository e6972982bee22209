"""What a chat template leaves out without a word: found by rendering short conversations. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

from zsmerge_llm.errors import InputError
from zsmerge_llm.language.message_forms import with_text_arguments
from zsmerge_llm.types import Message

Render = Callable[[list[Message], list[dict[str, Any]] | None], str]
"""Renders messages and tools."""
MARKER, OTHER_MARKER, TEXT_MARKER = "zq7Kx", "wv3Jy", "pL5Rd"
"""Words that no template writes by itself."""
USER: Message = {"role": "user", "content": "?"}
ANSWER: Message = {"role": "assistant", "content": "!"}
SYSTEM: Message = {"role": "system", "content": MARKER}
CALL = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": {"x": MARKER}}}
CALLING: list[Message] = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": OTHER_MARKER, "tool_call_id": "call00000", "name": "f"},
]
TOOL = {"type": "function", "function": {"name": MARKER, "description": "-", "parameters": {"type": "object"}}}


def sample_histories(render: Render) -> tuple[str, ...]:
    """Return short conversations, some with tools, as a template writes them; "" for those that it refuses."""
    calling: Message = {**CALLING[1], "reasoning_content": TEXT_MARKER}
    thoughtful: Message = {**ANSWER, "reasoning_content": TEXT_MARKER}
    texts = []
    for system in ([], [SYSTEM]):
        plain = [*system, USER, thoughtful, USER, thoughtful]
        with_tools = [*system, USER, calling, CALLING[2], thoughtful, USER, calling, CALLING[2]]
        for messages, tools in ((plain, None), (with_tools, [TOOL])):
            try:
                texts.append(render(messages, tools))
            except InputError:
                texts.append("")
    return tuple(texts)


class TemplateProbe:
    """One template. Each question is asked when it first matters.

    Args:
        source: its Jinja text.
        render: renders messages and tools. Raises InputError: the template refuses them.
    """

    def __init__(self, source: str, render: Render) -> None:
        self._source = source
        self._render = render

    def leaves_out(self, messages: list[Message], given: list[Message]) -> bool:
        """Return whether the template would accept these messages and ignore a part of them.

        That is a system message, or text that was put beside calls. Text that was `given` beside calls is left to the
        template.
        """
        joined = _texts_beside_calls(messages) - _texts_beside_calls(given)
        if joined and self._ignores_text_beside_calls:
            return True
        system = [at for at, message in enumerate(messages) if message["role"] == "system"]
        if not system:
            return False
        if len(system) == len(messages):
            return self._ignores_lone_system
        return (system[0] == 0 and self._ignores_system) or (system[-1] > 0 and self._ignores_later_system)

    @cached_property
    def shows_tools(self) -> bool:
        """Whether tools that are offered are written."""
        return "tools" in self._source and self._shows([USER], [TOOL], MARKER) is True

    @cached_property
    def call_arguments(self) -> Literal["objects", "text"] | None:
        """What arguments of calls must be, so that calls and results are written; None: they never are."""
        if "tool_calls" not in self._source:
            return None
        tools = [TOOL] if self.shows_tools else None
        if self._shows(CALLING, tools, f'"{MARKER}"', OTHER_MARKER):
            return "objects"
        return "text" if self._shows(with_text_arguments(CALLING), tools, f'"{MARKER}"', OTHER_MARKER) else None

    @cached_property
    def _ignores_text_beside_calls(self) -> bool:
        call = {**CALL, "function": {"name": "f", "arguments": {}}}
        beside: list[Message] = [USER, {"role": "assistant", "content": TEXT_MARKER, "tool_calls": [call]}, CALLING[-1]]
        tools = [TOOL] if self.shows_tools else None
        return any(self._shows(form, tools, TEXT_MARKER) is False for form in (beside, with_text_arguments(beside)))

    @cached_property
    def _ignores_system(self) -> bool:
        return self._shows([SYSTEM, USER], None, MARKER) is False

    @cached_property
    def _ignores_later_system(self) -> bool:
        places: list[list[Message]] = [[USER, ANSWER, SYSTEM, USER], [USER, ANSWER, USER, SYSTEM]]
        return any(self._shows(messages, None, MARKER) is False for messages in places)

    @cached_property
    def _ignores_lone_system(self) -> bool:
        return self._shows([SYSTEM], None, MARKER) is False

    def _shows(self, messages: list[Message], tools: list[dict[str, Any]] | None, *texts: str) -> bool | None:
        """Return whether the template writes these texts of messages; None: it refuses the messages."""
        try:
            rendered = self._render(messages, tools)
        except TemplateRefusal:
            return None
        return all(text in rendered for text in texts)


class TemplateRefusal(InputError):  # noqa: N818 - an answer of the template
    """A chat template refuses messages, or fails."""


def _texts_beside_calls(messages: list[Message]) -> set[str]:
    return {message["content"] for message in messages if message.get("tool_calls") and message["content"]}
