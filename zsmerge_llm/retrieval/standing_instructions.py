"""Standing instructions: what a user once said that holds for every later answer, such as "I dislike superhero films".

A question does not repeat the words of the preference that it has to heed, so no search finds it. Users state such
things in few forms, which are recognized in their messages. English only: elsewhere nothing is recognized.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from zsmerge_llm.language.messages import shared_prefix
from zsmerge_llm.retrieval.passages import SENTENCE_END, pieces
from zsmerge_llm.retrieval.terms import count_words, query_terms, terms
from zsmerge_llm.types import Message

if TYPE_CHECKING:
    from zsmerge_llm.retrieval.token_vectors import TokenVectors

MAX_MESSAGE_WORDS = 400
"""A longer message is a text to work on. What somebody in it prefers is nothing that the user asks for."""
MAX_WORDS = 40
"""Of a longer sentence, the clause that says it is taken."""
CLAUSE_END = r"[;:]\s+|,\s+(?=(?:and|but|so|or|how|can|could|which|because|considering)\b)"
STATEMENT = re.compile(
    r"""
    ^\W*(?:please\s+|also,?\s+|and\s+)?
    (?:always|never|from\ now\ on|whenever|in\ (?:the\ )?future|remember\ to|keep\ in\ mind
       |do(?:\ not|n['\u2019]t)\ ever)\b
    | \b(?:from\ now\ on|when(?:ever)?\ I\ ask)\b
    | \bI\s+(?:\w+ly\s+|much\s+|also\s+)?(?:
        prefer | dislike | hate | despise | detest | loathe | abhor | avoid | refuse | love | adore | favou?r | oppose
        | boycott | insist\s+on | object\s+to | suffer\s+from | abstain\s+from | stick\s+to
        | (?:stay|keep|steer|shy)\s+(?:away|clear)
        | tend\s+to\s+(?:avoid|prefer|dislike)
        | (?:(?:can|will)\s+)?(?:only|exclusively|strictly|never|always)\s+
          (?!\w+ed\b|have|had|know|knew|need|got|see|saw|meant|said|did|been|heard|thought)\w+
        | (?:\w+\s+)?follow\s+an?\s+(?:[\w-]+\s+){0,3}diet
        | ca(?:n['\u2019]?|nno|n\ no)t\s+(?:stand|eat|tolerate|bear|abide|digest|handle)
        | do(?:\ not|n['\u2019]t)\s+
          (?:like|enjoy|eat|drink|use|listen|read|watch|wear|care|buy|consume|support|trust|believe\s+in|tolerate)
    )\b
    | \bI(?:['\u2019]m|\ am|['\u2019]ve\ been)\s+(?:(?:\w+ly|very|also|a|an|not|strict|lifelong|devout)\s+)*(?:
        (?:\w+\s+)?fan | allergic | vegan | vegetarian | pescatarian | averse | opposed | committed\ to | uncomfortable
        | passionate\ about | fascinated\ by | keen\ on | partial\ to | sensitive\ to
        | terrified | (?:afraid|scared)\ of
        | claustrophobic | wary | \w+[\s-]intolerant
    )\b
    | \bI(?:['\u2019]ve|\ have)\s+(?:always|never|long)\s+
      (?:hated|disliked|avoided|preferred|loved|refused|liked|enjoyed)\b
    | \bI\s+(?:have|hold)\s+(?:an?\s+|no\s+)?(?:[\w-]+\s+){0,2}
      (?:aversion|preference|objection|allergy|dislike|distaste|interest|phobia|fear|intolerance|sensitivity
        |sensitive\ (?:skin|stomach|teeth|eyes|ears))\b
    | \bI\s+find\b.*\b(?:
        annoying | boring | depressing | distasteful | distracting | disturbing | draining | dull | exhausting
        | frustrating | intimidating | irritating | off-putting | overwhelming | painful | stressful | tedious | tiring
        | unpleasant | unsettling
    )\W*$
    | \bmakes?\ me\ (?:uncomfortable|anxious|sick|nauseous|nervous)\b
    | \bdo(?:es)?(?:\ not|n['\u2019]t)\ interest\ me\b
    | \b(?:important|essential|crucial)\ (?:to|for)\ me\b | \bdeal-?\ ?breaker
    | \bmy\s+favou?rite\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


class StandingInstructions:
    """The standing instructions and preferences of a conversation's user. Each turn adds those of its new messages.

    Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._found: list[list[str]] = []  # by message
        self._lock = Lock()

    def select(
        self,
        messages: Sequence[Message],
        question: str,
        fits: Callable[[str], bool],
        vectors: TokenVectors | None = None,
    ) -> list[str]:
        """Return the statements of the users' messages that a question has to heed, in their order.

        Those that say like things as the question are tried first, in words and in meaning in equal parts; then the
        newest.

        Args:
            fits: whether a statement is to be repeated, beside those before which it said so.
            vectors: those of the model's tokens; None: words alone.
        """
        with self._lock:
            statements = self._update(list(messages))
        relevance = _relevance(statements, question, vectors)
        by_relevance = sorted(range(len(statements)), key=lambda number: (relevance[number], number), reverse=True)
        return [statements[number] for number in sorted(each for each in by_relevance if fits(statements[each]))]

    def _update(self, messages: list[Message]) -> list[str]:
        """Return all statements, the oldest first; of equal ones the newest."""
        known = shared_prefix(self._messages, messages)
        new = [find_statements(each["content"]) if each["role"] == "user" else [] for each in messages[known:]]
        self._messages, self._found = messages, [*self._found[:known], *new]
        newest_first = dict.fromkeys(text for found in reversed(self._found) for text in reversed(found))
        return list(reversed(newest_first))


def _relevance(statements: Sequence[str], question: str, vectors: TokenVectors | None) -> list[float]:
    """Return how relevant each statement is to a question: its shares of the best one by words and by meaning."""
    having = Counter(term for each in statements for term in set(terms(each)))
    asked = set(query_terms(question))
    by_words = _shares([sum(1 / having[term] for term in asked & set(terms(each))) for each in statements])
    if vectors is None:
        return by_words
    from zsmerge_llm.retrieval.similarity_index import SimilarityIndex  # needs NumPy

    index = SimilarityIndex(vectors)
    for each in statements:
        index.append(each)
    by_meaning = _shares(index.scores(question).tolist())
    return [sum(both) for both in zip(by_words, by_meaning, strict=True)]


def _shares(scores: Sequence[float]) -> list[float]:
    """Return scores as shares of the highest one."""
    highest = max(scores, default=0.0) or 1.0
    return [score / highest for score in scores]


def find_statements(text: str) -> list[str]:
    """Return the sentences of a message that state what its writer prefers, or how every answer is to be."""
    if count_words(text) > MAX_MESSAGE_WORDS:
        return []
    found = []
    for sentence in _parts(text, SENTENCE_END):
        clauses = [sentence] if count_words(sentence) <= MAX_WORDS else _parts(sentence, CLAUSE_END)
        found += [clause for clause in clauses if STATEMENT.search(clause) and 2 < count_words(clause) <= MAX_WORDS]
    return found


def _parts(text: str, end: str) -> list[str]:
    """Return the parts of a text, without the space around them."""
    return [part.strip() for part in pieces(text, end) if part.strip()]
