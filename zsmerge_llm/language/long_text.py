"""Tokenize long texts piece by piece: in bounded memory, and so that Ctrl-C is heard. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import ContextLimitError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TEXT = 2**26
"""Characters of a longest text. The ids of one take some 600 MB, and hours to read on a CPU."""
MAX_WHOLE = 2**24
"""Characters of a text, or of a rest, that cannot be cut. Tokenizing one takes some 2.5 GB."""
PIECE = 2**18
"""Characters of a piece: tokenized in some 0.3 s."""
WINDOW = 64
"""Characters on both sides of a cut that show whether the tokenizer splits there."""
SPACE_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")


class LongText:
    """Cuts texts where a tokenizer splits them anyway, so that the pieces have the ids of the whole.

    Nearly all tokenizers split a text into words before they make tokens. A cut before a space between two words is
    used if the tokenizer's normalizer and pre-tokenizer make the same words of the pieces as of the whole around it.
    Texts that cannot be cut stay whole.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def pieces(self, text: str) -> Iterator[str]:
        """Yield the pieces of a text in order.

        Raises:
            ContextLimitError: a text of more than `MAX_TEXT` characters, or one that cannot be cut of more than
                `MAX_WHOLE`.
        """
        _check_length(text, MAX_TEXT)
        start = 0
        while len(text) - start > 2 * PIECE and self._words is not None:
            cut = self._cut(text, start + PIECE, start + 2 * PIECE)
            if cut is None:
                break
            yield text[start:cut]
            start = cut
        rest = text[start:] if start else text
        _check_length(rest, MAX_WHOLE)
        yield rest

    def _cut(self, text: str, start: int, end: int) -> int | None:
        assert self._words is not None
        for found in SPACE_BETWEEN_WORDS.finditer(text, start, end):
            cut = found.start()
            left, right = text[cut - WINDOW : cut], text[cut : cut + WINDOW]
            if self._words(left + right) == self._words(left) + self._words(right):
                return cut
        return None

    @cached_property
    def _words(self) -> Callable[[str], list[str]] | None:
        """What makes words of a text; None where the tokenizer makes none, or a token may stand across a cut."""
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        splitter, normalizer = getattr(backend, "pre_tokenizer", None), getattr(backend, "normalizer", None)
        if splitter is None or any(map(_crosses_words, self._tokenizer.added_tokens_decoder.values())):
            return None

        def words(text: str) -> list[str]:
            normalized = text if normalizer is None else normalizer.normalize_str(text)
            return [word for word, _ in splitter.pre_tokenize_str(normalized)]

        return words


def _check_length(text: str, most: int) -> None:
    if len(text) > most:
        raise ContextLimitError(
            f"The text has {len(text):,} characters and at most {most:,} are read at once: divide it."
        )


def _crosses_words(token: Any) -> bool:
    """Return whether an added token may take in the space between two words."""
    text = token.content
    takes_next = token.rstrip and text[-1:].isalpha()
    takes_last = token.lstrip and text[:1].isalpha()
    return takes_next or takes_last or SPACE_BETWEEN_WORDS.search(text) is not None
