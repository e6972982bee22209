"""What will be asked, as far as a prompt says: the tokens whose attention decides what a full cache keeps.

The question alone is a better probe than more of the prompt's end: most of what stands before it is document, and asks
for itself (benchmarks/LOG.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.types import Message

LONGEST = 64
"""Tokens of a question found at a prompt's end. Of a longer last line, only the end is taken."""
LABEL = 3
"""Words of a last line that only says where the answer goes."""
GENERIC = "What is said in the text above? Repeat its facts, names, numbers, dates and places word for word."
"""Stands for the questions nobody has asked yet, when a document is read ahead."""


def question_start(text: str) -> int:
    """Where a prompt begins to ask: at its last line that is not empty, or the one before a label such as "Answer:"."""
    said = text.rstrip()
    start = said.rfind("\n") + 1
    if said.endswith(":") and len(said[start:].split()) <= LABEL and said[:start].strip():
        start = said[:start].rstrip().rfind("\n") + 1
    return start


def question(text: str) -> str:
    """What a prompt asks."""
    return text[question_start(text) :].rstrip()


def completion_probe(template: ChatTemplate, ids: list[int], prompt: str) -> list[int]:
    """The question of a plain prompt, as it stands at the end of its `ids`."""
    return ids[-min(len(template.encode(question(prompt))), LONGEST) :]


def chat_probe(template: ChatTemplate, asked: str) -> list[int]:
    """A question with what the template writes after a user's message, up to the beginning of the answer."""
    return template.encode(asked) + _closing(template)


def is_multi_turn(messages: Sequence[Message]) -> bool:
    """Whether something was answered before: what was said then may be asked about again."""
    return any(message["role"] == "assistant" for message in messages)


def message_probe(template: ChatTemplate, message: str) -> list[int]:
    """`chat_probe` of the question that a message ends with."""
    return template.encode(question(message))[-LONGEST:] + _closing(template)


def _closing(template: ChatTemplate) -> list[int]:
    return template.encode(template.render([{"role": "user", "content": "\x1f"}]).rpartition("\x1f")[2])
