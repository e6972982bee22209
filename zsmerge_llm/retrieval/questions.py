"""What a turn asks: by which message, where its question begins, without how to answer it, in which parts, and behind
which earlier question.

Prompts of frameworks and users put more around a question than it has words ("Given the context information, answer the
query. Query: ... Answer:"). A search for all of these words finds less (docs/research/retrieval). And an agent reads
results of tools before it answers: what is asked stands in the request that the tools were called for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from zsmerge_llm.retrieval.passages import LINE_END, pieces
from zsmerge_llm.retrieval.terms import count_words, query_terms
from zsmerge_llm.types import Message

MAX_LABEL_WORDS = 3
"""Words of a last line that only says where the answer goes."""
MAX_LINES_BEHIND = 3
"""Lines behind a question with a label, such as "Answer in one sentence."."""
MAX_WORDS_BEHIND = 80
"""Words of these lines. More are a text, with the label in an example before it."""
LABEL = re.compile(
    r"^[ \t>*_#-]*(?:[^\W\d_][\w-]*[ \t]){0,2}"
    r"(?:question|query|q|frage|pregunta|pergunta|domanda|vraag|fråga|spørsmål|spørgsmål|pytanie|soru|вопрос|питання"
    r"|问题|問題|質問|질문|प्रश्न)[ \t]*\d*[ \t*_]*[:\uff1a][ \t*_]*",
    re.IGNORECASE | re.MULTILINE,
)
"""Beginning of a line that says that a question follows."""
ASKING = r"(?:what|when|where|which|who|whose|why|how|is|are|was|were|do|does|did|can|could)\b"
REQUEST = r"(?:explain|describe|tell|summari[sz]e|compare|list|name|find)\b"
"""Verbs of a question that is put as a request."""
ABOUT_ANSWER = re.compile(
    r"\b(?:answer(?:s|ed|ing)?|question|query|repl(?:y|ies)|respond|responses?|output|assistant|thanks?)\b",
    re.IGNORECASE,
)
"""Words of a sentence that says how to answer."""
ABOUT_FORM = re.compile(
    r"\W*(?:please[ ])?(?:mention|include|give|use|keep|limit)\b.*\b(?:items|words|sentences|points|bullets?)\W*$",
    re.IGNORECASE,
)
"""A sentence that says how long an answer is to be, or in which form."""
NAME = re.compile(r"\S[\s\"'(]+[^\W\d_a-z]\w|\d{3}")
"""A capital letter within a sentence, or one beyond a to z, which may be a name, or a large number."""
REFERS_BACK = re.compile(
    r"\b(?:he|she|him|his|hers?|they|them|theirs?|its?)\b|^\W*(?:and|but|(?:what|how) about|what else)\b", re.IGNORECASE
)
"""Words of a question about what was spoken of before it."""
MAX_STEPS_BACK = 3
"""Messages before a follow-up among which a question is looked for that names what it is about."""
MAX_WORDS_BEFORE = 40
"""Words of such a question. A longer message is about more than one thing."""
MAX_LETTERS_BEFORE = 2000
"""Characters at the end of an earlier message in which its question is looked for."""
PIECE_END = rf"{LINE_END}|:\s+"
"""Where a sentence, a line, or what introduces a question ends."""
PART_END = rf"[?;]|,?\s(?:and|or)\s(?={ASKING})|,\s(?={ASKING})"
"""Where one part of a question ends and the next begins."""
COMPARED = r"\bbetween\s(.+?)\sand\s(.+)"
"""Two things that stand at different places of a text, perhaps."""
MIN_PART_WORDS = 2
LIST = re.compile(r"\b(?:all|list|enumerate|each|every\w*)\b", re.IGNORECASE)
"""Words of a question that asks for a list. A number or a summary (`section_notes.asks_about_whole`) is none."""
ORDER = re.compile(
    r"\b(?:(?:which|what) order|sequence|chronolog\w+"
    r"|from (?:the )?(?:first|beginning|start) to (?:the )?(?:last|end))\b",
    re.IGNORECASE,
)
"""Words of a question for an order."""
OUR_TALK = r"(?:our|this)[ ](?:\w+[ ])?(?:conversations?|discussions?|chats?|talks?)"
WE_SAID = r"brought[ ]up|mentioned|discussed|talked[ ]about|said|told[ ]you"
WE_SAY = r"bring[ ]up|mention|discuss|talk[ ]about|say|tell[ ]you"
"""The conversation, and what was said in it: behind "I" or "we", and behind "did I" or "did we"."""
FRAMING = re.compile(
    rf"""
    \b(?: (?:(?:across|throughout|over|during|in|from)[ ](?:all[ ])?(?:of[ ])?)?{OUR_TALK}(?:[ ]so[ ]far)?
        | (?:an?[ ]|the[ ])?(?:\w+[ ])?(?:summary|overview|recap|outline)[ ]of(?:[ ](?:how|what|everything))?
        | summari[sz]e(?:[ ](?:how|what|everything))?
        | (?:(?:list|walk[ ]me[ ]through|tell[ ]me|give[ ]me)[ ])?the[ ]order[ ]in[ ]which
        | (?:did[ ](?:I|we)[ ](?:{WE_SAY})|(?:have[ ](?:I|we)|(?:I|we)(?:['\u2019]ve|[ ]have)?)[ ](?:{WE_SAID}))
          (?:[ ](?:(?:the|different|various|several|all)[ ])*(?:aspects|parts|topics|things|points)[ ]of)?
        | over[ ]time
    )\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""How a question speaks of the conversation itself, or of the form that its answer is to have: no passage says that."""
OBSERVATION, ACTION = re.compile(r"\s*observation\s*:", re.IGNORECASE), re.compile(r"\baction\s*:", re.IGNORECASE)
"""How ReAct agents (arXiv 2210.03629) write a tool's result, as a user's message, and the call before it."""


class Query(NamedTuple):
    """A text to search messages for.

    skipped: the newest of them that are not searched: an earlier question would find itself.
    """

    text: str
    skipped: int = 0


def asked_at(messages: Sequence[Message]) -> int:
    """Return the index of the message that is answered: the last or, behind a tool's result, the user's before it."""
    last = len(messages) - 1
    if not _is_result(messages, last):
        return last
    users = (at for at in range(last, -1, -1) if messages[at]["role"] == "user" and not _is_result(messages, at))
    return next(users, last)


def question_start(text: str) -> int:
    """Return where a prompt begins to ask.

    That is at its last line that says so ("Question: ..."), if no more than a few lines stand behind it; else at its
    last non-empty line, or at one before it that asks if it says how to answer, or where the answer goes ("Answer:").
    """
    text = text.rstrip()
    if found := _label(text):
        return found.start()
    start = text.rfind("\n") + 1
    if not text[:start].strip():
        return start
    before = text[:start].rstrip().rfind("\n") + 1
    says_where = text.endswith(":") and len(text[start:].split()) <= MAX_LABEL_WORDS
    says_how = is_about_answer(text[start:]) and _asks(text[before:start])
    return before if says_where or says_how else start


def find_question(text: str) -> str:
    """Return what a prompt asks, with what stands behind it."""
    return text[question_start(text) :].rstrip()


def search_text(message: str) -> str:
    """Return what a message asks, without its label and without sentences that say how to answer.

    Where no question is left, or nothing to search for, it is the whole message.
    """
    found = _label(message.rstrip())
    text = re.split(r"\n\s*\n", message[found.end() :].strip(), maxsplit=1)[0] if found else message
    kept = [piece for piece in pieces(text, PIECE_END) if not is_about_answer(piece)]
    question = "".join(kept).strip()
    return question if (found or any(map(_asks, kept))) and query_terms(question) else message


def refers_back(question: str) -> bool:
    """Return whether a text asks about something that it does not name ("When was she born?", "Why?")."""
    stands_alone = NAME.search(question) or (query_terms(question) and not REFERS_BACK.search(question))
    return _holds_question(question) and not stands_alone


def queries(messages: Sequence[Message], question: str) -> list[Query]:
    """Return what to search for: a question, and where it is a follow-up, it behind the one that it refers to.

    messages: those before it, of which the users' are looked at.
    """
    found = [Query(question)]
    if refers_back(question):
        users = ((at, each["content"]) for at, each in enumerate(reversed(messages), 1) if each["role"] == "user")
        for skipped, content in islice(users, MAX_STEPS_BACK):
            earlier = search_text(find_question(content[-MAX_LETTERS_BEFORE:]))
            if _holds_question(earlier) and not refers_back(earlier):
                short = count_words(earlier) <= MAX_WORDS_BEFORE
                return [*found, Query(f"{earlier} {question}", skipped)] if short else found
    return found


def is_about_answer(sentence: str) -> bool:
    """Return whether a sentence says how to answer, and nothing of what is asked."""
    if _asks(sentence):
        return False
    return bool(ABOUT_FORM.match(sentence) or (ABOUT_ANSWER.search(sentence) and not NAME.search(sentence)))


def question_parts(question: str) -> list[str]:
    """Return the parts of a question that asks several things, each to be searched for; [] for a single one."""
    parts: list[str] = []
    for part in re.split(PART_END, question, flags=re.IGNORECASE):
        compared = re.search(COMPARED, part, re.IGNORECASE)
        parts += compared.groups() if compared else [part]
    parts = [part.strip() for part in parts if count_words(part) >= MIN_PART_WORDS]
    return parts if len(parts) > 1 else []


def asks_for_list(question: str) -> bool:
    """Return whether a question asks for several things, or for their order."""
    return bool(LIST.search(question) or ORDER.search(question))


def subject(question: str) -> str:
    """Return what a question is about: without how it speaks of the conversation, or of the form of its answer.

    Where nothing to search for is left, it is the whole question.
    """
    text = " ".join(FRAMING.sub(" ", question).split())
    return text if query_terms(text) else question


def _is_result(messages: Sequence[Message], at: int) -> bool:
    """Return whether a message is the result of a tool."""
    role, content = messages[at]["role"], messages[at]["content"]
    if role == "user" and at and OBSERVATION.match(content):
        return bool(ACTION.search(messages[at - 1]["content"]))
    return bool(role == "tool")


def _holds_question(text: str) -> bool:
    return any(map(_asks, pieces(text, PIECE_END)))


def _asks(sentence: str) -> bool:
    """Return whether a sentence is a question by its end or its beginning."""
    ends = sentence.rstrip(" \t\n\"'”)*_").endswith(("?", "\uff1f", "\u061f"))
    return ends or bool(re.match(rf"\s*(?!do not\b)(?:{ASKING}|{REQUEST})", sentence, re.IGNORECASE))


def _label(text: str) -> re.Match[str] | None:
    """Return the last label that a question follows, if no more than a few short lines stand behind that."""
    for found in reversed(list(LABEL.finditer(text))):
        behind = [line for line in text[found.end() :].split("\n") if line.strip()]
        if behind:
            few, others = len(behind) <= 1 + MAX_LINES_BEHIND, " ".join(behind[1:])
            return found if few and count_words(others) <= MAX_WORDS_BEHIND else None
    return None
