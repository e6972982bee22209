"""Standing instructions: what a user once said that holds for every later answer, such as "I dislike superhero films".

A question does not repeat the words of the preference that it has to heed, so no search finds it. Users state such
things in few forms, which are recognized in their messages. English only: elsewhere nothing is recognized.
"""

from __future__ import annotations

import re

from zsmerge_llm.retrieval.passages import SENTENCE_END, pieces
from zsmerge_llm.retrieval.terms import count_words

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
