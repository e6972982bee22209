"""Counts of words, for questions that ask how often words are in a text.

Neither a passage nor a small cache can tell that, and models count badly. The whole text is at hand, so it is counted.

Such questions are recognized by their words. English only: elsewhere nothing is recognized.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

INTRODUCTION = "Counted in the whole text:"
DEFAULT_MOST = 10
"""Most frequent words that are named where a question does not say how many it asks for."""
MAX_MOST = 50
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
MOST_FREQUENT = re.compile(
    r"""
    \bmost[ ](?:common|frequent|often|repeated|used)(?:ly)?(?:[ ]\w+)?[ ]words?\b
    | \bwords?\b.*\bmost[ ](?:often|common|frequent|frequently)\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""A question for the most frequent words."""
HOW_OFTEN = re.compile(
    r"""
    \bhow[ ](?:often|many[ ]times)[ ](?:do|does|did|is|are|was|were|has|have)[ ]
    (?:the[ ])?(?:(?:word|term|name|phrase|expression)s?[ ])?
    (?P<text>\S.{0,80}?)[ ]
    (?:been[ ])?(?:appear|occur|mentioned|named|used|repeated|written|said|come[ ]up|show[ ]up)
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""A question for how often a text says something."""
QUOTES = "\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb"


def counts_for(question: str, texts: Iterable[str]) -> str:
    """Return what a question asks to be counted in some texts, as a block in front of it; "" for any other question.

    Letters of either case count as the same. Numbers are no words.
    """
    if MOST_FREQUENT.search(question):
        words = Counter(word for text in texts for word in _words(text)).most_common(_how_many(question))
        counted = [f"{word} ({times})" for word, times in words]
    elif found := HOW_OFTEN.search(question):
        sought = found["text"].strip(QUOTES)
        form = re.compile(rf"(?<!\w){re.escape(sought)}(?!\w)", re.IGNORECASE)
        times = sum(len(form.findall(text)) for text in texts)
        counted = [f'"{sought}" ({times} time{"s" * (times != 1)})'] if sought else []
    else:
        counted = []
    return f"{INTRODUCTION} {', '.join(counted)}\n\n" if counted else ""


def _words(text: str) -> Iterator[str]:
    """Yield the words of a text in small letters."""
    return (found[0] for found in re.finditer(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*", text.lower()))


def _how_many(question: str) -> int:
    """Return how many words a question asks for: its first number."""
    named = re.search(rf"\b(?:(\d{{1,3}})|({'|'.join(NUMBERS)}))\b", question, re.IGNORECASE)
    if named is None:
        return DEFAULT_MOST
    number = int(named[1]) if named[1] else 1 + NUMBERS.index(named[2].lower())
    return min(MAX_MOST, number) or DEFAULT_MOST
