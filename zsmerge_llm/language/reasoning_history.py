"""What becomes of the reasoning of earlier answers in a chat template, and what the template writes before another."""

from __future__ import annotations

from collections.abc import Sequence

from zsmerge_llm.errors import InputError
from zsmerge_llm.language.chat_template import ChatTemplate, Tools
from zsmerge_llm.language.reasoning_tags import reasoning_tags
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
    spelled = f"{tags.open}\n{TEXT_MARKER}\n{tags.close}\n\n{answer['content']}"
    try:
        texts = [
            template.render([USER, {**answer, **reasoning}, *messages[n + 1 :]], tools)
            for reasoning in ({"reasoning_content": TEXT_MARKER}, {"content": spelled})
        ]
    except InputError:
        return False
    return not any(TEXT_MARKER in text for text in texts)


def answer_header(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """Return what begins the answer to messages that end with the user's; "" where the template does not show it."""
    last = [*(message for message in messages[:1] if message["role"] == "system"), messages[-1]]
    try:
        before, whole = template.render(last, add_generation_prompt=False), template.render(last)
    except InputError:
        return ""
    return whole[len(before) :] if whole.startswith(before) else ""
