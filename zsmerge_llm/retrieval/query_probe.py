"""Query probes: the tokens whose attention decides what a full cache keeps, as far as a prompt says what it asks.

The question alone is a better probe than more of the prompt's end. Most of what stands before it is document, and asks
for itself (docs/research/eviction).
"""

from __future__ import annotations

from collections.abc import Sequence

from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.questions import asked_at, find_question
from zsmerge_llm.types import Message

MAX_QUESTION_TOKENS = 64
"""Tokens of a question found at a prompt's end; of a longer last line, the end is taken (docs/research/eviction)."""
PLACEHOLDER = "\x02"
"""Stands for a question, to see what a template writes around it. Templates strip spaces, and this is none."""
GENERIC_QUESTION = "What is said in the text above? Repeat its facts, names, numbers, dates and places word for word."
"""Stands for the questions that are not known yet when a document is read ahead (docs/research/eviction)."""


def completion_probe(template: ChatTemplate, ids: list[int], prompt: str) -> list[int]:
    """Return the question of a plain prompt, as it stands at the end of its `ids`."""
    return ids[-min(len(template.encode(find_question(prompt))), MAX_QUESTION_TOKENS) :]


def chat_probe(template: ChatTemplate, question: str) -> list[int]:
    """Return the ids of a question and of what the template writes after it, up to the beginning of the answer."""
    return template.encode_text(question) + _closing(template)


def message_probe(template: ChatTemplate, message: str) -> list[int]:
    """Return `chat_probe` of the question that a message ends with."""
    return template.encode_text(find_question(message))[-MAX_QUESTION_TOKENS:] + _closing(template)


def conversation_probe(template: ChatTemplate, messages: Sequence[Message]) -> list[int]:
    """Return `message_probe` of the message that is answered: results of tools ask for what their request asks for."""
    return message_probe(template, messages[asked_at(messages)]["content"])


def is_multi_turn(messages: Sequence[Message]) -> bool:
    """Return whether a conversation has an answer already: what was said then may be asked about again."""
    return any(message["role"] == "assistant" for message in messages)


def _closing(template: ChatTemplate) -> list[int]:
    return template.encode(template.render([{"role": "user", "content": PLACEHOLDER}]).rpartition(PLACEHOLDER)[2])
