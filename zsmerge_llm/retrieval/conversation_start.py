"""How a conversation began, for a question about that: "What was the first thing I asked you?" English only.

No passage says that it is the first one, so no search finds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from zsmerge_llm.retrieval.passages import SENTENCE_END, pieces
from zsmerge_llm.types import Message

SAID = r"(?:ask(?:ed)?|say|said|tell|told|wr(?:ite|ote)|mention(?:ed)?|talk(?:ed)? about|discuss(?:ed)?|want(?:ed)?)"
ASKS = re.compile(
    r"\bfirst\s+(?:\w+\s+)?(?:question|message|request|thing|topic|sentence)\b"
    rf".{{0,80}}\b(?:(?:I|we)\s+(?:\w+\s+)?{SAID}|conversation|chat)\b"
    rf"|\b(?:my|our)\s+(?:very\s+)?first\s+(?:question|message|request|topic)\b"
    rf"|\bdid\s+(?:I|we)\s+(?:first\s+{SAID}|{SAID}\s+(?:you\s+)?(?:about\s+)?first)\b"
    r"|\bhow\s+did\s+(?:this|our|the)\s+(?:conversation|chat|discussion)\s+(?:start|begin)\b"
    r"|\bwhat\s+did\s+(?:this|our|the)\s+(?:conversation|chat|discussion)\s+(?:start|begin)\s+with\b",
    re.IGNORECASE,
)
INTRODUCTION = "This conversation began with this message:"


def asks_for_start(question: str) -> bool:
    """Return whether a question is about the beginning of its conversation."""
    return bool(ASKS.search(question))


def start_block(question: str, messages: Sequence[Message], count: Callable[[str], int], max_tokens: int) -> str:
    """Return a conversation's first user's message where a question asks for it, in `max_tokens`; else "".

    Of a longer one the sentences that it begins with stand for it. count: the tokens of a text.
    """
    first = next((each["content"] for each in messages if each["role"] == "user"), "")
    if not first or not asks_for_start(question):
        return ""
    kept, left = "", max_tokens - count(f"{INTRODUCTION}\n\n\n\n")
    for piece in pieces(first, SENTENCE_END):
        if count(kept + piece) > left:
            break
        kept += piece
    return f"{INTRODUCTION}\n\n{kept.strip()}\n\n" if kept.strip() else ""
