"""What users say of themselves is repeated before a question about it that no search can answer."""

from __future__ import annotations

import pytest

from tests.support.chat import dialogue
from tests.support.templates import template
from zsmerge_llm.retrieval.passage_search import PassageSearch
from zsmerge_llm.retrieval.personal_facts import (
    MAX_MESSAGE_WORDS,
    asked_about,
    asks_about_self,
    asks_what_was_said,
    find_facts,
)
from zsmerge_llm.types import Message

FILLER = "Rain fell on the quiet village all day long."


@pytest.mark.parametrize(
    "question",
    [
        "What is my name?",
        "Who am I?",
        "Where do I live?",
        "How old am I?",
        "Do you remember my name?",
        "Hi, can you tell me where I work?",
        "When does my flight leave?",
        "Am I married?",
    ],
)
def test_a_short_question_in_the_first_person_asks_for_what_its_user_has_said(question: str) -> None:
    assert asks_about_self(question)


@pytest.mark.parametrize(
    "question",
    [
        "What is the capital of Norway?",
        "How do I install it?",
        "What should I cook?",
        "Which car can I buy?",
        "Can you recommend a book for me?",
        "What is my best way to Rome?",
        "I live in Bergen.",
        "How many user roles and security features did I want in the portal?",
        "What do you think of my plan?",
        "What was my first question?",
        "Tell me about Norway.",
    ],
)
def test_one_for_advice_or_about_anything_else_does_not_nor_does_one_that_a_search_can_answer(question: str) -> None:
    assert not asks_about_self(question)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("How long did I say the entire project is expected to take?", True),
        ("How did you recommend managing the flow of requests?", True),
        ("Which hotel was it that you've suggested?", True),
        ("Remind me, when does the train leave?", True),
        ("What came up about taxes in our discussion?", True),
        ("Have I obtained a key for this service?", True),
        ("What is the total cost of renovating my kitchen?", True),
        ("What is the capital of Norway?", False),
        ("How should I organize the different parts of a page?", False),
        ("Could you show me how to write a login form?", False),
        ("Tell me about the Vikings.", False),
        ("Did the captain say when they will leave?", False),
    ],
)
def test_what_the_user_or_the_model_has_said_or_done_stands_in_the_conversation(question: str, expected: bool) -> None:
    assert asks_what_was_said(question) == expected


def test_a_question_for_what_was_said_finds_it_in_other_words() -> None:
    plan = "The project is estimated to take three sprints of two weeks each."
    messages = chat(plan, "The harbour is deep.", "Lisbon has seven hills.")
    assert plan in augmented(messages, "How long did I say the entire renovation project is expected to last?")
    other = "How long is the entire renovation project of Stockholm castle expected to last?"
    assert augmented(messages, other) == other


def test_what_it_is_about_are_its_content_words_or_what_is_meant() -> None:
    assert asked_about("Which car do I have?") == "car"
    assert asked_about("Who am I?") == "name"
    assert asked_about("What am I called?") == "name called"
    assert asked_about("Hi, can you tell me what I do for a living?").startswith("work job")
    assert asked_about("When is my wife's birthday?") == "born birthday wife birthday"
    assert asked_about("Am I?") == "Am I?"


def test_facts_are_statements_in_the_first_person() -> None:
    text = (
        "Hi! I'm Lena, a nurse. My dog is old. Our car, a Volvo, is red! Tom is tall. Do I know you? I think so. I am."
    )
    assert find_facts(text) == ["I'm Lena, a nurse.", "My dog is old.", "Our car, a Volvo, is red!"]
    assert find_facts("Please call me Max. Call the harbour!") == ["Please call me Max."]
    assert find_facts("I guess that it rains.") == find_facts("I'd like you to read this.") == []
    assert find_facts(f"I live in Bergen. {FILLER * MAX_MESSAGE_WORDS}") == []


def chat(*facts: str) -> list[Message]:
    said = [text for fact in facts for text in (fact, "I see.")]
    return dialogue(*said, *[FILLER, "Yes, it did."] * 5)


def augmented(messages: list[Message], question: str) -> str:
    search = PassageSearch(template("smollm2"), 256)
    return str(search.augment([*messages, *dialogue(question)], slots=1000)[-1]["content"])


def test_a_question_about_its_user_comes_behind_the_facts_that_it_asks_for() -> None:
    messages = chat("My name is Lena.", "I drive a red car.", "I live in Bergen.")
    assert augmented(messages, "What is my name?") == "My name is Lena.\n\nWhat is my name?"
    assert "Lena" not in augmented(messages, "Which car do I have?")


def test_of_facts_that_contradict_each_other_the_newest_stands_last() -> None:
    messages = chat("My name is Lena.", "I drive a red car.", "My name is Anna now.")
    assert augmented(messages, "What is my name?").startswith("My name is Lena.\nMy name is Anna now.\n\n")


def test_a_question_about_something_else_comes_without_them() -> None:
    messages = chat("My name is Lena.", "I live in Bergen.")
    assert augmented(messages, "What is the capital of Norway?") == "What is the capital of Norway?"
