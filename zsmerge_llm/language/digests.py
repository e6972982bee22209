"""Digests of message lists: what a conversation is recognised by. One for each prefix, as a hash chain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from zsmerge_llm.language.messages import shared_prefix
from zsmerge_llm.language.reasoning_tags import without_reasoning
from zsmerge_llm.types import Message

OWN_KEYS = frozenset({"header_args", "note"})
"""Keys of a request's last message that no template sees: text at its end, and variables for the answer's header."""


@dataclass(frozen=True, eq=False)
class DigestChain:
    """One digest for each prefix of a message list. Equal digests mean the same conversation.

    Not part of it: message `id`, `name`, `reasoning_content` and ids of tool calls (a result counts as the answer to
    the k-th call); key order and spacing of JSON; and in the assistant's messages leading reasoning in tags and outer
    whitespace, which templates and frameworks drop.

    A message's `OWN_KEYS` belong to the request that ends with it: they count in that prefix's digest, and not in those
    of longer ones, whose messages come without them.

    Attributes:
        messages: the messages, in normal form.
        states: entry i is the state of the chain after `messages[:i]`; entry 0 stands for the context.
        digests: entry i is the digest of `messages[:i]`. lengths: the same by digest.
        call_numbers: number of each tool call by its id. num_calls: how many calls there are.
    """

    messages: list[Message]
    states: list[str]
    digests: list[str]
    lengths: dict[str, int]
    call_numbers: dict[str, int] = field(default_factory=dict)
    num_calls: int = 0

    @classmethod
    def start(cls, context: Any) -> DigestChain:
        """Return the chain of no messages. `context`: JSON that belongs to every prefix, such as tools."""
        state = _digest("", context)
        return cls([], [state], [state], {state: 0})

    def of(self, messages: Sequence[Message]) -> DigestChain:
        """Return the chain of other messages in the same context. Only those that differ are hashed."""
        messages = list(messages)
        known = shared_prefix(self.messages, messages, self.num_calls > 0)
        numbers, count = dict(self.call_numbers), self.num_calls
        if count and known < len(self.messages):  # the numbers as they were there
            numbers, count = {}, 0
            for message in messages[:known]:
                count = _number_calls(message, numbers, count)
        states, digests, lengths = self.states[: known + 1], self.digests[: known + 1], dict(self.lengths)
        for digest in self.digests[known + 1 :]:
            lengths.pop(digest, None)
        for message in messages[known:]:
            count = _number_calls(message, numbers, count)
            state = _digest(states[-1], _canonical(message, numbers))
            states.append(state)
            own = {key: message[key] for key in message.keys() & OWN_KEYS}
            digests.append(_digest(state, own) if own else state)
            lengths[digests[-1]] = len(digests) - 1
        return DigestChain(messages, states, digests, lengths, numbers, count)


def _digest(before: str, item: Any) -> str:
    return hashlib.sha256((before + json.dumps(item, sort_keys=True, default=str)).encode()).hexdigest()


def _number_calls(message: Message, numbers: dict[str, int], count: int) -> int:
    """Number a message's calls in `numbers`, from `count` on; return the next number."""
    for call in message.get("tool_calls", ()):
        numbers[call["id"]], count = count, count + 1
    return count


def _canonical(message: Message, numbers: dict[str, int]) -> list[Any]:
    content = message["content"]
    if message["role"] == "assistant":
        content = without_reasoning(content)
    calls = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())]
    return [message["role"], content, calls, numbers.get(message.get("tool_call_id", ""))]
