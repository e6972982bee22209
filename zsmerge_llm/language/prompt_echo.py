"""Keep what zsmerge-llm itself adds to prompts out of answers.

Instructions behind tool results, tags around these, and introductions of documents and of repeated passages, stand in
the prompt beside the text of callers. Small models repeat them as their answer. An answer that begins so is discarded
and generated again with another first word (`OutputFormat.without_echo`). One that goes on so ends before it.

Text is compared by its words: spaces, punctuation and case do not count. A text that callers wrote themselves is never
taken for an echo.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from zsmerge_llm.types import Message

ECHO_WORDS = 6
"""Successive words of an added text, from its beginning, that are its echo; all of a shorter text."""
CUT_WORDS = 4
"""The same at the end of an answer, where no more follow."""
BEFORE_ECHO = " \t\n\"'`*#>([<-"
"""What may open an echo, and is dropped with it."""


@dataclass(frozen=True, eq=False)
class AddedTexts:
    """The texts that were added to one prompt.

    Attributes:
        texts: each line of them may be echoed.
        tags: markup around what callers wrote. One alone is an echo.
        messages, document: what callers wrote. Their words may be repeated.
    """

    texts: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    messages: Sequence[Message] = ()
    document: str = ""

    def plus(self, *texts: str, document: str = "") -> AddedTexts:
        """Return these texts and others, in a prompt about a document."""
        return replace(self, texts=(*self.texts, *texts), document=document or self.document)

    def beginnings(self) -> list[list[str]]:
        """Return the first words of each line, and the words of tags, lower case."""
        lines = [_words(line) for text in self.texts for line in text.splitlines()]
        return [words[:ECHO_WORDS] for words in lines if len(words) >= CUT_WORDS] + [*map(_words, self.tags)]

    def is_quotation(self, words: Sequence[str]) -> bool:
        """Return whether callers wrote these words, too."""
        pattern = re.compile(r"\W+".join(map(re.escape, words)), re.IGNORECASE)
        texts = (str(message["content"]) for message in reversed(self.messages))
        return any(pattern.search(text) for text in (*texts, self.document))


NOTHING_ADDED = AddedTexts()
"""Of prompts that hold the text of callers alone."""


class EchoFilter:
    """Pass on the text of an answer as it arrives, up to an echo.

    Held back are words with which an added text begins, until the next ones tell, with the spaces before them, and what
    comes before the first word.

    Attributes:
        echoed: the first word of the text that was echoed; "" while none is. What follows an echo is dropped.
    """

    def __init__(self, added: AddedTexts) -> None:
        self.echoed = ""
        self._added = added
        self._beginnings = added.beginnings()
        self._held = ""
        self._has_words = False

    def push(self, piece: str) -> str:
        """Add a piece of the answer; return the text that is certainly no echo."""
        return self._pass_on(piece, ended=False)

    def finish(self) -> str:
        """Return what was held back and is no echo, at the end of the answer."""
        return self._pass_on("", ended=True)

    def _pass_on(self, piece: str, ended: bool) -> str:
        if self.echoed:
            return ""
        text, found = self._held + piece, self._find(self._held + piece, ended)
        end = len(text) if found is None else found
        if self.echoed or not ended:
            end = len(text[:end].rstrip(BEFORE_ECHO))
        has_words = self._has_words or bool(_words(text[:end]))
        if not has_words and not (ended and not self.echoed):
            end = 0
        self._held, self._has_words = text[end:], has_words
        return text[:end]

    def _find(self, text: str, ended: bool) -> int | None:
        """Return where an echo begins, or words that may become one; None where there are neither."""
        firsts = {beginning[0][0] for beginning in self._beginnings}
        for word in re.finditer(r"\w+", text) if firsts else ():
            if word.group()[0].lower() in firsts and self._compare(text[word.start() :], ended):
                return word.start()
        return None

    def _compare(self, text: str, ended: bool) -> bool:
        """Return whether a text begins with an echo (then `echoed` is set), or may still do."""
        said = " ".join(_words(text)) + " " * (ended or not re.match(r"\w", text[-1]))
        undecided = False
        for beginning in list(self._beginnings):
            wanted = beginning[: CUT_WORDS if ended else ECHO_WORDS]
            echo = " ".join(wanted) + " "
            if said.startswith(echo):
                if not self._added.is_quotation(wanted):
                    self.echoed = wanted[0]
                    return True
                self._beginnings.remove(beginning)
            elif echo.startswith(said) and not ended:
                undecided = True
        return undecided


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
