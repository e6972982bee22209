"""Passages that hold a name or number of a question are found beside those that hold most of its words."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.chat import dialogue
from tests.support.templates import template
from zsmerge_llm.retrieval.named_passages import MAX_HAVING, MAX_STEPS, named_passages, names, numbers, quoted
from zsmerge_llm.retrieval.passage_index import PassageIndex
from zsmerge_llm.retrieval.passage_search import PassageSearch
from zsmerge_llm.retrieval.questions import Query
from zsmerge_llm.retrieval.terms import terms

LIKE = "Find out which variables were assigned what value, and write the value of the variables into the log."
FILLER = ["Rain fell on the quiet village all day long.", "Nobody in the market sold any bread that week."]
CHAIN = ["ODYAL", "UFLLV", "ZYQNP", "LPYEY", "BESDY", "QWERT", "XCVBN"]


def search(lines: list[str], question: str, max_tokens: int = 600) -> str:
    """What is found for a question among lines that stand in messages of their own, between others."""
    said = [text for at, line in enumerate(lines) for text in (line, FILLER[at % 2])]
    found = PassageSearch(template("smollm2"), max_tokens).search(dialogue(*said), [Query(question)], max_tokens)
    return "\n\n".join(found)


def chain(*behind: str) -> list[str]:
    """Lines that lead from a number to one name after another."""
    links = [f"VAR {new} = VAR {old}, as it was written on that day." for old, new in itertools.pairwise(CHAIN)]
    return [LIKE, f"VAR {CHAIN[0]} = 87859, as it was written on that day.", *reversed(links), *behind]


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ("Invoice 48213 came late.", "Which of the variables were assigned the value 48213?"),
        ("Pertolin came late, and nobody was told.", "List the variables that were assigned the value of Pertolin."),
    ],
)
def test_a_passage_that_has_a_question_s_name_and_no_other_word_of_it_is_found_besides(
    line: str, question: str
) -> None:
    found = search([LIKE, line], question)
    assert LIKE in found
    assert line in found
    assert line not in search([LIKE, line], "Which of the variables were assigned the value?")


def test_names_are_followed_from_passage_to_passage_where_a_list_is_asked_for() -> None:
    found = search(chain(), "Find all variables that are assigned the value 87859.")
    assert all(f"VAR {name} =" in found for name in CHAIN[:MAX_STEPS])
    assert f"VAR {CHAIN[MAX_STEPS]} =" not in found
    assert f"VAR {CHAIN[1]} =" not in search(chain(), "Which of the variables is assigned the value 87859?")


def test_a_chain_goes_on_where_one_passage_has_two_links_of_it() -> None:
    links = [f"VAR {new} = VAR {old}, as it was written." for old, new in itertools.pairwise(CHAIN)]
    joined = [f"{first} {second}" for first, second in zip(links[::2], links[1::2], strict=True)]
    lines = [LIKE, *reversed(joined), f"VAR {CHAIN[0]} = 87859."]
    found = search(lines, "Find all variables that are assigned the value 87859.")
    assert all(f"VAR {name} =" in found for name in CHAIN[:MAX_STEPS])


def test_what_only_shares_words_with_a_question_is_left_out_where_its_identifier_leads_somewhere() -> None:
    question = "Find all variables that are assigned the value 87859."
    found = search(chain(), question)
    assert LIKE not in found
    assert all(f"VAR {name} =" in found for name in CHAIN[:MAX_STEPS])
    many = [f"The log of number 87859 was read {each} times, they say." for each in range(MAX_HAVING)]
    assert LIKE in search(chain(*many), f"{question} Boris asks."), "a name leads somewhere, and the number does not"


def test_a_name_that_many_passages_have_leads_nowhere() -> None:
    many = [f"The log of number 87859 was read {each} times, they say." for each in range(MAX_HAVING)]
    assert f"VAR {CHAIN[0]} =" not in search(chain(*many), "Find all variables that are assigned the value 87859.")


def test_a_quoted_word_is_found_beside_what_shares_more_words_with_the_question() -> None:
    draw = Random(0)
    strings = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=24)) for _ in range(40)]
    lines = ["Remember this list of strings. I will ask which string of the list begins and ends how.", *strings]
    for asked in (strings[3], strings[30]):
        for form in (
            '"{}" and ends with "{}"',
            "\u201c{}\u201d and ends with \u201c{}\u201d",
            "\u201e{}\u201c and \u201e{}\u201c",
        ):
            question = f"Which string of the list begins with {form.format(asked[:6], asked[-6:])}?"
            assert asked in search(["\n".join(lines)], question, 300)


def test_words_are_quoted_in_the_marks_of_several_languages_and_within_a_line() -> None:
    assert quoted('the "old tower", \u00abla tour\u00bb and \u201eder Turm\u201c') == {
        "old",
        "tower",
        "tour",
        "der",
        "turm",
    }
    assert quoted("It is 5\" wide\nand 7\" high; don't say 'x'.") == set()


def test_a_name_alone_finds_nothing_for_a_question_about_another_text() -> None:
    assert search(chain(), "How far did the expedition of 87859 men travel across the southern desert?") == ""


def test_neither_the_newest_messages_that_are_skipped_nor_later_ones_are_found() -> None:
    index = PassageIndex()
    chat = dialogue("The value of Pertolin.", "I see.", "Which value of Pertolin?", "Ninety.")
    _, passages = index.find(chat, [])
    index.find([*chat, *dialogue("Pertolin, again.")], [])  # another thread goes on
    assert list(named_passages(index, passages, Query("List all of Pertolin."), [7])) == [0, 1]
    assert list(named_passages(index, passages, Query("List all of Pertolin.", skipped=2), [7])) == [0]


@given(st.text(max_size=60))
def test_any_text_has_names_that_are_terms_of_it(text: str) -> None:
    assert {name for name in names(text) if name.isascii()} <= {*terms(text)}


def test_names_are_capitals_within_a_sentence_words_of_capitals_and_numbers() -> None:
    assert names("When did Boris read the INV-2023 of 1851 to him?") == {*terms("Boris"), "inv", "2023", "1851"}
    assert names("VAR is in the 3 files") == {"var"}
    assert names("Where is it?") == set()
    assert numbers("When did Boris read the INV-2023 of 1851 in 3 files?") == {"2023", "1851"}
