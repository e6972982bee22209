"""Texts as passages. Words only: nothing here knows a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple

from zsmerge_llm.retrieval.terms import TERM, count_words, terms

PASSAGE_WORDS = 80
"""Words after which a passage ends with the next sentence."""
SAID_SHARE = 0.5
"""Share of what the best sentence of a passage says, by weight, that another one of its excerpt has to say."""
MAX_SIZES = 1.5
"""Words of a passage that is to end before a less indented line, relative to its size."""
MIN_WORDS = 12
"""Words that a paragraph has to have to be a passage of its own."""
SENTENCE_MARKS = ".!?\u0589\u061f\u06d4\u0964\u0965\u104b\u1362\u17d4"
"""Marks that end a sentence: those of Latin and Greek, Armenian, Arabic, Urdu, Hindi, Burmese, Amharic and Khmer."""
SENTENCE_END = f"[{SENTENCE_MARKS}][\"')\u201d]*\\s+|[\u3002\uff01\uff1f]\\s*|\\n(?![a-z])\\s*"
"""Where a sentence, line or, with two line ends, a paragraph ends. A line that goes on in small letters does not."""
LINE_END = f"{SENTENCE_END}|\\n\\s*"
"""Where a sentence or a line ends, however the next one begins: a list may have words in small letters alone."""
SPACES = re.compile(r"\s*")
DATE = (
    r"\b(?:\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{2,4}"
    r"|\d{1,2}(?:st|nd|rd|th)?\.?\s+(?:de\s+)?[^\W\d_]{3,}\.?,?\s+(?:de\s+)?\d{4}"
    r"|[^\W\d_]{3,}\.?\s+\d{1,2}(?:st|nd|rd|th)?,?\s+\d{4})\b|\d{4}年\d{1,2}月\d{1,2}日"
)
"""A day of a calendar: "2023-05-08", "8 May, 2023", "May 8th, 2023", "8.5.2023"."""
MAX_DATE_LINE_WORDS = 6
"""Words that a line says beside a date, to say when what follows was said or happened."""
MAX_HEADING_LETTERS = 120
"""Characters of a heading."""
LIST_ITEM = re.compile(r"(?:[-*+\u2022]|\d+[.)])\s")
"""How an item of a list begins: a date in it is not that of what follows."""
SESSION = re.compile(r"\W*(?:date|session|conversation|chat|meeting|day)\b", re.IGNORECASE)
"""How a line begins that opens a part of a dialogue, also without an empty line before it."""


@dataclass(frozen=True)
class Passage:
    """A piece of a text.

    context: the last line with a date and the last Markdown heading before it; "" for those that it begins with.
    """

    text: str
    context: str = ""


class Span(NamedTuple):
    """Where a passage stands in its text, and its context, as for `Passage`."""

    start: int
    end: int
    context: str


def split(text: str, size: int = PASSAGE_WORDS) -> list[str]:
    """Split a text into passages: paragraphs, and parts of those of more than `size` words.

    A part ends with a sentence or a line. A heading belongs to what follows it, a short end to what stands before it.
    """
    return [text[span.start : span.end] for span in split_spans(text, size)]


def split_spans(text: str, size: int = PASSAGE_WORDS, date: str = "") -> list[Span]:
    """Return where the passages stand into which `split` splits a text, and the headings that they stand under.

    Args:
        date: the line with a date that the text stands under.
    """
    starts = _starts(text, size)
    found, headings, shown = list[Span](), list(_headings(text)), (date, "")
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        passage = text[start:end].strip()
        if not count_words(passage):
            continue
        first = text.index(passage, start)
        while headings and headings[0][0] < first:
            shown = _under(shown, *headings.pop(0)[1:])
        own = _under(shown, *headings[0][1:]) if headings and headings[0][0] == first else shown
        context = "\n".join(line for line in own if line and not passage.startswith(line))
        found.append(Span(first, first + len(passage), context))
    return found


def opening_date(text: str) -> str:
    """Return the first line of a text, if it says when what follows was said; else ""."""
    beginning = text[: 3 * MAX_HEADING_LETTERS]  # a line is looked at beside the next one
    return next((line for at, line, is_date in _headings(beginning) if is_date and not at), "")


def _headings(text: str) -> Iterator[tuple[int, str, bool]]:
    """Yield where each heading begins, its line, and whether it is a date rather than a heading of Markdown."""
    at, ends_paragraph, lines = 0, True, text.splitlines(keepends=True)
    for whole, next_line in zip_longest(lines, lines[1:], fillvalue=""):
        line = whole.strip()
        start, at = at + whole.find(line), at + len(whole)
        if len(line) <= MAX_HEADING_LETTERS:
            if re.match("#{1,6}\\s", line):
                yield start, line, False
            elif (ends_paragraph or SESSION.match(line)) and _is_date_line(line, next_line.strip()):
                yield start, line, True
        ends_paragraph = not line


def _is_date_line(line: str, next_line: str) -> bool:
    """Return whether a line says when what follows was said. One of a log, where each has its date, does not."""
    found = re.search(DATE, line)
    if found is None or LIST_ITEM.match(line) or line.endswith((".", "!", "?")):
        return False
    if re.compile(DATE).match(next_line, found.start()):
        return False
    return count_words(re.sub(DATE, " ", line)) <= MAX_DATE_LINE_WORDS


def _under(shown: tuple[str, str], line: str, is_date: bool) -> tuple[str, str]:
    """Return the date line and the heading that a text stands under after one more of them."""
    return (line, "") if is_date else (shown[0], line)


def _starts(text: str, size: int) -> list[int]:
    """Return where passages begin.

    One ends with a paragraph, or before the least indented line behind `size` words: so records stay whole.
    """
    starts, words, ends = [0], 0, list[tuple[int, int, int]]()  # of an end: indentation, place, words up to it
    line = before_end = 0  # where the line of an end begins: looked for behind the end before, for lines may be long
    for end, ends_paragraph, more in _ends(text, size):
        line, before_end = max(line, text.rfind("\n", before_end, end) + 1), end
        words += more
        if ends_paragraph and words >= MIN_WORDS:
            ends = [(0, end, words)]
        elif words >= size:
            ends.append((_indentation(text, line, end), end, words))
        if ends and (min(ends)[0] == 0 or words >= MAX_SIZES * size):
            _, end, before = min(ends)
            starts.append(end)
            words -= before
            ends.clear()
    if len(starts) > 1 and words < size // 2:
        starts.pop()
    return starts


def _indentation(text: str, line: int, end: int) -> int:
    """Return how many spaces a line begins with, up to a place in it. line: where it begins."""
    found = SPACES.match(text, line, end)
    return found.end() - line if found else 0


def _ends(text: str, size: int) -> Iterator[tuple[int, bool, int]]:
    """Yield where sentences and lines end, whether a paragraph does, and the words since the last end.

    A very long sentence is cut between words.
    """
    start = 0
    for found in re.finditer(SENTENCE_END, text + "\n\n"):
        words = count_words(text[start : found.end()])
        if words > size:
            ends = [start + each.end() for each in re.finditer(TERM, text[start : found.end()])]
            ends = ends[size - 1 : -size : size]
            yield from ((end, False, size) for end in ends)
            words -= size * len(ends)
        yield found.end(), found[0].count("\n") > 1, words
        start = found.end()


def excerpt(text: str, weights: Mapping[str, float], neighbours: int = 1, end: str = SENTENCE_END) -> str:
    """Return the sentences of a passage that say most of what is asked for, each with its neighbours on both sides.

    A gap is shown as "...". A text that says nothing of it stays whole.

    weights: of the terms that are asked for. end: a regular expression for the end of a sentence.
    """
    sentences = pieces(text, end)
    said = [weight_of(each, weights) for each in sentences]
    chosen = [number for number, weight in enumerate(said) if weight and weight >= SAID_SHARE * max(said)]
    near = {number for at in chosen for number in range(at - neighbours, at + neighbours + 1)}
    near &= set(range(len(sentences)))
    if not near:
        return text
    shown = (("" if at - 1 in near or at == min(near) else "... ") + sentences[at] for at in sorted(near))
    return "".join(shown).strip()


def weight_of(text: str, weights: Mapping[str, float]) -> float:
    """Return the sum of the weights of the terms that a text has."""
    return sum(weights[term] for term in weights.keys() & terms(text))


def pieces(text: str, end: str) -> list[str]:
    """Return the pieces of a text, each with the mark that ends it. end: a regular expression for that."""
    ends = [found.end() for found in re.finditer(end, text)]
    return [text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)], strict=True)]
