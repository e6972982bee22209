"""What a user says about every answer is repeated before a question that does not repeat it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from tests.support.chat import dialogue
from tests.support.templates import template
from tests.support.token_vectors import made_up_vectors
from zsmerge_llm.retrieval.passage_search import PassageSearch
from zsmerge_llm.retrieval.standing_instructions import MAX_MESSAGE_WORDS, find_statements
from zsmerge_llm.retrieval.terms import query_terms
from zsmerge_llm.retrieval.token_vectors import TokenVectors
from zsmerge_llm.retrieval.user_statements import UserStatements, relevance

PREFERENCE = "I strongly dislike superhero comic books."
FILLER = "Rain fell on the quiet village all day long."
QUESTION = "Can you suggest a good present?"


@pytest.mark.parametrize(
    "statement",
    [
        PREFERENCE,
        "Always include version numbers when I ask about software.",
        "I can't stand modern country music.",
        "I cannot stand heavy metal.",
        "I only read books by German authors.",
        "I have a strong preference for vegan skincare.",
        "I'm not a fan of streaming services.",
        "I am not a big fan of streaming services.",
        "From now on, answer in French.",
        "I prefer not to read English books.",
        "I will only use devices without a camera.",
        "I strictly follow a raw vegan diet.",
        "I'm deeply uncomfortable with flying.",
        "I've always hated long queues.",
        "I find crowded museums exhausting.",
        "I have very sensitive skin.",
        "I'm a lifelong pescatarian.",
        "I steer clear of anything with an engine.",
        "I insist on paper tickets.",
        "Gambling of any kind makes me nervous.",
        "Mainstream fashion doesn't interest me.",
        "A quiet room is essential for me.",
    ],
)
def test_what_users_say_about_every_answer_is_recognized(statement: str) -> None:
    assert find_statements(f"Hello there. {statement} What is new?") == [statement]


@pytest.mark.parametrize(
    "text",
    [
        "I would love to know the time.",
        "I have never been to Rome.",
        "I only have two days left.",
        "I never finished that book.",
        "I'm against the clock here, can you hurry?",
        "I find this task rather interesting.",
        "I have sensitive data in two tables.",
        "I have been looking at this for hours.",
        "I'm interested in learning more about the sea.",
        "What do you prefer?",
        f"{FILLER} " * MAX_MESSAGE_WORDS + PREFERENCE,
    ],
)
def test_other_sentences_and_long_texts_are_not(text: str) -> None:
    assert find_statements(text) == []


def test_of_a_long_sentence_the_clause_that_says_it_is_taken() -> None:
    rest = ", and I have done this and that in the project of which I told you before" * 3
    assert find_statements(f"I am trying to keep my app small, so I prefer few, simple dependencies{rest}.") == [
        "so I prefer few, simple dependencies,"
    ]


def relevant_to(question: str, vectors: TokenVectors | None = None) -> Callable[[Sequence[str]], list[float]]:
    return lambda statements: relevance(statements, query_terms(question), question, vectors)


def test_those_that_share_words_with_the_question_come_first_then_the_newest() -> None:
    chat = dialogue("I love rain.", "I see.", "I avoid sugar.", "I see.", "I avoid bread.", "I love snow.")
    standing, room = UserStatements(find_statements), iter([True, True, False])
    found = standing.select(chat, relevant_to("Where is it raining? I want rain."), lambda _: next(room))
    assert found == ["I love rain.", "I avoid bread."], "what an assistant says does not count"
    assert standing.select(chat[:1], relevant_to("?"), lambda _: True) == ["I love rain."]


def test_those_that_say_like_things_in_other_words_come_first_too() -> None:
    chat = dialogue("I avoid any port.", "I see.", "I avoid the rain.", "I see.", "I avoid fresh bread.")
    question = "Which harbour is near, and what does the market sell?"
    for vectors, first in ((None, "I avoid fresh bread."), (made_up_vectors(), "I avoid any port.")):
        fits, statements = map(int, "100").__next__, UserStatements(find_statements)
        assert statements.select(chat, relevant_to(question, vectors), lambda _, fits=fits: fits()) == [first]


def test_a_preference_stands_before_a_later_question_unless_it_is_near() -> None:
    search = PassageSearch(template("smollm2"), 256)
    chat = [*dialogue(PREFERENCE, "I see.", FILLER, "Yes."), *dialogue(QUESTION)]
    assert search.augment(chat, slots=1000)[-1]["content"] == f"{PREFERENCE}\n\n{QUESTION}"
    near = search.template.encode(f"... {PREFERENCE} I see.")
    assert search.augment(chat, slots=1000, recent_ids=near) == chat
