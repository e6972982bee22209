"""Token ids to text as they arrive (`Detokenizer`), and the end of a text at a stop string (`StopStrings`).

Why not `tokenizers.decoders.DecodeStream` (measured with tokenizers 0.23 on 2,000 random sequences for each kind of
tokenizer): it cannot be flushed, so bytes at the end that are no whole character are lost (34 % of the byte-level
sequences); bytes that are not UTF-8 raise "Invalid prefix encountered" (71 % with byte fallback) or pile up (580 µs per
token at 4,000 of them, 6 µs here); it needs a fast tokenizer. On text it takes 0.5-1.3 µs per token, this module 5.5.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers decode bytes to that are not (yet) a character."""
WINDOW_TOKENS = 16
"""Tokens that are decoded together. More than that without a complete last character are not text: they are cut."""
CHARACTER_TOKENS = 4
"""A UTF-8 character has at most four bytes, so it has at most four tokens."""


class Detokenizer:
    """Decode token ids to text as they arrive; the pieces add up to `tokenizer.decode` of all of them.

    A character is held back until all of its bytes are there. Each step decodes a few tokens only.

    Exact for every token sequence of byte-level tokenizers. Where bytes are tokens of their own (sentencepiece's byte
    fallback) exact for text; bytes that are not UTF-8 may give another number of U+FFFD than one decoding of all.

    Args:
        tokenizer: a transformers tokenizer, fast or slow.
        skip_special_tokens: leave the tokenizer's special tokens out of the text.
        visible_special_ids: special tokens that belong to the text all the same, such as a tool call's marker.
        context: ids before the first token, not part of the text. A completion passes the end of its prompt:
            sentencepiece drops the space before the first word of a text, which a continuation does not begin with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
        visible_special_ids: Collection[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden = special_ids(tokenizer) - frozenset(visible_special_ids) if skip_special_tokens else frozenset()
        self._window = [token for token in context if token not in self._hidden][-WINDOW_TOKENS:]
        self._complete = len(self._window)  # tokens of the window whose text is complete
        self._emitted = len(self._decode())  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Return the text that is complete after `token`; often ""."""
        if token in self._hidden:
            return ""
        self._window.append(token)
        text = self._decode()
        incomplete = len(text) - len(text.rstrip(REPLACEMENT))
        if incomplete and self._num_pending > WINDOW_TOKENS:
            incomplete = 1  # too many bytes for one character: all but the last are broken for good
        new = text[self._emitted : len(text) - incomplete]
        self._emitted = max(self._emitted, len(text) - incomplete)
        self._slide(incomplete, bool(new))
        return new

    def finish(self) -> str:
        """Return the text that was held back, with U+FFFD for bytes that became no character."""
        text = self._decode()[self._emitted :]
        self._window, self._complete, self._emitted = [], 0, 0
        return text

    def _decode(self) -> str:
        return cast(str, self._tokenizer.decode(self._window, clean_up_tokenization_spaces=False))

    @property
    def _num_pending(self) -> int:
        return len(self._window) - self._complete

    def _slide(self, incomplete: int, emitted: bool) -> None:
        """Drop tokens that later ones do not depend on; keep those of the last piece, whose spaces they depend on."""
        if not incomplete:
            self._window = self._window[self._complete if emitted else -WINDOW_TOKENS :]
            self._complete = len(self._window)
        elif self._num_pending > WINDOW_TOKENS:
            self._window, self._complete = self._window[-CHARACTER_TOKENS:], 0
        else:
            return
        self._emitted = len(self._decode()) - incomplete


class StopStrings:
    """Pass a text on up to its first stop string, and hold back what may become one.

    The text ends before the stop string that is completed first, or the longest of several that end together.
    `stopped` is true and `found` is that string from then on, and no more text is returned.

    Args:
        stop: non-empty strings; none of them is part of the text.
    """

    def __init__(self, stop: tuple[str, ...] = ()) -> None:
        self.stopped = False
        self.found = ""
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> str:
        """Return what is certain to come before any stop string."""
        if self.stopped:
            return ""
        text = self._held + text
        ends = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self.stopped, self._held = True, ""
            return text[:start]
        safe = len(text) - _partial_match(text, self._stop)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """Return the text that was held back and became no stop string."""
        text, self._held = self._held, ""
        return text


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that `decode(skip_special_tokens=True)` leaves out."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _partial_match(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest end of `text` that begins one of `stop`."""
    longest = min(len(text), max(map(len, stop), default=1) - 1)
    for length in range(longest, 0, -1):
        if any(each.startswith(text[-length:]) for each in stop):
            return length
    return 0
