"""Notes about the sections of a document: written while it is read, kept with it, given to questions about it all."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tests.support.chat import SHORT, SMALL_CACHE, Chat, equal_caches, make_llm, record_passes
from tests.support.scripted_model import scripted_answers
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.engine.scheduling import Cancelled
from zsmerge_llm.errors import InputError
from zsmerge_llm.generation.document_reading import CONDENSE_REQUEST, NOTE_REQUEST
from zsmerge_llm.retrieval.section_notes import DEFAULT_INSTRUCTION, INTRODUCTION, NoteBudget

CACHE = CacheConfig(slots=256, recent=16, stage=16, observation_window=8)
TEXT = "\n\n".join(f"On day {day} the ship Marigold reached harbour {day} and took on water." for day in range(22))
WHOLE, FACT = "List all the harbours.", "Which ship took on water?"
NOTE = "The Marigold sails."


@pytest.fixture
def llm() -> LLM:
    return make_llm(cache=CACHE)


def prompt_of(llm: LLM, name: str) -> str:
    return str(llm.tokenizer.decode(llm.session(name).tokens))


def test_each_section_has_a_note_in_the_order_of_the_text(llm: LLM) -> None:
    with scripted_answers(llm, *(f"{number}." for number in range(100))):
        document = llm.read_document(text=TEXT[:1200], notes="names")
    sections = -(-len(document.tokens) // NoteBudget.of(256).section_tokens)
    assert document.notes is not None
    assert document.notes.texts == tuple(f"{number}." for number in range(sections))
    assert (document.notes.instruction, sections > 2) == ("names", True)


def test_a_question_about_the_whole_gets_the_notes_and_one_about_a_fact_does_not(llm: LLM) -> None:
    with scripted_answers(llm, NOTE):
        document = llm.read_document(text=TEXT, name="log", notes=True)
    assert document.notes is not None
    assert document.notes.instruction == DEFAULT_INSTRUCTION
    whole = llm.chat(WHOLE, session=document.fork("whole"), sampling=SHORT)
    fact = llm.chat(FACT, session=document.fork("fact"), sampling=SHORT)

    asked = prompt_of(llm, "whole")
    assert asked.index(INTRODUCTION) < asked.index(NOTE) < asked.index(WHOLE)
    assert INTRODUCTION not in prompt_of(llm, "fact")
    assert whole.usage.retrieved_tokens >= llm.count_tokens(f"{INTRODUCTION}\n{NOTE}")
    assert fact.usage.retrieved_tokens > 0  # looked up, as without notes


def test_notes_are_given_where_the_look_up_is_off() -> None:
    llm = make_llm(cache=CACHE, retrieval_tokens=0)
    with scripted_answers(llm, NOTE):
        document = llm.read_document(text=TEXT, notes=True)
    assert llm.chat(WHOLE, session=document, sampling=SHORT).usage.retrieved_tokens > 0
    assert llm.chat(FACT, session=document, sampling=SHORT).usage.retrieved_tokens == 0


def test_later_turns_and_turns_that_are_read_again_have_them_too(llm: LLM) -> None:
    with scripted_answers(llm, NOTE):
        document = llm.read_document(text=TEXT, notes=True)
    chat = Chat(llm, document.fork("talk"))
    chat.ask(FACT)
    chat.ask(WHOLE)
    assert prompt_of(llm, "talk").count(INTRODUCTION) == 1
    chat = Chat(llm, document.fork("again"))
    chat.ask(WHOLE, reread=True)
    assert INTRODUCTION in prompt_of(llm, "again")


@pytest.mark.slow
@pytest.mark.parametrize("slots", [64, 96, 256, 400])
def test_the_notes_stay_within_their_budget_whatever_the_model_writes(slots: int) -> None:
    llm = make_llm(cache=SMALL_CACHE.replace(slots=slots))
    long = "the ship reached the harbour and took on board water " * 20
    with scripted_answers(llm, *(f"{number} {long}" for number in range(7))):
        document = llm.read_document(text=TEXT * 2, notes="names")
    assert document.notes is not None
    block = document.notes.as_block()
    assert document.notes.texts
    assert llm.count_tokens(block) <= NoteBudget.of(slots).total or len(document.notes.texts) == 1
    answer = llm.chat(WHOLE, session=document, sampling=SHORT)
    assert answer.usage.cached_tokens == len(document.tokens)


def test_notes_that_exceed_the_budget_are_condensed_into_one(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[str] = []
    render = type(llm._load().template).render

    def recorded(self: Any, messages: Any, *rest: Any, **how: Any) -> str:
        requests.append(messages[-1]["content"])
        return render(self, messages, *rest, **how)

    monkeypatch.setattr(type(llm._load().template), "render", recorded)
    with scripted_answers(llm, *(f"In harbour {number} the ship took on water and bread." for number in range(9))):
        document = llm.read_document(text=TEXT, notes="names")
    condensed = [each for each in requests if CONDENSE_REQUEST in each]
    assert sum(NOTE_REQUEST in each for each in requests) > len(document.notes.texts if document.notes else ())
    assert condensed
    assert all(each.count("took on water") > 1 for each in condensed)


def test_a_text_that_fits_has_no_notes_and_is_not_read_again_for_them(llm: LLM) -> None:
    document = llm.read_document(text="The sea is calm.", name="sea", notes="names")
    assert document.notes is not None
    assert document.notes.texts == ()
    with record_passes() as passes:
        llm.read_document(text="The sea is calm.", name="sea", notes="names")
    assert passes == []


def test_other_notes_are_written_anew_and_the_same_are_found(llm: LLM) -> None:
    with scripted_answers(llm, NOTE):
        plain = llm.read_document(text=TEXT, name="log")
        assert plain.notes is None
        first = llm.read_document(text=TEXT, name="log", notes="names")
        with record_passes() as passes:
            assert llm.read_document(text=TEXT, name="log", notes="names").notes == first.notes
            assert llm.read_document(text=TEXT, name="log").notes == first.notes
        assert passes == []
        second = llm.read_document(text=TEXT, name="log", notes="places")
    assert second.notes is not None
    assert (second.notes.instruction, llm.session("log").notes) == ("places", second.notes)


@pytest.mark.parametrize("first", [False, "harbours"])
def test_a_question_that_was_asked_with_other_notes_is_asked_anew(llm: LLM, first: bool | str) -> None:
    with scripted_answers(llm, NOTE):
        before = llm.read_document(text=TEXT, name="before", notes=first)
        llm.chat(WHOLE, session=before, sampling=SHORT)
    with scripted_answers(llm, "The Marigold rests."):
        after = llm.read_document(text=TEXT, name="after", notes="ships")
    with scripted_answers(llm, NOTE):
        anew = llm.chat(WHOLE, session=after, sampling=SHORT)
        again = llm.chat(WHOLE, session=before, sampling=SHORT)

    assert "The Marigold rests." in prompt_of(llm, anew.session)
    assert "The Marigold rests." not in prompt_of(llm, again.session)
    assert again.usage.reuse == "restored"


def test_they_are_saved_and_loaded_with_the_document_and_its_conversations(tmp_path: Path) -> None:
    llm = make_llm(cache=CACHE, sessions_dir=tmp_path / "kept")
    with scripted_answers(llm, NOTE):
        document = llm.read_document(text=TEXT, name="log", notes="names")
    Chat(llm, document.fork("talk")).ask(FACT)
    restored = llm.load_session(document.save(tmp_path / "log.zsmerge"))
    assert restored.notes == document.notes
    assert equal_caches(restored.cache, document.cache)

    other = make_llm(cache=CACHE, sessions_dir=tmp_path / "kept")
    with record_passes() as passes:
        again = other.read_document(text=TEXT, name="log", notes="names")
    assert (passes, again.notes, other.session("talk").notes) == ([], document.notes, document.notes)


def test_cancelling_stops_the_note_that_is_written_and_keeps_nothing(llm: LLM) -> None:
    cancel, reports = Event(), []

    def progress(*report: int) -> None:
        reports.append(report)
        if len(reports) == 2:
            cancel.set()

    with pytest.raises(Cancelled):
        llm.read_document(text=TEXT, name="log", notes=True, cancel=cancel, progress=progress)
    assert len(reports) == 2
    assert "log" not in llm.store


def test_progress_goes_through_the_whole_text(llm: LLM) -> None:
    reports: list[tuple[int, int]] = []
    with scripted_answers(llm, NOTE):
        document = llm.read_document(text=TEXT, notes=True, progress=lambda *each: reports.append(each))
    total = len(document.tokens)
    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert (reports[-1], {each for _, each in reports}) == ((total, total), {total})


@pytest.mark.parametrize("notes", ["", " ", 1, None, ["names"]])
def test_what_is_no_instruction_is_refused_before_anything_is_read(llm: LLM, notes: Any) -> None:
    with pytest.raises(InputError, match="notes must be what notes are to be about"):
        llm.read_document(text=TEXT, notes=notes)


def test_a_note_that_repeats_the_request_is_written_again(llm: LLM) -> None:
    with scripted_answers(llm, f"{NOTE_REQUEST} names", NOTE):
        document = llm.read_document(text=TEXT, notes="names")
    assert document.notes is not None
    assert set(document.notes.texts) == {NOTE}


def test_the_introduction_of_notes_is_no_answer(llm: LLM) -> None:
    with scripted_answers(llm, NOTE):
        document = llm.read_document(text=TEXT, notes=True)
    with scripted_answers(llm, f"{INTRODUCTION}\n{NOTE}", "Harbour 1."):
        assert llm.chat(WHOLE, session=document, sampling=SamplingParams(max_tokens=60)).text == "Harbour 1."


def test_they_are_the_same_each_time() -> None:
    """A random model writes them: greedy answers."""
    first, second = (make_llm(cache=CACHE).read_document(text=TEXT, notes=True).notes for _ in range(2))
    assert first == second
