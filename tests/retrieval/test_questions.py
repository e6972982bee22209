"""What a message asks is found in the forms that frameworks and users put around it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chat import dialogue
from zsmerge_llm.retrieval.questions import (
    Query,
    find_question,
    queries,
    question_parts,
    question_start,
    search_text,
    subject,
)
from zsmerge_llm.retrieval.terms import query_terms

QUESTION = "Which medicine did the physician prescribe for the cough?"
LANGCHAIN = (
    "Use the context above to answer the question. If you don't know the answer, just say that you don't know, don't "
    "try to make up an answer. Keep the answer as concise as possible.\n\nQuestion: {}\n\nHelpful Answer:"
)
LLAMAINDEX = "Given the context information and not prior knowledge, answer the query.\nQuery: {}\nAnswer: "
FORMS = [
    "{}",
    LANGCHAIN,
    LLAMAINDEX,
    "Answer the question based on the documents. Do not output any other words.\n\n**Question:** {}",
    "User question: {}\nAnswer in one sentence.\nDo not output a list.",
    "Q1: Who is it?\nA1: Anna.\n\nQ2: {}\nA2:",
    "Answer in one short sentence: {}",
    "{} Answer with the name only.",
    "{}\nReply with nothing but the name.",
    "You are a careful research assistant.\n\n{}",
    "I have a question about the document. {} Thanks in advance!",
]
ASKS = ["who got the first prize in physics", "Summarize the chapter on whales.", "Why?", "谁写的这本书"]


@pytest.mark.parametrize("form", FORMS)
def test_instructions_and_labels_around_a_question_are_not_searched_for(form: str) -> None:
    assert search_text(form.format(QUESTION)).removesuffix("\nA2:") == QUESTION


@pytest.mark.parametrize("text", ASKS)
def test_a_question_without_a_mark_is_found_by_its_label(text: str) -> None:
    assert search_text(LLAMAINDEX.format(f"{text} of 1917")) == f"{text} of 1917"
    assert search_text(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "My landlord does not return the deposit. Which law applies?",
        "Tell me about the medicine Pertolin. Which side effects are known?",
        "What is the answer to the third question of the exam?",
        "Answer my question about John Smith.",
        "Keep it short. Explain in two sentences what whales eat.",
        "Thanks a lot!",
        "Question: Why?",
        "Question:",
        "",
    ],
)
def test_what_a_question_may_be_about_stays(text: str) -> None:
    assert search_text(text) == text


@pytest.mark.parametrize(
    ("question", "about"),
    [
        ("Summarize how my garden has changed over time.", "garden changed"),
        ("Can you give me a short summary of how I fixed the boiler across our conversations?", "fixed boiler"),
        ("When did we talk about roofs and drains in this chat?", "roofs drains"),
        ("List the order in which I brought up different aspects of the wedding.", "wedding"),
        ("How much did I say the tiles cost?", "tiles cost"),
    ],
)
def test_how_a_question_speaks_of_the_conversation_is_not_searched_for(question: str, about: str) -> None:
    assert query_terms(subject(question)) == query_terms(about)


@pytest.mark.parametrize(
    "question",
    [
        "What did we talk about?",
        "Summarize our conversation.",
        "Who gave the order that began the siege?",
        "What did the captain say of the storm?",
        "Which chats does the law cover?",
    ],
)
def test_where_it_is_all_that_a_question_has_or_about_something_else_it_stays(question: str) -> None:
    assert subject(question) == question


def test_a_sentence_that_says_how_long_an_answer_is_to_be_is_not_searched_for() -> None:
    question = "Which towns did the caravan reach?"
    for form in ("{} Mention ONLY five items.", "{} Please keep it to two sentences.", "{}\nUse bullet points."):
        assert search_text(form.format(question)) == question


def test_a_prompt_asks_in_its_last_line_or_the_line_that_is_marked_as_its_question() -> None:
    text = "The doctor came.\n\nLena coughed."
    assert find_question(f"{text}\n\n{QUESTION}") == QUESTION
    assert find_question(f"{text}\n\nQuestion: {QUESTION}\n\nHelpful Answer:").startswith(f"Question: {QUESTION}")
    assert find_question(f"{text}\n\n{QUESTION}\nAnswer:") == f"{QUESTION}\nAnswer:"
    solved = f"Question: Who coughed? Answer: Lena.\nNow another text.\n{text * 30}"
    assert find_question(f"{solved}\n{QUESTION}") == QUESTION  # so much behind a label is a text of its own
    assert find_question(f"{text}\n\n{QUESTION}\nPlease answer in one word.").startswith(QUESTION)
    assert find_question(f"{text}\n\nAnswer in one word.") == "Answer in one word."


def test_questions_that_a_document_holds_are_not_what_is_asked() -> None:
    lines = "\n".join(f"Question: What is {number}?\nAnswer: {number}." for number in range(9))
    assert find_question(f"{lines}\n\nA line.\nAnother line.\nSummarize this.") == "Summarize this."


@given(st.text(alphabet="aQ:?.!\n Answer1谁\uff1f", max_size=80) | st.sampled_from([*ASKS, *FORMS]))
def test_any_message_has_a_question_that_stands_in_it(text: str) -> None:
    assert 0 <= question_start(text) <= len(text)
    assert search_text(text) == text or search_text(text).strip()


FIRST = "Who was the keeper of the lighthouse?"


@pytest.mark.parametrize(
    "follow_up", ["When did he leave it?", "And in which year was that?", "Why?", "What about her son?"]
)
def test_a_follow_up_is_searched_for_behind_the_question_that_it_refers_to(follow_up: str) -> None:
    chat = dialogue(FIRST, "Anna.", "Thanks!", "You are welcome.", "How long was she there?", "Ten years.")
    assert queries(chat, follow_up) == [Query(follow_up), Query(f"{FIRST} {follow_up}", skipped=len(chat))]
    assert queries(chat[:2], follow_up)[1].skipped == 2
    assert queries([], follow_up) == queries(dialogue("It rained.", "I see."), follow_up) == [Query(follow_up)]


@pytest.mark.parametrize(
    "question",
    ["When was the harbour opened?", "When did Boris lose his hat?", "Thank you, it was a great help.", "And so on."],
)
def test_what_names_its_subject_or_asks_nothing_is_no_follow_up(question: str) -> None:
    assert queries(dialogue(FIRST, "Anna."), question) == [Query(question)]


def test_the_end_of_a_long_message_is_all_that_is_looked_at_for_an_earlier_question() -> None:
    long = "word " * 50
    assert queries(dialogue(f"{long}\n\n{FIRST}", "Anna."), "Why?")[1].text == f"{FIRST} Why?"
    assert queries(dialogue(f"{long}{FIRST}", "Anna."), "Why?") == [Query("Why?")]


def test_a_question_of_several_parts_is_searched_part_by_part() -> None:
    assert question_parts("Who built the tower, and when was the harbour opened?") == [
        "Who built the tower",
        "when was the harbour opened",
    ]
    assert question_parts("How many days passed between the first storm and the last one?") == [
        "the first storm",
        "the last one",
    ]
    assert question_parts("Who built the old tower?") == question_parts("Do they sell bread and butter?") == []
