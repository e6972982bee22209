"""What only the whole text tells: how often words are in it, and which names.

Neither a passage nor a small cache can tell that, and models count badly. The whole text is at hand, so it is counted.

Such questions are recognized by their words. English only: elsewhere nothing is recognized.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from zsmerge_llm.retrieval.passages import SENTENCE_END, pieces
from zsmerge_llm.retrieval.questions import asks_for_list

COUNTED, NAMED = "Counted in the whole text:", "Names in the whole text, the most frequent first:"
DEFAULT_MOST = 10
"""Most frequent words that are counted where a question does not say how many it asks for."""
MAX_MOST = 50
MAX_NAMES = 32
MAX_CAPITALS = 0.25
"""Share of the words inside sentences that may begin with a capital: where more do, that does not tell a name."""
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
MOST_FREQUENT = re.compile(
    r"""
    \bmost[ ](?:common|frequent|often|repeated|used)(?:ly)?(?:[ ]\w+)?[ ]words?\b
    | \bwords?\b.{0,99}\bmost[ ](?:often|common|frequent|frequently)\b
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
PEOPLE = re.compile(
    r"\b(?:list|name|enumerate|give|tell|who|which|what)\b.{0,99}"
    r"\b(?:persons|people|characters|names|everyone|everybody)\b",
    re.IGNORECASE,
)
"""A question for people, and, if it asks for a list, for all of them."""
WHO_ARE = re.compile(r"\bwho (?:are|were) (?:all )?the (?:\w+ )?(?:persons|people|characters)\b", re.IGNORECASE)
QUOTES = "\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb"
CAPITAL = r"(?!I\b)[^\W\d_a-z][\w'\u2019-]+"
NAME = re.compile(rf"{CAPITAL}(?: (?:(?:de|van|von|der|den|da|di|del|la|le|bin|ibn|al) ){{0,2}}{CAPITAL})*")


def whole_text_block(question: str, texts: Sequence[str], count: Callable[[str], int], max_tokens: int) -> str:
    """Return what a question asks of all of some texts, as a block in front of it; "" for any other question.

    count: the tokens of a text. max_tokens: of the block. Names take half of them at most: fewer are given then.
    """
    if block := _block(COUNTED, counted_words(question, texts)):
        return block if count(block) <= max_tokens else ""
    names = names_in(texts)[:MAX_NAMES] if asks_for_people(question) else []
    while names and count(_block(NAMED, names)) > max_tokens // 2:
        names = names[: len(names) // 2]
    return _block(NAMED, names)


def counted_words(question: str, texts: Sequence[str]) -> list[str]:
    """Return the words that a question asks to be counted in some texts, each with its count; [] for other questions.

    Letters of either case count as the same. Numbers are no words.
    """
    if asks_for_frequent_words(question):
        words = Counter(word for text in texts for word in _words(text)).most_common(_how_many(question))
        return [f"{word} ({times})" for word, times in words]
    if not (found := HOW_OFTEN.search(question)) or not (sought := found["text"].strip(QUOTES)):
        return []
    form = re.compile(rf"(?<!\w){re.escape(sought)}(?!\w)", re.IGNORECASE)
    times = sum(len(form.findall(text)) for text in texts)
    if not times and " " in sought and sought == found["text"]:
        return []  # more than a word, without quotes: it may not be what is asked for
    return [f'"{sought}" ({times} time{"s" * (times != 1)})']


def asks_for_frequent_words(question: str) -> bool:
    """Return whether a question asks for the most frequent words, of which no passage tells anything."""
    return bool(MOST_FREQUENT.search(question))


def asks_for_people(question: str) -> bool:
    """Return whether a question asks for all people in a text."""
    return bool(WHO_ARE.search(question) or (PEOPLE.search(question) and asks_for_list(question)))


def names_in(texts: Sequence[str]) -> list[str]:
    """Return the names in some texts, the most frequent first, others in the order of the texts.

    These are words with a capital inside a sentence that stand without one less often. Where much of a text has
    capitals, as in German, there are none.
    """
    sentences = [sentence for text in texts for sentence in pieces(text, SENTENCE_END)]
    found, inside, capitals = Counter[str](), set[str](), 0
    for sentence in sentences:
        first = re.search(r"\w", sentence)
        for name in NAME.finditer(sentence):
            form = re.sub(r"['\u2019]s$", "", name[0])
            found[form] += 1
            if first and name.start() > first.start():
                inside.add(form)
                capitals += len(re.findall(CAPITAL, form))
    words = Counter(word for sentence in sentences for word in re.findall(r"\w+", sentence))
    if capitals > MAX_CAPITALS * words.total():
        return []
    return [name for name, times in found.most_common() if name in inside and words[name.lower()] < times]


def _block(introduction: str, items: Sequence[str]) -> str:
    return f"{introduction} {', '.join(items)}\n\n" if items else ""


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
