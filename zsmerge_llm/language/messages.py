"""Messages in the OpenAI format, checked and brought into normal form. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from zsmerge_llm.errors import InputError, UnsupportedContentError, shown
from zsmerge_llm.language.json_values import MAX_DEPTH, is_deep
from zsmerge_llm.types import Message

ROLES = ("system", "user", "assistant", "tool")
CALL_SHAPE = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": {...}}}'


@dataclass(frozen=True, eq=False)
class MessageHistory:
    """Messages as a caller gave them, and in normal form (`messages`).

    A later request gives the same messages again and some more: `normalize` checks only these. The dicts of the others
    are the same objects then, so that comparing two histories costs nothing. Nobody may change them.

    Attributes:
        given: copies of what the caller gave.
        pending_calls: tool calls that have no result yet.
        num_calls: tool calls so far.
    """

    given: list[Message] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    pending_calls: tuple[dict[str, Any], ...] = ()
    num_calls: int = 0

    def shared_prefix(self, messages: Sequence[Message]) -> int:
        """Return how many messages at the beginning of `messages` are those of this history."""
        length = shared_prefix(self.given, messages, self.num_calls > 0)
        # Which calls were pending at an earlier message is not known.
        return length if length == len(self.given) or not self.num_calls else 0

    def normalize(
        self, messages: str | Sequence[Message], partial: bool = False, shared: int | None = None
    ) -> MessageHistory:
        """Return the history of `messages`, as `normalize_messages` checks them. Raises as it does.

        shared: `shared_prefix(messages)`, if it is known.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}] if messages else []
        if not isinstance(messages, Sequence):
            raise InputError(
                f"messages must be a string or a list of dicts with role and content, not {_kind(messages)}."
            )
        if not messages:
            raise InputError("There are no messages: give at least one, such as {'role': 'user', 'content': 'Hello'}.")
        messages = list(cast(Sequence[Message], messages))
        known = self.shared_prefix(messages) if shared is None else shared
        new = [_message(messages[at], f"messages[{at}]") for at in range(known, len(messages))]
        calls = (self.pending_calls, self.num_calls) if known == len(self.given) else ((), 0)
        pending, num_calls = _link_results(new, *calls)
        if messages[-1]["role"] == "assistant" and not partial:
            raise InputError(
                "The last message is the assistant's, so there is nothing to answer: end with a user or tool message. "
                "To have a text continued, use LLM.complete."
            )
        given = [_copy(messages[known + at], message) for at, message in enumerate(new)]
        return MessageHistory([*self.given[:known], *given], [*self.messages[:known], *new], pending, num_calls)


def shared_prefix(known: Sequence[Message], messages: Sequence[Message], has_calls: bool = False) -> int:
    """Return the number of equal messages at the beginning of two lists. The same objects are compared in no time.

    has_calls: whether `known` has tool calls. In their arguments True and 1.0 are not taken for 1.
    """
    equal, end = 0, min(len(known), len(messages))
    if known[:end] == messages[:end]:
        if has_calls:
            calls = (at for at in range(end) if "tool_calls" in known[at] and known[at] is not messages[at])
            return next((at for at in calls if repr(known[at]) != repr(messages[at])), end)
        return end
    while end - equal > 1:  # messages[:equal] are the same, messages[:end] are not
        middle = (equal + end) // 2
        if known[equal:middle] == messages[equal:middle]:
            equal = middle
        else:
            end = middle
    return shared_prefix(known[:equal], messages[:equal], has_calls) if has_calls else equal


def normalize_messages(messages: str | Sequence[Message], partial: bool = False) -> list[Message]:
    """Check messages and bring them into normal form: text content, tool calls with ids and parsed arguments.

    A string is one user message. Text blocks are joined by newlines. Arguments that are no JSON object stay the string
    they are. Calls without id get one by their order; a tool result finds its call by `tool_call_id`, else by `name`.
    Keys that no template reads (`id`, `refusal`, ...) are dropped. `partial`: a part of a conversation, which may end
    with an answer.

    Raises:
        InputError: no messages, an unknown role, content or tool calls of a wrong shape, or nothing to answer: the
            last message is the assistant's own. (To have text continued, use `LLM.complete`.)
        UnsupportedContentError: a block that is not text.
    """
    return MessageHistory().normalize(messages, partial).messages


def assistant_message(content: str, calls: Sequence[Mapping[str, Any]]) -> Message:
    """Return the assistant's message with this content and these calls, in normal form."""
    return _message({"role": "assistant", "content": content, "tool_calls": calls}, "The answer")


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise InputError(f"{where} must be a dict with role and content, not {_kind(message)}.")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where} has the role {shown(role)}; it must be one of {', '.join(ROLES)}.")
    checked: Message = {"role": role, "content": _text(message.get("content"), role, where)}
    if calls := message.get("tool_calls"):
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
            raise InputError(f"{where}: tool_calls must be a list in an assistant message, each {CALL_SHAPE}.")
        checked["tool_calls"] = [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
    for key in ("tool_call_id", "name", "reasoning_content"):
        if (value := message.get(key)) is not None:
            if not isinstance(value, str):
                raise InputError(f"{where}.{key} must be a string, not {_kind(value)}.")
            checked[key] = value
    if role == "tool" and not (checked.get("tool_call_id") or checked.get("name")):
        raise InputError(
            f"{where} is a tool result and must say whose: set tool_call_id (or name) to that of the call."
        )
    return checked


def _copy(given: Mapping[str, Any], message: Message) -> Message:
    """Return a copy of a message that the caller may change later: `message`, its normal form, where that is equal."""
    if given == message and "tool_calls" not in message:
        return message
    try:
        return cast(Message, json.loads(json.dumps(given)))
    except (TypeError, ValueError, RecursionError):  # something that is no JSON in a key that no template reads
        return message


def _text(content: Any, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InputError(f"{where}.content must be text or a list of text blocks, not {_kind(content)}.")
    return "\n".join(_block(block, f"{where}.content[{index}]") for index, block in enumerate(content))


def _block(block: Any, where: str) -> str:
    if isinstance(block, str):
        return block
    kind = block.get("type") if isinstance(block, Mapping) else None
    if kind is None:
        raise InputError(f"{where} must be {{'type': 'text', 'text': ...}}, not {_kind(block)}.")
    if kind != "text":
        raise UnsupportedContentError(
            f"{where} is of type {shown(kind)}, and the model reads text only: send it as text."
        )
    if not isinstance(text := block.get("text"), str):
        raise InputError(f"{where}.text must be a string, not {_kind(text)}.")
    return text


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise InputError(f"{where} must have the form {CALL_SHAPE}.")
    arguments = _arguments(function.get("arguments") or {}, where)
    function = {"name": function["name"], "arguments": arguments}
    return {"id": str(call.get("id") or ""), "type": "function", "function": function}


def _arguments(given: Any, where: str) -> dict[str, Any] | str:
    try:
        value = json.loads(given if isinstance(given, str) else json.dumps(given))
    except (TypeError, ValueError, RecursionError):
        value = None
    if is_deep(value):
        value = None
    if not isinstance(value, dict) and not isinstance(given, str):
        raise InputError(
            f"{where}.function.arguments must be a dict of JSON values or its JSON text, not a "
            f"{type(given).__name__}, and of at most {MAX_DEPTH} levels."
        )
    return value if isinstance(value, dict) else given


def _link_results(
    messages: list[Message], pending: Sequence[dict[str, Any]], num_calls: int
) -> tuple[tuple[dict[str, Any], ...], int]:
    """Give each call an id, and each result the id and the name of the call it answers, in place.

    Args:
        pending: earlier calls that have no result yet. num_calls: how many calls were made before.

    Returns:
        Both, after these messages.
    """
    waiting = list(pending)
    for message in messages:
        for call in message.get("tool_calls", ()):
            call["id"] = call["id"] or short_id(num_calls)
            num_calls += 1
            waiting.append(call)
        if message["role"] == "tool":
            wanted, name = message.get("tool_call_id"), message.get("name")
            for call in waiting:
                if call["id"] == wanted if wanted else call["function"]["name"] == name:
                    message.update(tool_call_id=call["id"], name=call["function"]["name"])
                    waiting.remove(call)
                    break
    return tuple(waiting), num_calls


def short_id(number: int) -> str:
    """Return an id of nine letters and digits, the form that Mistral's templates require."""
    return f"call{number % 100_000:05d}"


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
