"""What is shown of passages where not all that were found have room: whole ones, or sentences of more of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from zsmerge_llm.retrieval.passages import LINE_END, SENTENCE_END, Passage, excerpt, weight_of
from zsmerge_llm.retrieval.selection import choose

ALIKE_SHARE = 0.9
"""Share of what the best passage says, by weight, that another one says that may answer a question as well."""
MAX_ALIKE = 8
"""Such passages at most: where more say the same, it does not tell which of them answers."""


class Detail(NamedTuple):
    """How much of passages is shown: how many are whole at most, and what stands beside the sentences of the others.

    neighbours: sentences before and behind each that says what is asked for. end: where a sentence ends.
    """

    whole: int
    neighbours: int
    end: str = SENTENCE_END


DETAILS = (Detail(2, 1), Detail(1, 1), Detail(0, 1), Detail(0, 0), Detail(0, 0, LINE_END))
"""From most to least: the first that has room for all passages that may answer a question is taken."""
MORE_NEIGHBOURS = (4, 2)
"""Sentences beside those of the best excerpt: the first number that has room."""
ENOUGH_TOKENS = 96
"""Tokens that the best excerpt may have where half of the tokens are fewer."""


@dataclass(frozen=True)
class Excerpts:
    """Ranked passages, and what is sought in each.

    Attributes:
        passage: number → the whole passage.
        weights: number → those of the terms that are sought in it.
        cost: tokens that a passage takes.
    """

    passage: Callable[[int], Passage]
    weights: Callable[[int], Mapping[str, float]]
    cost: Callable[[Passage], int]

    def choose(
        self, ranked: Sequence[int], best: Sequence[int], wanted: set[int], max_tokens: int
    ) -> dict[int, Passage]:
        """Return what is shown of the first passages, at most `max_tokens` together, by number.

        Args:
            best: those that may be whole, in half of the tokens.
            wanted: those that room is made for: the others are shown in less detail for them.
        """

        def shown(detail: Detail) -> dict[int, Passage]:
            whole = first_passages(best[: detail.whole], self.passage, self.cost, max_tokens // 2)
            excerpts = cache(lambda number: self._excerpt(number, detail))
            return first_passages(ranked, lambda number: whole.get(number) or excerpts(number), self.cost, max_tokens)

        return self._with_more_of_best(most_of(wanted, map(shown, DETAILS)), ranked, max_tokens)

    def _with_more_of_best(
        self, chosen: dict[int, Passage], ranked: Sequence[int], max_tokens: int
    ) -> dict[int, Passage]:
        """Return the same with more of the best excerpt, as far as there is room.

        What a question asks for may stand some lines beside what it names, as in a record of JSON.
        """
        best = next((number for number in ranked if number in chosen), None)
        if best is None or chosen[best] == self.passage(best):
            return chosen
        left = max_tokens - sum(self.cost(chosen[number]) for number in chosen.keys() - {best})
        left = min(left, max(max_tokens // 2, ENOUGH_TOKENS))
        forms = (self._excerpt(best, Detail(0, count)) for count in MORE_NEIGHBOURS)
        longer = next((form for form in forms if self.cost(form) <= left), chosen[best])
        return {**chosen, best: max(longer, chosen[best], key=self.cost)}

    def _excerpt(self, number: int, detail: Detail) -> Passage:
        passage = self.passage(number)
        return replace(passage, text=excerpt(passage.text, self.weights(number), detail.neighbours, detail.end))


def first_passages(
    ranked: Sequence[int], shown: Callable[[int], Passage], cost: Callable[[Passage], int], max_tokens: int
) -> dict[int, Passage]:
    """Return the first passages that cost `max_tokens` together, by number. shown: number → what is shown of it."""
    return {number: shown(number) for number in choose(ranked, lambda number: cost(shown(number)), max_tokens)}


def sought_terms(
    best: Iterable[int], named: Mapping[int, Iterable[str]], weights: Mapping[str, float], identifiers: Iterable[str]
) -> dict[int, Mapping[str, float]]:
    """Return the weights of what is sought in each passage: the question's terms in the best ones, and its own names.

    A name, or an identifier of the question, tells more than all other terms together.

    named: the names that a passage was found by. weights: of the question's terms.
    """
    most = sum(weights.values()) or 1.0
    own = {number: dict.fromkeys(names, most) for number, names in named.items()}
    asked = {**weights, **{term: most for term in identifiers if term in weights}}
    return {**own, **{number: {**asked, **own.get(number, {})} for number in best}}


def alike(best: Sequence[int], passage: Callable[[int], Passage], weights: Mapping[str, float]) -> set[int]:
    """Return the best passage, and those that say as much of what is asked for; it alone where they are many.

    weights: of the terms that are asked for.
    """
    said = {number: weight_of(passage(number).text, weights) for number in best[: MAX_ALIKE + 1]}
    found = {number for number in said if said[number] and said[number] >= ALIKE_SHARE * said[best[0]]}
    return found | {best[0]} if len(found) <= MAX_ALIKE else {best[0]}


def most_of(wanted: set[int], tries: Iterable[dict[int, Passage]]) -> dict[int, Passage]:
    """Return the first choice that has all passages that are wanted, or else the one that has most of them."""
    chosen: dict[int, Passage] = {}
    for found in tries:
        if not chosen or len(wanted & found.keys()) > len(wanted & chosen.keys()):
            chosen = found
        if wanted <= chosen.keys():
            break
    return chosen
