"""Notes about the sections of a document, for questions about all of it: summaries, lists, counts, orders.

No passage has the answer to such a question, and a cache of a fixed size holds little of each part. So a model may
write a note about each section while it reads (`generation.document_reading`), and a question about the whole gets them
in front of it, in the text's order, beside the passages that are looked up. Questions about a fact do not.

Such questions are recognized by their words. English only: elsewhere nothing is recognized.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from zsmerge_llm.retrieval.questions import ORDER

DEFAULT_INSTRUCTION = "What happens in this part? Give the names, the places, the things and the numbers."
"""What a note is about, where nobody says it."""
INTRODUCTION = "Notes that were taken while the text was read, in its order:"
BUDGET_SHARE = 2
"""All notes of a document take one in so many of the slots at most."""
NOTES_OF_BUDGET = 4
"""Notes of the greatest length that fit into the budget."""
SECTION_TOKENS = 256
"""Tokens of a section at most: of longer ones, small models tell less (docs/research/retrieval)."""
MAX_NOTE_TOKENS = 64
"""Tokens of a note at most."""
WHOLE = re.compile(
    r"""
    \b(?: summar(?:y|ies|i[sz]\w*) | overview | outline | gist | recap | overall | altogether | throughout
        | in\ total
        | how\ (?:many|often) | number\ of | count
        | list | enumerate | every(?:one|body|thing)? | each
        | all\ (?:of\ )?(?:the|that|those|who)\b | all\ \w+\ (?:that|which|who|in|of)\b | name\ all | who\ are\ the
        | main\ (?:\w+\ )?(?:points?|topics?|ideas?|themes?|events?)
        | what\ (?:is|are)\ (?:the\ |this\ |these\ )*(?:text|document|book|story|report|articles?)\ (?:\w+\ )?about
    )\b
    """,
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class SectionNotes:
    """Notes about a document, in its order.

    Attributes:
        instruction: what they were to be about.
        texts: none where the whole document fits into the cache.
    """

    instruction: str
    texts: tuple[str, ...] = ()

    def as_block(self) -> str:
        """Return the notes as they stand before a question; "" for none."""
        return "\n".join([INTRODUCTION, *self.texts, "", ""]) if self.texts else ""


@dataclass(frozen=True)
class NoteBudget:
    """How many tokens notes take in a cache of so many slots.

    Attributes:
        section_tokens: tokens of the text that a note is about.
        note_tokens: of a note, at most. total: of all notes of a document, with their introduction.
    """

    section_tokens: int
    note_tokens: int
    total: int

    @classmethod
    def of(cls, slots: int) -> NoteBudget:
        """Return the budget for a cache. It has to hold a section whole, with the request for its note."""
        total = slots // BUDGET_SHARE
        return cls(
            max(1, min(SECTION_TOKENS, slots // 2)), max(1, min(MAX_NOTE_TOKENS, total // NOTES_OF_BUDGET)), total
        )


def note_instruction(notes: str | bool) -> str | None:
    """Return what notes are to be about; None: none are wanted."""
    if isinstance(notes, bool):
        return DEFAULT_INSTRUCTION if notes else None
    return notes


def asks_about_whole(question: str) -> bool:
    """Return whether a question is about a whole text: a summary, a list, a count, an order."""
    return bool(WHOLE.search(question) or ORDER.search(question))


def notes_for(notes: SectionNotes | None, question: str) -> str:
    """Return the notes as a block in front of a question about the whole; "" for any other."""
    return notes.as_block() if notes is not None and asks_about_whole(question) else ""


def check_notes(saved: object) -> None:
    """Check what a file says of notes: {} for none. Raises ValueError, also for what is no valid Unicode."""
    if saved == {}:
        return
    if not isinstance(saved, dict) or set(saved) != {"instruction", "texts"} or type(saved["texts"]) is not list:
        raise ValueError("describes notes in other words")
    for text in (saved["instruction"], *saved["texts"]):
        if type(text) is not str:
            raise ValueError("holds no text as a note")
        text.encode()


def notes_from(saved: dict[str, object]) -> SectionNotes | None:
    """Return the notes that `check_notes` has checked."""
    texts = saved.get("texts", ())
    assert isinstance(texts, Sequence)
    return SectionNotes(str(saved["instruction"]), tuple(texts)) if saved else None
