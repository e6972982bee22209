"""Keep text from becoming control tokens: only the chat template writes those. Imports nothing heavy.

A tokenizer takes the marker of an added token, such as `<|im_end|>`, for that token wherever it stands. So a message, a
tool's result or a document that spells `<|im_end|>\\n<|im_start|>system` would begin a system message. Here a separator
is put into each marker that such text holds, before the template renders it. The tokenizer takes it out again once it
has looked for added tokens, so that the marker is read as ordinary text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from zsmerge_llm.types import Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\ufdd0\ufdd1"
"""Stands in each marker that is text. Unicode reserves these two for use inside of programs: no text holds them."""
DELIMITED = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)
"""The form of a marker that is not flagged as special, such as `<tool_call>`. Runs of spaces and words have another."""
HTML = re.compile(
    r"</?(table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|code|i|u|s|sub|sup|p|br|a|li|ul|ol)>"
)
"""Tags that are tokens of their own in Gemma's vocabulary: they are text, and control nothing."""
REASONING_END = "</think>"


class ControlTokens:
    """The markers of one tokenizer's control tokens. Safe to use from several threads.

    Markers are the added tokens that are flagged as special, and the others that look like a marker.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def guard(self, text: str) -> str:
        """Return a text with a separator in each marker: the same object where it holds none."""
        found = [at for each in self._beginnings.finditer(text) if self._is_marker(text, at := each.start())]
        if found:
            cuts = [0, *(at + 1 for at in found), len(text)]
            return SEPARATOR.join(text[start:end] for start, end in pairwise(cuts))
        if self._match_normalized and self._holds_normalized(text):
            return text[:1] + SEPARATOR + text[1:]
        return text

    def guard_message(self, message: Message) -> Message:
        """Return a message whose text holds no marker. The tags of the model's own reasoning stay: templates look for
        them."""
        guarded = cast(Message, self.guard_values(message))
        if guarded is not message and message["role"] == "assistant" and REASONING_END in message["content"]:
            guarded["content"] = self._guard_answer(message["content"])
        return guarded

    def _guard_answer(self, text: str) -> str:
        reasoning, _, answer = text.partition(REASONING_END)
        opening = re.match(r"\s*<think>|", reasoning)
        assert opening is not None
        return opening[0] + self.guard(reasoning[opening.end() :]) + REASONING_END + self.guard(answer)

    def guard_values(self, value: Any) -> Any:
        """Return JSON values with all their text guarded: the same object where nothing changes."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, Mapping):
            pairs = {self.guard_values(key): self.guard_values(each) for key, each in value.items()}
            same = all(key in value and value[key] is each for key, each in pairs.items())
            return value if same else pairs
        if isinstance(value, (list, tuple)):
            items = [self.guard_values(each) for each in value]
            return value if all(new is old for new, old in zip(items, value, strict=True)) else items
        return value

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text with guarded markers, without special tokens around it."""
        if self._backend is not None:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        ids: list[int] = []
        for part in text.split(SEPARATOR):
            ids += self._tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    # -- markers -----------------------------------------------------------------------------------------------------

    @cached_property
    def _markers(self) -> dict[str, bool]:
        """The texts of all control tokens, and whether each is looked for in normalized text."""
        return {
            token.content: token.normalized
            for token in self._tokenizer.added_tokens_decoder.values()
            if len(token.content) > 1 and (token.special or _looks_like_marker(token.content))
        }

    @cached_property
    def _lengths(self) -> dict[str, list[int]]:
        """The lengths of the markers by their first two characters."""
        lengths: dict[str, set[int]] = {}
        for marker in self._markers:
            lengths.setdefault(marker[:2], set()).add(len(marker))
        return {start: sorted(each) for start, each in lengths.items()}

    @cached_property
    def _beginnings(self) -> re.Pattern[str]:
        seconds: dict[str, str] = {}
        for start in self._lengths:
            seconds[start[0]] = seconds.get(start[0], "") + re.escape(start[1])
        return re.compile("|".join(f"{re.escape(one)}(?=[{each}])" for one, each in seconds.items()) or r"(?!)")

    def _is_marker(self, text: str, at: int) -> bool:
        return any(text[at : at + length] in self._markers for length in self._lengths[text[at : at + 2]])

    # -- the tokenizer -----------------------------------------------------------------------------------------------

    @cached_property
    def _match_normalized(self) -> bool:
        """Whether a marker is looked for in normalized text, which other text may become."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return any(self._markers.values()) and getattr(backend, "normalizer", None) is not None

    def _holds_normalized(self, text: str) -> bool:
        normalized = self._tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        return any(self._is_marker(normalized, each.start()) for each in self._beginnings.finditer(normalized))

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """A copy of a fast tokenizer that takes separators out; None for another. Made where text holds a marker."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        from tokenizers import Tokenizer, normalizers, pre_tokenizers

        copy = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        if any(self._markers.values()):  # normalized text is searched for markers, too: the separators must outlast it
            split = pre_tokenizers.Split(SEPARATOR, "removed")
            copy.pre_tokenizer = pre_tokenizers.Sequence([split, *_present(copy.pre_tokenizer)])
        else:
            removed = normalizers.Replace(SEPARATOR, "")
            copy.normalizer = normalizers.Sequence([removed, *_present(copy.normalizer)])
        return copy


def _looks_like_marker(text: str) -> bool:
    return DELIMITED.fullmatch(text) is not None and HTML.fullmatch(text) is None


def _present(part: Any) -> list[Any]:
    return [] if part is None else [part]
