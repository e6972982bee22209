"""RULER's aggregation: the common words of a list, and the frequent words of a coded text."""

from __future__ import annotations

import string
from random import Random

from benchmarks.quality.sources import Record, Sources, distinct, fit

COMMON = 10
COMMON_TIMES, OTHER_TIMES = 30, 3
EXAMPLE_WORDS, EXAMPLE_COMMON_TIMES, EXAMPLE_OTHER_TIMES = 40, 10, 3
ALPHA = 2.0
"""Exponent of the coded words' frequencies by rank (a zeta distribution)."""
CODED_LETTERS = 6
TOKENS_PER_WORD = 50
"""Tokens of a text for each different coded word."""
FREQUENT = 3


def common_words(sources: Sources, seed: str, tokens: int, questions: int) -> Record:
    """Return a numbered list of words, ten of which are ten times as frequent as the others, behind an example."""

    def build(size: int) -> Record:
        draw = Random(seed)
        example, shown = _word_list(sources, draw, EXAMPLE_WORDS, EXAMPLE_COMMON_TIMES, EXAMPLE_OTHER_TIMES)
        text, frequent = _word_list(sources, draw, COMMON + size, COMMON_TIMES, OTHER_TIMES)
        asked = {
            "q": "What are the 10 most common words in the above list?",
            "opening": "Answer: The top 10 words that appear most often in the list are:",
            "a": frequent,
            "gold": _numbered(frequent),
            "metric": "all",
        }
        solved = f"{example}\nQuestion: {asked['q']} {asked['opening']} {_numbered(shown)}\n"
        return {"context": f"{solved}{text}", "qa": [asked]}

    return fit(build, tokens, sources.count)


def _word_list(
    sources: Sources, draw: Random, count: int, common_times: int, other_times: int
) -> tuple[str, list[str]]:
    """Return an instruction with a shuffled list of `count` different words, and the ten common ones."""
    words = draw.sample(sources.words, count)
    items = words[:COMMON] * common_times + words[COMMON:] * other_times
    draw.shuffle(items)
    instruction = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    )
    return f"{instruction}\n{_numbered(items)}", words[:COMMON]


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


def frequent_words(sources: Sources, seed: str, tokens: int, questions: int) -> Record:
    """Return a text of coded words, whose most frequent one is noise; asked are the next three."""

    def build(size: int) -> Record:
        draw = Random(seed)
        vocabulary = distinct(
            lambda: "".join(draw.choices(string.ascii_lowercase, k=CODED_LETTERS)), tokens // TOKENS_PER_WORD
        )
        shares = [rank**-ALPHA for rank in range(1, len(vocabulary) + 1)]
        coded = ["...", *vocabulary[1:]]
        text = [word for word, share in zip(coded, shares, strict=True) for _ in range(int(size * share))]
        draw.shuffle(text)
        asked = {
            "q": "Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
            "appeared words in the above coded text?",
            "opening": "Answer: According to the coded text above, the three most frequently appeared words are:",
            "a": coded[1 : FREQUENT + 1],
            "gold": ", ".join(coded[1 : FREQUENT + 1]),
            "metric": "all",
        }
        instruction = (
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            "appeared coded words."
        )
        return {"context": f"{instruction} {' '.join(text)}", "qa": [asked]}

    return fit(build, tokens, sources.count)
