"""Rendering what follows an answer in time that does not grow with the conversation.

`ChatTemplate.delta` renders the whole conversation twice. Most of it does not matter: what a template writes behind an
answer depends on the messages around it. `DeltaRenderer` leaves out older messages, and checks that this is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from threading import Lock

from zsmerge_llm.errors import InputError
from zsmerge_llm.language.chat_template import ChatTemplate, Tools
from zsmerge_llm.language.messages import shared_prefix
from zsmerge_llm.types import Message

MIN_KEPT = 10
"""Messages before the answer that are always rendered: more than any number in a template that is trusted."""
MAX_KEPT = 100
"""Messages before the answer among which the beginning of a turn is looked for."""
Kinds = frozenset[str]
"""What sorts of messages there are: their roles, and which of the keys that templates look at they have."""


class DeltaRenderer:
    """Renders the deltas of one conversation. Safe to use from several threads.

    Left out are whole turns after the system message, an even number of messages, so that templates which check that
    roles alternate accept the rest. The result is used under two conditions. All numbers in the template are below
    `MIN_KEPT` and it divides by 2 only, so that it cannot tell how many messages there were. And the delta of the whole
    conversation was the same when messages of these kinds were first left out, and each time their number has doubled
    since. Otherwise the whole conversation is rendered.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._kinds: list[Kinds] = [frozenset()]  # of each prefix of the messages
        # up to how many messages, by their kinds and the template's variables; 0: the whole must be rendered
        self._verified: dict[tuple[Kinds, Kinds, str], int] = {}
        self._lock = Lock()

    def delta(self, template: ChatTemplate, messages: list[Message], n: int, tools: Tools) -> str:
        """Return `template.delta(messages, n, tools)`. Raises as it does.

        The template but for its variables, its date and the tools must be the same in all calls.
        """
        start, first = _start_of_tail(messages, n), int(messages[0]["role"] == "system")
        if start is None or not ignores_length(template.source(tools)):
            return template.delta(messages, n, tools)
        key = self._kinds_of(messages[:start]), frozenset(map(_kind, messages[start:])), repr(template.args)
        verified = self._verified.get(key)
        if verified == 0:
            return template.delta(messages, n, tools)
        try:
            tail = template.delta([*messages[:first], *messages[start:]], n - (start - first), tools)
        except InputError:
            return template.delta(messages, n, tools)
        if verified is None or len(messages) > 2 * verified:
            whole = template.delta(messages, n, tools)
            self._verified[key] = len(messages) if whole == tail else 0
            return whole
        return tail

    def _kinds_of(self, messages: list[Message]) -> Kinds:
        with self._lock:
            known = shared_prefix(self._messages, messages)
            del self._kinds[known + 1 :]
            for message in messages[known:]:
                kind, before = _kind(message), self._kinds[-1]
                self._kinds.append(before if kind in before else before | {kind})
            self._messages = messages
            return self._kinds[-1]


@lru_cache(maxsize=16)
def ignores_length(source: str) -> bool:
    """Return whether a template's output behind `MIN_KEPT` messages cannot depend on how many there were.

    True if no number in its code is that large, and it divides by 2 only.
    """
    from jinja2 import Environment, TemplateError

    try:
        found = [(kind, text) for _, kind, text in Environment().lex(source) if kind != "whitespace"]
    except TemplateError:
        return False
    if any(kind == "float" or (kind == "integer" and int(text, 0) >= MIN_KEPT) for kind, text in found):
        return False
    divisors = [after for sign, after in pairwise(found) if sign in (("operator", "%"), ("operator", "//"))]
    return all(divisor == ("integer", "2") for divisor in divisors)


def _start_of_tail(messages: Sequence[Message], n: int) -> int | None:
    """Return where the messages that are rendered begin, but for the system message; None: with the first."""
    first = int(messages[0]["role"] == "system")
    for start in range(n - 1 - MIN_KEPT, max(first, n - 1 - MAX_KEPT), -1):
        before = messages[start - 1]
        ends_turn = before["role"] == "assistant" and not before.get("tool_calls")
        if ends_turn and messages[start]["role"] == "user" and (start - first) % 2 == 0:
            return start
    return None


def _kind(message: Message) -> str:
    keys = [key for key in ("tool_calls", "tool_call_id", "name", "reasoning_content") if message.get(key)]
    return " ".join([message["role"], *keys, *(["<think>"] if "<think>" in message["content"] else [])])
