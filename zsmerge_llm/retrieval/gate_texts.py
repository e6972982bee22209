"""Texts to train a model's gates on, with questions made of their own sentences: no data of questions is needed.

A question asks what the text says about a name or a rare word of a sentence, and that sentence is the answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from random import Random

from zsmerge_llm.engine.gate_training import GateText
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.passages import SENTENCE_END, pieces, split
from zsmerge_llm.retrieval.query_probe import PLACEHOLDER, chat_probe

PART_TOKENS = 1400
"""Tokens of a text that is read at once."""
LEAST_PART_TOKENS = 300
QUESTIONS = 12
"""Questions about each part."""
QUESTION = "What does the text say about {}?"
WORD = re.compile(r"[^\W_][\w'-]*")
NAME = re.compile(r"(?<=[a-z,;] )[^\W\d_a-z][\w'-]+(?: [^\W\d_a-z][\w'-]+)*")
"""Words that begin with a capital letter, or one beyond a to z, and do not begin a sentence."""
MIN_WORDS, MAX_WORDS = 8, 40
"""Words of a sentence that is asked for."""
MIN_LETTERS = 4
"""Letters of a word that is asked about."""


def gate_texts(template: ChatTemplate, texts: Iterable[str], max_tokens: int, seed: int = 0) -> Iterator[GateText]:
    """Yield parts of texts, in random order, with their questions: `max_tokens` of text at most."""
    parts = [part for text in texts for part in _parts(template, text)]
    draw = Random(seed)
    draw.shuffle(parts)
    before = template.render([{"role": "user", "content": PLACEHOLDER}]).partition(PLACEHOLDER)[0]
    for part in parts:
        ids = template.encode(before + part)
        max_tokens -= len(ids)
        if max_tokens < 0:
            return
        asked = [
            [*template.encode("\n\n"), *chat_probe(template, QUESTION.format(about)), *template.encode_text(answer)]
            for about, answer in questions(part, draw)
        ]
        yield GateText(ids, asked)


def questions(text: str, draw: Random) -> list[tuple[str, str]]:
    """Return what to ask about, and the sentences that answer, for some sentences of a text."""
    sentences = [piece.strip() for piece in pieces(text, SENTENCE_END)]
    occurrences = Counter(word for sentence in sentences for word in {*_words(sentence)})
    fit = [sentence for sentence in sentences if MIN_WORDS <= len(WORD.findall(sentence)) <= MAX_WORDS]
    found = []
    for sentence in draw.sample(fit, min(QUESTIONS, len(fit))):
        names = NAME.findall(sentence)
        rare = min(_words(sentence), key=lambda word: (occurrences[word], -len(word)), default=None)
        if about := draw.choice(names) if names else rare:
            found.append((about, sentence))
    return found


def _words(sentence: str) -> list[str]:
    return [word for word in WORD.findall(sentence) if len(word) >= MIN_LETTERS and not word.isdigit()]


def _parts(template: ChatTemplate, text: str) -> Iterator[str]:
    """Yield a text in parts of some `PART_TOKENS`."""
    part: list[str] = []
    size = 0
    for passage in split(text):
        size += len(template.encode_text(passage))
        part.append(passage)
        if size >= PART_TOKENS:
            yield "\n\n".join(part)
            part, size = [], 0
    if size >= LEAST_PART_TOKENS:
        yield "\n\n".join(part)
