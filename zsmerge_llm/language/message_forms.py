"""Say the same messages in other forms, for templates that refuse or ignore some. Imports nothing heavy.

Messages are dicts from `normalize_messages`. No function changes what it is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from zsmerge_llm.language.messages import short_id
from zsmerge_llm.types import Message

TOOL_INSTRUCTIONS = """# Tools

You may call these functions:
{tools}

To call one, answer with its name and arguments as JSON between tags, and nothing else:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>
The results come back between <tool_response> and </tool_response>."""


CALL_TAG, RESULT_TAG = "<tool_call>", "<tool_response>"
"""What stands before a call and a tool's result in text."""


def other_forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield messages as they are, and then in forms that templates with stricter rules accept, the closest first.

    Rules of templates are: ids of nine characters (Mistral), one call in a message (Llama 3), the system message first
    or none at all (Gemma 2), user and assistant by turns, beginning with the user, and no calls or results. Nothing is
    left out: a system message goes in front of the next user message, messages of one role in a row are joined by a
    blank line, calls and results become tagged text.
    """
    seen: list[list[Message]] = []
    for calls in (_unchanged, one_call_each, calls_as_text):
        for system in (_unchanged, _later_system_as_user, _all_system_as_user):
            for roles in (_unchanged, _texts_by_turns, _by_turns):
                for ids in (_unchanged, _renumbered):
                    form = ids(roles(system(calls(messages))))
                    if form not in seen:
                        seen.append(form)
                        yield form


def with_tool_instructions(messages: list[Message], tools: Sequence[dict[str, Any]]) -> list[Message]:
    """Return the messages with a description of the tools at the end of the system message."""
    text = TOOL_INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def calls_as_text(messages: list[Message]) -> list[Message]:
    """Write calls as tagged JSON in the assistant's text, and results as a user message, joined with the next one."""
    plain: list[Message] = []
    after_result = False
    for message in messages:
        role, text = message["role"], message["content"]
        for call in message.get("tool_calls", ()):
            body = json.dumps(call["function"], ensure_ascii=False)
            text += ("\n" if text else "") + f"{CALL_TAG}\n{body}\n</tool_call>"
        if role == "tool":
            role, text = "user", f"{RESULT_TAG}\n{text}\n</tool_response>"
        if role == "user" and after_result:
            plain[-1] = {"role": role, "content": f"{plain[-1]['content']}\n{text}"}
        else:
            plain.append({"role": role, "content": text})
        after_result = message["role"] == "tool"
    return plain


def with_text_arguments(messages: list[Message]) -> list[Message]:
    """Return the messages with the arguments of all calls as JSON text."""
    changed = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": [{**call, "function": _as_text(call["function"])} for call in calls]}
        changed.append(message)
    return changed


def _as_text(function: dict[str, Any]) -> dict[str, Any]:
    given = function["arguments"]
    return {**function, "arguments": given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)}


def one_call_each(messages: list[Message]) -> list[Message]:
    """Give each call an assistant message of its own, with its result behind it."""
    result: list[Message] = []
    for at, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        if message["role"] == "tool" and _calls_before(messages, at) > 1:
            continue  # it stands behind its call
        if len(calls) < 2:
            result.append(message)
            continue
        results = _results_behind(messages, at)
        for number, call in enumerate(calls):
            first = message if number == 0 else {"role": "assistant", "content": ""}
            own = [each for each in results if each.get("tool_call_id") == call["id"]]
            result += [{**first, "tool_calls": [call]}, *own]
            results = [each for each in results if each not in own]
        result += results
    return result


def _results_behind(messages: list[Message], at: int) -> list[Message]:
    end = at + 1
    while end < len(messages) and messages[end]["role"] == "tool":
        end += 1
    return messages[at + 1 : end]


def _calls_before(messages: list[Message], at: int) -> int:
    """Return how many calls were made in the message that a result follows."""
    while at and messages[at]["role"] == "tool":
        at -= 1
    return len(messages[at].get("tool_calls") or ())


def _unchanged(messages: list[Message]) -> list[Message]:
    return messages


def _later_system_as_user(messages: list[Message]) -> list[Message]:
    return [*messages[:1], *_all_system_as_user(messages[1:])]


def _all_system_as_user(messages: list[Message]) -> list[Message]:
    """Put each system message in front of the user message that follows it, or make one of it."""
    result: list[Message] = []
    joins = False  # whether the last one was a system message
    for message in messages:
        role = "user" if message["role"] == "system" else message["role"]
        if joins and role == "user":
            result[-1] = _joined(result[-1], message)
        else:
            result.append({**message, "role": role} if role != message["role"] else message)
        joins = message["role"] == "system"
    return result


def _texts_by_turns(messages: list[Message]) -> list[Message]:
    """As `_by_turns`, but leave calls apart from text: Mistral's templates write no text beside calls."""
    return _by_turns(messages, joins_calls=False)


def _by_turns(messages: list[Message], joins_calls: bool = True) -> list[Message]:
    """Join messages of one role in a row, but for results; begin with a user message, if only an empty one."""
    result: list[Message] = []
    for message in messages:
        apart = not joins_calls and result and ("tool_calls" in message or "tool_calls" in result[-1])
        if result and message["role"] == result[-1]["role"] != "tool" and not apart:
            result[-1] = _joined(result[-1], message)
        else:
            result.append(message)
    first = int(result[0]["role"] == "system")
    if result[first:] and result[first]["role"] == "user":
        return result
    return [*result[:first], {"role": "user", "content": ""}, *result[first:]]


def _joined(first: Message, second: Message) -> Message:
    texts = [message["content"] for message in (first, second) if message["content"]]
    joined: Message = {**second, **first, "content": "\n\n".join(texts) if texts else first["content"]}
    if calls := [call for message in (first, second) for call in message.get("tool_calls", ())]:
        joined["tool_calls"] = calls
    return joined


def _renumbered(messages: list[Message]) -> list[Message]:
    """Return the messages with short ids, by order, for tool calls and their results."""
    short: dict[str, str] = {}
    changed = []
    for message in messages:
        message = dict(message)
        if calls := message.get("tool_calls"):
            for call in calls:
                short[call["id"]] = short_id(len(short))
            message["tool_calls"] = [{**call, "id": short[call["id"]]} for call in calls]
        if wanted := message.get("tool_call_id"):
            message["tool_call_id"] = short.setdefault(wanted, short_id(len(short)))
        changed.append(message)
    return changed
