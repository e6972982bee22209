"""Texts as passages and as search terms. Words only: nothing here knows a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator

PASSAGE_WORDS = 80
"""Words after which a passage ends with the next sentence."""
MIN_WORDS = 12
"""Words that a paragraph has to have to be a passage of its own."""
STEM_LETTERS = 5
"""Letters of a word that tell it from others: "compresses" and "compressed" are the same to the search."""
TERM = "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\\w+"
"""What is searched for: words, and single characters of scripts that write no spaces."""
SENTENCE_END = "[.!?][\"')\u201d]*\\s+|[\u3002\uff01\uff1f]\\s*|\\n(?![a-z])\\s*"
"""Where a sentence, line or, with two line ends, a paragraph ends. A line that goes on in small letters does not."""
QUESTION_WORDS = frozenset(
    re.findall(
        TERM,
        "above according along another answer aside besides called can could describe different document else example "
        "explain give kind know many may mean means meant mention might much name named names passage please query "
        "question refer referred referring say sort tell term terms text type use used usual usually want way would",
    )
)
"""Words that ask, beside the stop words of a language: they do not tell what a question is about."""


def split(text: str, size: int = PASSAGE_WORDS) -> list[str]:
    """Split a text into passages: paragraphs, and parts of those of more than `size` words.

    A part ends with a sentence or a line. A heading belongs to what follows it, a short end to what stands before it.
    """
    starts = [0]
    for end, ends_paragraph in _ends(text, size):
        if count_words(text[starts[-1] : end]) >= (MIN_WORDS if ends_paragraph else size):
            starts.append(end)
    if len(starts) > 1 and count_words(text[starts[-1] :]) < size // 2:
        starts.pop()
    passages = [text[start:end].strip() for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    return [passage for passage in passages if count_words(passage)]


def _ends(text: str, size: int) -> Iterator[tuple[int, bool]]:
    """Yield where sentences and lines end, and whether a paragraph does. A very long sentence is cut between words."""
    start = 0
    for found in re.finditer(SENTENCE_END, text + "\n\n"):
        words = [start + each.end() for each in re.finditer(TERM, text[start : found.end()])]
        yield from ((end, False) for end in words[size - 1 : -size : size])
        yield found.end(), found[0].count("\n") > 1
        start = found.end()


def count_words(text: str) -> int:
    """Return the number of words, as the search takes them."""
    return len(re.findall(TERM, text))


def terms(text: str) -> list[str]:
    """Return the terms that a text is found by, in order, with repetitions."""
    return [word[:STEM_LETTERS] for word in re.findall(TERM, text.lower())]


def query_terms(question: str) -> list[str]:
    """Return the terms of a question, without the stop words of its language and words that only ask."""
    from bm25s import stopwords

    languages = [getattr(stopwords, name) for name in dir(stopwords) if name.startswith("STOPWORDS_")]
    words = re.findall(TERM, question.lower())
    common = max(languages, key=lambda language: sum(word in language for word in words))
    return [word[:STEM_LETTERS] for word in words if word not in common and word not in QUESTION_WORDS]
