"""Passages that hold a name or number of a question, and those that what stands beside it leads to.

"Which variables have the value 87859?": a search for all words of this question finds passages that have most of them,
and leaves out one that has the number alone. So the few passages that hold a name or number are taken besides. Where a
list is asked for, the names beside it are followed from passage to passage ("VAR B = VAR A", "Anna reports to Boris").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from zsmerge_llm.retrieval.passages import SENTENCE_END, pieces, terms
from zsmerge_llm.retrieval.questions import Query
from zsmerge_llm.retrieval.section_notes import asks_about_whole

if TYPE_CHECKING:
    from zsmerge_llm.retrieval.passage_index import PassageIndex, Passages

MAX_HAVING = 3
"""Passages that have a name, at most: one that more have tells less."""
MAX_STEPS = 5
"""Passages of a chain of names."""
MAX_NAMES = 32
"""Names that are followed in one step."""


def names(sentence: str) -> set[str]:
    """Return the terms of a sentence's names: capitals behind its first word, or in all of it, and numbers."""
    words = re.findall(r"\w+", sentence)
    capitals = {
        word for at, word in enumerate(words) if word[:1].isupper() and len(word) > 1 and (at or word.isupper())
    }
    numbers = {word for word in words if len(word) > 2 and re.search(r"\d", word)}
    return {term for word in capitals | numbers for term in terms(word)}


def named_passages(index: PassageIndex, passages: Passages, query: Query, best: Sequence[int]) -> dict[int, str]:
    """Return passages that hold a name of a question which none of the best ones holds, each with that name's term.

    Where a list is asked for, return all that hold one, and those that the names beside it lead to. Where there is no
    best one, return none: the question may be about another text.

    passages: all of the index, as they were when the best ones were found.
    """
    searched = passages.count_before(len(passages.messages) - query.skipped)

    def having(found: Iterable[str]) -> dict[str, list[int]]:
        return {name: [at for at in index.having(name, MAX_HAVING) if at < searched] for name in sorted(found)}

    holding = having(names(query.text)) if best else {}
    if not asks_about_whole(query.text):
        missing = {name: numbers for name, numbers in holding.items() if not set(numbers) & set(best)}
        return {number: name for name, numbers in missing.items() for number in numbers}
    chain, known = dict[int, str](), set(terms(query.text))
    for _ in range(MAX_STEPS):
        step = {number: name for name, numbers in holding.items() for number in numbers if number not in chain}
        chain.update(step)
        new = {each for number, name in step.items() for each in _beside(passages[number].text, name)} - known
        known |= new
        holding = having(sorted(new)[:MAX_NAMES])
    return chain


def _beside(text: str, term: str) -> set[str]:
    """Return the terms of the names in the sentences of a text that hold a term."""
    return {name for sentence in pieces(text, SENTENCE_END) if term in terms(sentence) for name in names(sentence)}
