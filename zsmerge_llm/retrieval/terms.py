"""What texts are found by: words by their first letters, whole identifiers and numbers, in any script.

Case and accents make no difference. Chinese, Japanese and Korean are found by characters, and scripts without spaces
between words by each three letters. docs/research/retrieval has the figures by language.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache

STEM_LETTERS = 5
"""Letters of a word that tell it from others: "compresses" and "compressed" are the same to the search."""
PLURAL = re.compile(r"(?<=^\w\w[^\W\ds])s$|(?<=^\w\w\w[^\W\ds])s$")
"""The ending of a plural that is not cut off with the letters behind these: "cats" is "cat", and "glass" stays."""
CHARACTERS = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
"""Characters of Chinese, Japanese and Korean: each counts as a word."""
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Letters of Thai, Lao, Burmese and Khmer, which write no spaces between words."""
UNSPACED_LETTERS = 4
"""Letters of these scripts that count as a word."""
GRAM_LETTERS = 3
"""Letters of the n-grams by which these scripts are searched."""
MARKS = "".join(
    chr(code)
    for code in range(0x300, 0x3100)
    if unicodedata.category(chr(code)) in ("Mn", "Mc") and not re.match(f"[{UNSPACED}]", chr(code))
)
"""Signs that belong to the letter before them, such as the vowels of Hindi: `\\w` does not match them."""
LETTER = rf"[^\W{CHARACTERS}{UNSPACED}]"
WORD = rf"[{CHARACTERS}]|{LETTER}+(?:[{MARKS}]+{LETTER}*)*"
TERM = rf"{WORD}|[{UNSPACED}]{{1,{UNSPACED_LETTERS}}}"
"""What counts as a word."""
OMITTED = re.compile("[\u0300-\u036f\u064b-\u0655\u0670]+")
"""Accents, and the short vowels of Arabic."""
ARTICLE = re.compile("^(?:[\u0648\u0641\u0628\u0643]?\u0627\u0644|\u0644\u0644)(?=\\w\\w)")
"""The article of an Arabic word, and what is written together with it: "and", "so", "with", "like", "for"."""
IDENTIFIER = re.compile(r"\d|_|[a-z][A-Z]")
"""What makes a word an identifier, of which the last letter counts: `user88`, `load_batch`, `PassageSearch`."""
IDENTIFIER_PARTS = re.compile(r"_+|(?<=[a-z])(?=[A-Z])")
"""What separates the parts of an identifier."""
NUMBER = re.compile(r"\d+(?:[.:/-]\d+)+")
"""A number of several parts, which count together: a clause, a version, a date, a time of day, an address."""
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
MONTH = (
    r"(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)"
)
"""An English name of a month, of which three letters tell it."""
DAY = re.compile(r"(\d\d(?<![\w.:/-]\d\d)|\d(?<![\w.:/-]\d))(?:st|nd|rd|th)?(?![\w:/-])")
"""A number that may be the day of a month. It is one where a month stands behind it or before it."""
MONTH_BEHIND = re.compile(rf"\.?\s+(?:of\s+)?{MONTH}\b", re.IGNORECASE)
MONTH_BEFORE = re.compile(rf"\b{MONTH}\.?\s+$", re.IGNORECASE)
MONTH_LETTERS = 12
"""Characters before a day that its month takes at most."""
NUMERIC_DATE = re.compile(
    r"(?<![\w.:/-])(?:(?P<year>\d{4})[-/](?P<month>\d{1,2})[-/](?P<day>\d{1,2})"
    r"|(?P<day_first>\d{1,2})\.(?P<month_second>\d{1,2})\.(?P<year_last>\d{4}))(?!\d)"
)
"""A date in numbers: "2023-05-08", "8.5.2023"."""
CACHED_WORDS = 1 << 14
"""Words whose terms are kept, for most of a text are the same ones."""
QUESTION_WORDS = frozenset(
    re.findall(
        WORD,
        "above according along another answer aside besides called can could describe different document else example "
        "explain give kind know many may mean means meant mention might much name named names passage please query "
        "question refer referred referring say sort tell term terms text type use used usual usually want way would",
    )
)
"""Words that ask, beside the stop words of a language: they do not tell what a question is about."""


def count_words(text: str) -> int:
    """Return the number of words."""
    return len(re.findall(TERM, text))


def terms(text: str) -> list[str]:
    """Return the terms that a text is found by, with repetitions."""
    folded = _folded(text)
    words = (term for word in re.findall(WORD, folded) for term in _word_terms(word))
    return [*words, *_grams(folded), *NUMBER.findall(folded), *_days(folded)]


def query_terms(question: str) -> list[str]:
    """Return the terms of a question, without the stop words of its language and words that only ask.

    Of a date in numbers its year and day count alone, for a text may have it in other words.
    """
    folded = _folded(question)
    undated = NUMERIC_DATE.sub(lambda found: found["year"] or found["year_last"], folded)
    told = (word for word in _content_words(undated) if word.lower() not in QUESTION_WORDS)
    asked = (term for word in told for term in _word_terms(word))
    return [*asked, *_grams(folded), *NUMBER.findall(undated), *_days(folded)]


def identifiers(text: str) -> set[str]:
    """Return the terms of a text's identifiers as a whole: `user88`, `load_batch`, 12.3, but no plain number."""
    folded = _folded(text)
    words = (word for word in re.findall(WORD, folded) if IDENTIFIER.search(word) and not word.isdigit())
    return {_word_terms(word)[0] for word in words} | set(NUMBER.findall(folded))


def content_words(text: str) -> list[str]:
    """Return the words of a text without the stop words of its language."""
    return _content_words(_folded(text))


def _content_words(folded: str) -> list[str]:
    words = [(word, word.lower()) for word in re.findall(WORD, folded)]
    common = max(_stop_words(), key=lambda language: sum(low in language for _, low in words))
    return [word for word, low in words if low not in common]


@cache
def _stop_words() -> list[frozenset[str]]:
    """Return the stop words of each language."""
    from bm25s import stopwords

    names = (name for name in dir(stopwords) if name.startswith("STOPWORDS_"))
    return [frozenset(map(_folded, getattr(stopwords, name))) for name in names]


def _folded(text: str) -> str:
    """Return a text in one form of each letter, without accents."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", OMITTED.sub("", unicodedata.normalize("NFKD", text)))


@lru_cache(CACHED_WORDS)
def _word_terms(word: str) -> tuple[str, ...]:
    """Return the terms of a word: its first letters; and of an identifier the whole of it, first, and its parts."""
    low = ARTICLE.sub("", word.lower())
    if not IDENTIFIER.search(word):
        return (_stem(low),)
    parts = (part.lower() for part in IDENTIFIER_PARTS.split(word) if part)
    stems = (_stem(each) if each.isalpha() else each for each in (low, *parts))
    return tuple(dict.fromkeys([low, *stems]))


def _stem(low: str) -> str:
    """Return what a word in small letters has in common with its other forms."""
    return PLURAL.sub("", low)[:STEM_LETTERS]


def _grams(text: str) -> Iterator[str]:
    """Yield the parts of a text's unspaced runs that are searched for."""
    for run in re.findall(f"[{UNSPACED}]+", text):
        yield from (run[at : at + GRAM_LETTERS] for at in range(max(1, len(run) - GRAM_LETTERS + 1)))


def _days(text: str) -> Iterator[str]:
    """Yield the days of a year that a text names, each in one form. Names of months are English."""
    for found in NUMERIC_DATE.finditer(text):
        yield _day(found["month"] or found["month_second"], found["day"] or found["day_first"])
    for found in DAY.finditer(text):
        start = found.start()
        name = MONTH_BEHIND.match(text, found.end()) or MONTH_BEFORE.search(text, max(0, start - MONTH_LETTERS), start)
        if name:
            yield _day(1 + MONTHS.index(name[1][:3].lower()), found[1])


def _day(month: str | int, day: str) -> str:
    return f"day {int(month)}-{int(day)}"
