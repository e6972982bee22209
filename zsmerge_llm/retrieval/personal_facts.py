"""What users say of themselves: "My name is Lena", "I work as a nurse". English only.

A question such as "Who am I?" or "What is my job?" has no rare word, or another one than what was said. So a search
finds nothing, or something else. What users say in the first person are few sentences, and of these the ones most like
such a question are repeated.
"""

from __future__ import annotations

import re

from zsmerge_llm.retrieval.conversation_start import asks_for_start
from zsmerge_llm.retrieval.passages import SENTENCE_END, pieces
from zsmerge_llm.retrieval.terms import content_words, count_words

MAX_CONTENT_WORDS = 2
"""Words beside stop words of such a question. With more of them a search finds what it asks for."""
MAX_MESSAGE_WORDS = 200
"""A longer message is a text to work on, perhaps somebody else's."""
MAX_WORDS = 30
FIRST_PERSON = re.compile(r"\b(?:I|my|mine|me|myself|our|ours|we|us)\b", re.IGNORECASE)
TELL_ME = re.compile(r"\btell me\b", re.IGNORECASE)
"""How a question begins that may be about anybody."""
ASKS_FOR_FACT = re.compile(
    r"^\W*(?:(?:and|so|but|hi|hello|hey|ok|okay|please|now|by the way|quick question)\b\W*)*"
    r"(?:what|who|whom|whose|where|when|which|how (?:old|many|much|long|tall|often|far)|since when"
    r"|do you (?:still )?(?:know|remember|recall)|(?:can|could|would) you (?:tell|remind) me|remind me|tell me"
    r"|(?:am|was|do|did|have|had|is|are|were) (?:I|my|we|our))\b",
    re.IGNORECASE,
)
"""How a question begins that asks for something that was said, if it is in the first person."""
ASKS_FOR_ADVICE = re.compile(
    r"\b(?:(?:should|can|could|may|might|must|shall|would) (?:I|we|my|our)"
    r"|(?:I|we) (?:should|can|could|need|must|have to)|(?:do|did) (?:I|we) (?:need|have) to"
    r"|how (?:do|to|can|should|would|could|might)|best way"
    r"|(?:do you|would you|you['\u2019]d) (?:think|suggest|recommend|advise)|help me|for me|give me|show me|explain)\b",
    re.IGNORECASE,
)
"""Words of one that asks how to do something, or what to do."""
ASKS_WHAT_WAS_SAID = re.compile(
    r"\b(?:(?:did|have|had)(?:n['\u2019]t)? (?:I|we|you)|(?:was|were) (?:I|we|you|my|our)|remind me"
    r"|(?:I|we|you)(?:['\u2019]ve|['\u2019]d| have| had)? (?:\w+ )?"
    r"(?:said|told|mentioned|asked|wrote|discussed|talked|agreed|decided|recommended|suggested|described|explained)"
    r"|(?:do|can) you (?:still )?(?:remember|recall)|(?:this|our) (?:conversation|chat|discussion))\b",
    re.IGNORECASE,
)
"""Words of a question for what the user or the model has said or done."""
IDIOMS = (
    (re.compile(r"\bwho (?:am I|I am)\b|\bI called\b|\bcall me\b", re.IGNORECASE), "name"),
    (re.compile(r"\bdo (?:I|we) do\b|\bfor a living\b", re.IGNORECASE), "work job"),
    (re.compile(r"\bbirthday\b", re.IGNORECASE), "born birthday"),
)
"""Phrases, and the words that a fact about them has."""
FACT = re.compile(
    r"^\W*(?:(?:and|but|so|well|also|actually|yes|no|oh|hi|hello|hey|btw|by the way|fyi|just so you know|remember)\b"
    r"\W*)*(?:that )?(?:(?:I|we)(?:['\u2019](?:m|ve|d|ll|re))?|my|our|(?:you can |please )?call me)\b",
    re.IGNORECASE,
)
"""How a sentence begins that somebody says of himself."""
NO_FACT = re.compile(
    r"\b(?:I|we)(?:['\u2019](?:m|d|re))?\s+(?:(?:am|are|would|just|really|also|was)\s+)*"
    r"(?:wonder(?:ing)?|guess|mean|suppose|see|understand|agree|think|thought|like you|want you|need you|not sure)\b",
    re.IGNORECASE,
)


def asks_about_self(question: str) -> bool:
    """Return whether a user's question is for something that he has said of himself."""
    return _is_personal(question) and not asks_for_start(question) and len(_told(question)) <= MAX_CONTENT_WORDS


def asks_what_was_said(question: str) -> bool:
    """Return whether a question is for something that a conversation must have had, in whatever words."""
    return bool(ASKS_WHAT_WAS_SAID.search(question)) or _is_personal(question)


def asked_about(question: str) -> str:
    """Return the words that tell what such a question is about."""
    meant = [words for phrase, words in IDIOMS if phrase.search(question)]
    return " ".join([*meant, *_told(question)]) or question


def _is_personal(question: str) -> bool:
    """Return whether a question is for a fact about its user."""
    asks = ASKS_FOR_FACT.match(question) and FIRST_PERSON.search(TELL_ME.sub("", question))
    return bool(asks and not ASKS_FOR_ADVICE.search(question))


def _told(question: str) -> list[str]:
    """Return the words of a question behind its opening, without stop words."""
    return content_words(ASKS_FOR_FACT.sub("", question))


def find_facts(text: str) -> list[str]:
    """Return the sentences of a message that its writer says of himself."""
    if count_words(text) > MAX_MESSAGE_WORDS:
        return []
    sentences = (sentence.strip() for sentence in pieces(text, SENTENCE_END))
    return [each for each in sentences if _is_fact(each)]


def _is_fact(sentence: str) -> bool:
    is_statement = FACT.match(sentence) and not NO_FACT.search(sentence) and not sentence.endswith("?")
    return bool(is_statement and 2 < count_words(sentence) <= MAX_WORDS)
