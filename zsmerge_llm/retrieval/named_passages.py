"""Passages that hold a number or quoted word of a question, and those that names lead to where a list is asked for.

"Which variables have the value 87859?": a search for all words of this question finds passages that have most of them,
and leaves out one that has the number alone. So the few passages that hold a name or number are taken besides. So are
those with a word in quotes ("Which string begins with "qwert"?"), as far as the search tells words apart. Where a
list is asked for, the names beside it are followed from passage to passage ("VAR B = VAR A", "Anna reports to Boris").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from zsmerge_llm.retrieval.passages import SENTENCE_END, pieces
from zsmerge_llm.retrieval.questions import LIST, Query
from zsmerge_llm.retrieval.terms import terms

if TYPE_CHECKING:
    from zsmerge_llm.retrieval.passage_index import PassageIndex, Passages

MAX_HAVING = 3
"""Passages that have a name, at most: one that more have tells less."""
MAX_STEPS = 5
"""Passages of a chain of names."""
MAX_NAMES = 32
"""Names that are followed in one step."""
QUOTED = re.compile('["\u201c\u201e\u00ab]([^"\u201c\u201d\u201e\u00ab\u00bb\\n]{1,80})["\u201c\u201d\u00bb]')
"""What stands in quotation marks, of several languages."""


def numbers(text: str) -> set[str]:
    """Return the terms of a text with a digit, of three characters and more."""
    return {term for term in terms(text) if len(term) >= 3 and re.search(r"\d", term)}


def quoted(text: str) -> set[str]:
    """Return the terms of a text's words of three characters and more that stand in quotation marks."""
    return {term for found in QUOTED.findall(text) for word in re.findall(r"\w{3,}", found) for term in terms(word)}


def names(sentence: str) -> set[str]:
    """Return the terms of a sentence's names: its numbers, and capitals behind its first word, or in all of it."""
    words = enumerate(re.findall(r"\w+", sentence))
    capitals = [word for at, word in words if word[:1].isupper() and len(word) > 1 and (at or word.isupper())]
    return numbers(sentence) | {term for word in capitals for term in terms(word)}


def lists_by_identifier(question: str) -> bool:
    """Return whether a question is for a list and names an identifier: five characters or more, one a digit."""
    return bool(LIST.search(question) and re.search(r"\b(?=\w*\d)\w{5,}", question))


def by_identifier(question: str, named: Mapping[int, list[str]]) -> list[int]:
    """Return the passages that the identifier of a question for a list leads to; [] where it leads to none.

    Others only share words with the question: a model takes what they say for the answer (docs/research/retrieval).

    named: as `named_passages` returns them.
    """
    found = {name for names in named.values() for name in names}
    return list(named) if lists_by_identifier(question) and found & numbers(question) else []


def named_passages(index: PassageIndex, passages: Passages, query: Query, best: Sequence[int]) -> dict[int, list[str]]:
    """Return passages that hold a number or quoted word of a question which none of the best ones holds, with its term.

    Where a list is asked for, return all that hold a name of it, and those that the names beside it lead to. Where
    there is no best one, return none: the question may be about another text.

    passages: all of the index, as they were when the best ones were found.
    """
    if not best:
        return {}
    searched = passages.count_before(len(passages.messages) - query.skipped)

    def having(found: Iterable[str]) -> dict[str, list[int]]:
        return {name: [at for at in index.having(name, MAX_HAVING) if at < searched] for name in sorted(found)}

    sought = quoted(query.text)
    if not LIST.search(query.text):
        held = having(numbers(query.text) | sought).items()
        missing = {name: places for name, places in held if not {*places} & {*best}}
        return _by_passage(missing)
    found, known = dict[str, list[int]](), set(terms(query.text))
    new: Iterable[str] = names(query.text) | sought
    for _ in range(MAX_STEPS):
        step = having(new)
        found.update(step)
        beside = {each for name, places in step.items() for at in places for each in _beside(passages[at].text, name)}
        new = sorted(beside - known)[:MAX_NAMES]
        known |= beside
    return _by_passage(found)


def _by_passage(places: Mapping[str, Iterable[int]]) -> dict[int, list[str]]:
    """Return the names of each passage, in the order of the names."""
    found: dict[int, list[str]] = {}
    for name, having in places.items():
        for at in having:
            found.setdefault(at, []).append(name)
    return found


def _beside(text: str, term: str) -> set[str]:
    """Return the terms of the names in the sentences of a text that hold a term."""
    return {name for sentence in pieces(text, SENTENCE_END) if term in terms(sentence) for name in names(sentence)}
