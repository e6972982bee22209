"""OpenAI's Harmony format (gpt-oss): an answer is one message or several, each in a channel.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`: the analysis is reasoning,
the final channel is the answer. A call is a message of the channel `commentary` to a function: its text is the
arguments.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from zsmerge_llm.language.grammar import json_rule
from zsmerge_llm.language.reasoning import AnswerPiece, held_back
from zsmerge_llm.language.reasoning_tags import added_token_id
from zsmerge_llm.language.tool_calls import END_MARKER, HERMES
from zsmerge_llm.language.tool_grammar import ToolGrammar

MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
STARTS = ("<|channel|>", "<|start|>", " to=")


class HarmonyParser:
    """Split an answer, as it arrives, into reasoning and text. Calls become text in the Hermes style.

    It takes the place of a `ReasoningParser`.
    """

    def __init__(self) -> None:
        self._held = ""
        self._body: Literal["reasoning", "text", "call"] | None = None  # None: in a header
        self._messages = 0
        self._opening = ""  # of a call, still to be returned

    @property
    def is_inside(self) -> bool:
        """Whether a message of reasoning has begun and not ended."""
        return self._body == "reasoning"

    @property
    def is_before_text(self) -> bool:
        """Whether all of the answer so far is whole messages of reasoning, or the beginning of one."""
        return self.is_inside or (self._messages == 1 and self._body is None and not self._held)

    def push(self, piece: str) -> AnswerPiece:
        """Add a piece of the answer; return what of it is certain."""
        self._held += piece
        reasoning = text = ""
        while True:
            if self._body is None and not self._enter():
                return AnswerPiece(reasoning, text)
            text, self._opening = text + self._opening, ""
            said, ended = self._take()
            if self._body == "reasoning":
                reasoning += said
            else:
                text += said + ("}\n" + END_MARKER if ended and self._body == "call" else "")
            if not ended:
                return AnswerPiece(reasoning, text)
            self._body = None

    def finish(self) -> AnswerPiece:
        """Return what was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self._body == "reasoning":
            return AnswerPiece(held, "")
        if self._body == "call":
            return AnswerPiece("", held + "}\n" + END_MARKER)
        return AnswerPiece("", held if self._body == "text" else "")

    def _enter(self) -> bool:
        """Go over to the text of a message, if its header is complete."""
        header, found, rest = self._held.partition(MESSAGE)
        if found:
            self._held, self._body = rest, self._kind(header)
            self._messages += 1
            return True
        if (
            self._messages == 0
            and self._held
            and not any(start.startswith(self._held) or self._held.startswith(start) for start in STARTS)
        ):
            self._body = "text"  # without any channel
            return True
        return False

    def _kind(self, header: str) -> Literal["reasoning", "text", "call"]:
        recipient = re.search(r"to=(?:functions\.)?([^\s<]+)", header)
        if recipient is not None:
            self._opening = f'{HERMES.marker}\n{{"name": {json.dumps(recipient[1])}, "arguments": '
            return "call"
        return "reasoning" if "<|channel|>analysis" in header else "text"

    def _take(self) -> tuple[str, bool]:
        """Return what is certain of a message's text, and whether that was all."""
        found = [(at, end) for end in ENDS if (at := self._held.find(end)) >= 0]
        if not found:
            size = len(self._held) - max(held_back(self._held, end) for end in ENDS)
            said, self._held = self._held[:size], self._held[size:]
            return said, False
        at, end = min(found)
        said, self._held = self._held[:at], self._held[at + len(end) :]
        return said, True


class HarmonyGrammar(ToolGrammar):
    """Build grammars for what follows the reasoning, from the header on: a call, or the final channel."""

    def calls(self) -> str:
        """Return the grammar of one call, and nothing else."""
        return f"start: call\n{self._call_rules()}"

    def calls_or_rule(self, answer: str) -> str:
        """Return the grammar of a call, or of an answer by another rule."""
        return f"start: call | {self._final()} answer\nanswer: {answer}\n{self._call_rules()}"

    def calls_or_text(self, plain: bool) -> str:
        """Return the grammar of a call or of text. `plain` changes nothing: the header tells them apart."""
        return f"start: call | {self._final()} TEXT\nTEXT: /(?s:.+)/\n{self._call_rules()}"

    def _final(self) -> str:
        return f'{self._token("<|channel|>")} "final" {self._token(MESSAGE)}'

    def _call_rules(self) -> str:
        channel, message, constrain = map(self._token, ("<|channel|>", MESSAGE, "<|constrain|>"))
        lines = ["call: " + " | ".join(f"call_{at}" for at in range(len(self._names)))]
        for at, (name, schema) in enumerate(zip(self._names, self._schemas, strict=True)):
            to = json.dumps(f" to=functions.{name}", ensure_ascii=False)
            heads = f'{to} {channel} "commentary json" | {channel} "commentary" {to} " " {constrain}? "json"'
            lines.append(f"call_{at}: ({heads}) {message} args_{at}")
            lines.append(f"args_{at}: {json_rule(schema, lenient=True)}")
        return "\n".join([*lines, ""])

    def _token(self, text: str) -> str:
        """Return a control token as a term; its spelling where it is no token."""
        token = added_token_id(self._tokenizer, text)
        return json.dumps(text) if token is None else f"<[{token}]>"
