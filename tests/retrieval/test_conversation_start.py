"""A question about how a conversation began comes behind its first message."""

from __future__ import annotations

import pytest

from tests.support.chat import dialogue
from tests.support.templates import template
from zsmerge_llm.retrieval.conversation_start import INTRODUCTION, start_block
from zsmerge_llm.retrieval.passage_search import PassageSearch
from zsmerge_llm.types import Message

FIRST = "Which bridge over the river is the oldest?"
CHAT = dialogue(FIRST, "The stone bridge.", *["Rain fell on the quiet village.", "Yes, it did."] * 5)


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    "question",
    [
        "What was the first thing I asked you?",
        "What was my first question?",
        "What did I ask first?",
        "Do you remember the very first message that I wrote?",
        "How did our conversation start?",
        "What did this chat begin with?",
        "What was the first topic we discussed?",
    ],
)
def test_a_question_about_the_beginning_is_recognized(question: str) -> None:
    assert start_block(question, CHAT, count, 100) == f"{INTRODUCTION}\n\n{FIRST}\n\n"


@pytest.mark.parametrize(
    "question",
    ["What is the first name of the captain?", "Who came first?", "What is the first thing to check?", "And now?"],
)
def test_a_question_for_another_first_thing_is_not(question: str) -> None:
    assert start_block(question, CHAT, count, 100) == ""


def test_of_a_long_first_message_its_beginning_is_repeated() -> None:
    long = dialogue("I have a bridge. It is made of stone. " * 40, "I see.")
    found = start_block("What was my first question?", long, count, 30)
    assert found.startswith(f"{INTRODUCTION}\n\nI have a bridge. It is made of stone. I have")
    assert count(found) <= 30
    assert start_block("What was my first question?", long, count, 8) == ""
    assert start_block("What was my first question?", [], count, 100) == ""


def test_it_stands_before_the_question_once_the_conversation_is_longer_than_its_cache() -> None:
    question: Message = {"role": "user", "content": "What was my first question?"}
    search = PassageSearch(template("smollm2"), 256)
    asked = search.augment([*CHAT, question], slots=1000)[-1]["content"]
    assert asked == f"{INTRODUCTION}\n\n{FIRST}\n\n{question['content']}"
    about_document = search.augment([*CHAT, question], slots=1000, document_length=10)[-1]["content"]
    assert INTRODUCTION not in about_document
