"""Answers never repeat what was added to the prompt, however they are cut into pieces; quotations of callers stay."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsmerge_llm.language.output_format import FIRST_RESULT_INSTRUCTION, LATER_RESULT_INSTRUCTION
from zsmerge_llm.language.prompt_echo import AddedTexts, EchoFilter
from zsmerge_llm.retrieval.passage_search import INTRODUCTION

NOTES = (FIRST_RESULT_INSTRUCTION, LATER_RESULT_INSTRUCTION, INTRODUCTION)
ADDED = AddedTexts(NOTES)


def passed_on(pieces: list[str], added: AddedTexts = ADDED) -> tuple[list[str], str]:
    """Return the text that a filter lets through, piece by piece, and the first word of the echo that it found."""
    echoes = EchoFilter(added)
    return [*map(echoes.push, pieces), echoes.finish()], echoes.echoed


@pytest.mark.parametrize("note", NOTES)
@pytest.mark.parametrize("form", ["{}", '"{}"', "  {}\n\nMore.", "**{}**", "- {}"])
def test_an_answer_that_is_or_begins_with_an_added_text_is_dropped_before_any_of_it_is_shown(
    note: str, form: str
) -> None:
    for said in (note, note.lower(), note.replace(",", " ;"), note.replace(" ", "\n"), note.rstrip(".") + "!"):
        text = form.format(said)
        for pieces in (list(text), [text], re.findall(r"\S+\s*|\s+", text)):
            shown, echoed = passed_on(pieces)
            assert "".join(shown) == ""
            assert echoed == note.split()[0].lower()


def test_an_answer_that_goes_on_with_an_added_text_ends_before_it() -> None:
    for text in ("It is 14:35.", "14:35"):
        for pieces in (list(f"{text}\n\n{FIRST_RESULT_INSTRUCTION}"), [text, f"\n\n{FIRST_RESULT_INSTRUCTION}"]):
            shown, echoed = passed_on(pieces)
            assert "".join(shown) == text
            assert echoed == "answer"


@pytest.mark.parametrize("before", ["", "It rains."])
def test_a_tag_around_tool_results_is_never_part_of_an_answer(before: str) -> None:
    added = AddedTexts(NOTES, tags=("<tool_response>",))
    text = f"{before}\n<tool_response>\nrain in Oslo\n</tool_response>"
    for pieces in (list(text), [text], re.findall(r"\w+|\W+", text)):
        shown, echoed = passed_on(pieces, added)
        assert "".join(shown) == before
        assert echoed == "tool_response"
    assert "".join(passed_on(["A tool_", "responses table"], added)[0]) == "A tool_responses table"
    quoted = AddedTexts(NOTES, ("<tool_response>",), [{"role": "user", "content": "What does <tool_response> mean?"}])
    assert "".join(passed_on(["<tool_response>", " is a tag"], quoted)[0]) == "<tool_response> is a tag"


def test_an_echo_that_is_cut_short_is_one_from_four_words_on() -> None:
    assert passed_on(["Answer the question in"]) == (["", ""], "answer")
    assert passed_on(["Answer the question"]) == (["", "Answer the question"], "")


@pytest.mark.parametrize(
    "text",
    [
        "The weather is fine.",
        "Answer the question in your own words.",
        "Now answer me: is it warm?",
        "Remember this part: water boils at 100 degrees.",
        "Answers the question in a full sentence.",
        "...",
        "",
        "  \n",
        "42",
    ],
)
def test_other_answers_pass_unchanged(text: str) -> None:
    shown, echoed = passed_on(list(text))
    assert "".join(shown) == text
    assert echoed == ""


def test_what_a_caller_wrote_is_a_quotation() -> None:
    quoted = AddedTexts(NOTES, messages=[{"role": "user", "content": f"Translate: {FIRST_RESULT_INSTRUCTION}"}])
    assert "".join(passed_on(list(FIRST_RESULT_INSTRUCTION), quoted)[0]) == FIRST_RESULT_INSTRUCTION
    assert passed_on([INTRODUCTION], quoted)[1] == "remember"
    document = ADDED.plus(document=f"He said: {INTRODUCTION} x")
    assert "".join(passed_on([INTRODUCTION], document)[0]) == INTRODUCTION


@given(st.lists(st.sampled_from([*"Answer the question in a full", " ", "\n", ".", "Answer ", "the "]), max_size=30))
def test_any_text_without_an_echo_passes_unchanged_in_any_pieces(pieces: list[str]) -> None:
    shown, echoed = passed_on(pieces)
    if not echoed:
        assert "".join(shown) == "".join(pieces)
    else:
        assert "".join(pieces).startswith("".join(shown))
