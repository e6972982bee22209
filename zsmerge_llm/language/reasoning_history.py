"""What becomes of the reasoning of earlier answers in a chat template, and what the template writes before another."""

from __future__ import annotations

from collections.abc import Sequence

from zsmerge_llm.errors import InputError
from zsmerge_llm.language.chat_template import ChatTemplate, Tools
from zsmerge_llm.language.reasoning_tags import HARMONY, reasoning_tags
from zsmerge_llm.language.template_probe import ANSWER, TEXT_MARKER, USER
from zsmerge_llm.types import Message


def drops_reasoning(template: ChatTemplate) -> bool:
    """Return whether reasoning is left out of answers before the user's last message."""
    return leaves_out_reasoning(template, [USER, ANSWER, USER], 1)


def leaves_out_reasoning(template: ChatTemplate, messages: Sequence[Message], n: int, tools: Tools = None) -> bool:
    """Return whether the reasoning of the assistant's `messages[n]` is left out, in either form that it may have.

    That is in its `reasoning_content`, or in tags at the beginning of its content.
    """
    tags, answer = reasoning_tags(template.source(tools)), messages[n]
    if tags is None or answer["role"] != "assistant":
        return False
    forms: list[Message] = [{"reasoning_content": TEXT_MARKER}]
    if tags is not HARMONY:  # whose template refuses tags in a message
        forms.append({"content": f"{tags.open}\n{TEXT_MARKER}\n{tags.close}\n\n{answer['content']}"})
    try:
        texts = [template.render([USER, {**answer, **form}, *messages[n + 1 :]], tools) for form in forms]
    except InputError:
        return False
    return not any(TEXT_MARKER in text for text in texts)


def answer_head(template: ChatTemplate, messages: Sequence[Message], n: int, tools: Tools = None) -> str | None:
    """Return what is written between the user's `messages[n-1]` and the text of the answer to it, once it is history.

    None where there are calls, or where the template does not show it.
    """
    if not all(message["role"] in ("user", "assistant") for message in messages[n - 1 :]):
        return None
    if n == len(messages) or messages[n]["role"] != "assistant" or messages[n].get("tool_calls"):
        return None
    try:
        before = template.render(messages[n - 1 : n], tools, add_generation_prompt=False)
        answer: Message = {"role": "assistant", "content": TEXT_MARKER}
        whole = template.render([messages[n - 1], answer, *messages[n + 1 :]], tools)
    except InputError:
        return None
    head, found, _ = whole.removeprefix(before).partition(TEXT_MARKER)
    return head if found and whole.startswith(before) else None


def answer_header(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """Return what begins the answer to messages that end with the user's; "" where the template does not show it."""
    last = [*(message for message in messages[:1] if message["role"] == "system"), messages[-1]]
    try:
        before, whole = template.render(last, add_generation_prompt=False), template.render(last)
    except InputError:
        return ""
    return whole[len(before) :] if whole.startswith(before) else ""
