"""What a text is found by: words in any form and script, and identifiers to their last letter."""

from __future__ import annotations

import unicodedata
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsmerge_llm.retrieval.named_passages import numbers
from zsmerge_llm.retrieval.passage_index import PassageIndex
from zsmerge_llm.retrieval.passages import split
from zsmerge_llm.retrieval.terms import count_words, query_terms, terms


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("user88@example.com", "user81@example.com"),
        ("clause 12.3", "clause 3.12"),
        ("version 2.13.4", "version 2.13.40"),
        ("at 10:16", "at 16:10"),
        ("host 10.0.12.7", "host 10.0.7.12"),
        ("load_batch_index", "load_batch_queue"),
        ("LoadBatchIndex", "LoadBatchQueue"),
        ("order 12345678", "order 12345679"),
    ],
)
def test_identifiers_are_told_apart_by_all_of_their_letters(one: str, other: str) -> None:
    assert {*query_terms(one)} - {*terms(other)}
    assert {*query_terms(other)} - {*terms(one)}


@pytest.mark.parametrize(
    ("written", "asked"),
    [("iPhone", "iphone"), ("token_limit", "token limit"), ("TokenLimit", "token limit"), ("2.13.4", "2.13"),
     ("User88", "user88"), ("__init__", "init"), ("compresses", "compressed"), ("COMPRESSED", "compress"),
     ("cats", "cat"), ("trees", "tree"), ("planes", "plane"), ("glass", "glasses")],
)  # fmt: skip
def test_other_ways_of_writing_a_word_share_a_term_with_it(written: str, asked: str) -> None:
    assert {*terms(written)} & {*query_terms(asked)}


def test_plain_words_are_found_by_their_first_letters_alone() -> None:
    assert terms("The lighthouse's keeper, naïve: 灯台 ÜBERALL") == [
        "the", "light", "s", "keepe", "naive", "灯", "台", "ubera",
    ]  # fmt: skip


def test_a_number_of_several_parts_is_one_that_names_something() -> None:
    assert numbers("Is 7.2 of user88 at 10:16 of 3 or 2026-11-03?") == {
        "7.2", "user88", "10:16", "2026", "2026-11-03", "day 11-3",
    }  # fmt: skip
    assert numbers("What is worker_12 of load_batch?") == {"worker_12"}


@pytest.mark.parametrize(
    "written", ["8 May, 2023", "on May 8", "8th of may", "MAY 8th", "2023-05-08", "2023/5/8 10:16", "am 8.5.2023"]
)
def test_a_day_is_found_in_whatever_form_it_is_written(written: str) -> None:
    day = {*terms(written)} & {*query_terms("What happened on May 8, 2023?")} - {"2023", "may", "8"}
    assert day == {*terms("8 May")} - {"may", "8"} != set()
    assert not day & {*terms("5 August 2023-08-05, 18 May, May 2023, 8 maybes, 1.8.5, version 8.5")}


@given(day=st.dates(date(1900, 1, 1), date(2100, 12, 31)))
def test_every_day_of_a_year_is_found_in_each_form(day: date) -> None:
    number, month = day.day, day.strftime("%B")
    ordinal = "th" if 10 < number < 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    forms = (
        f"{month} {number}, {day.year}",
        f"on {number} {month} {day.year}",
        f"the {number}{ordinal} of {month}",
        f"{day:%b} {number:02d}",
        f"{day:%Y-%m-%d}",
        f"{day:%Y/%m/%d} 10:16",
        f"{day:%d.%m.%Y}",
    )
    found = [{term for term in terms(form) if term.startswith("day ")} for form in forms]
    assert found == [{f"day {day.month}-{number}"}] * len(forms)


# -- other languages and scripts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ("café", "cafe\u0301"),  # one character, and two
        ("El camión es azul", "camion"),
        ("ΑΘΗΝΑ", "Αθήνα"),  # capitals lose their accents in Greek
        ("الكتاب", "كتاب"),  # "the book", "book"
        ("كِتاب", "كتاب"),  # with and without its vowel
        ("مدرسة أحمد", "احمد"),
        ("使用Python编程", "python"),
        ("使用Python编程", "编"),
        ("\uff11\uff12.3", "12.3"),  # wide digits
    ],
)
def test_a_word_is_found_however_it_is_written(written: str, asked: str) -> None:
    assert {*terms(written)} & {*query_terms(asked)}


def test_the_vowels_of_hindi_are_part_of_its_words() -> None:
    book, books, boy = "किताब", "किताबें", "लड़का"
    assert count_words(f"{book} {boy}\u0964") == 2
    assert terms(book) == terms(books)
    assert not {*terms(book)} & {*terms(boy)}


@pytest.mark.parametrize(
    ("sentences", "question", "found"),
    [
        (
            ["बारिश हो रही है\u0964", "राजधानी दिल्ली है\u0964", "नदी लंबी है\u0964"],
            "राजधानी क्या है?",
            1,
        ),
        (
            ["ฝนตกหนักทั้งวัน", "เมืองหลวงคือกรุงเทพ", "แม่น้ำยาวมาก"],
            "เมืองหลวงคืออะไร",
            1,
        ),
    ],
    ids=["hindi", "thai"],
)  # in both: it rains; the capital is ...; the river is long
def test_scripts_with_signs_and_without_spaces_are_searched(sentences: list[str], question: str, found: int) -> None:
    index = PassageIndex()
    index.find([{"role": "user", "content": each} for each in sentences], [])
    assert index.rank(question)[:1] == [found]


@pytest.mark.parametrize("mark", ["\u0964", "\u061f", "\u06d4", "\u104b"])
def test_a_passage_ends_with_a_sentence_of_other_scripts_too(mark: str) -> None:
    sentence = " ".join(["नदी"] * 20) + mark
    passages = split(" ".join([sentence] * 12), size=40)
    assert len(passages) == 6
    assert all(each.endswith(mark) for each in passages)


@given(st.text(max_size=80))
def test_terms_of_any_text_do_not_depend_on_how_its_letters_are_composed(text: str) -> None:
    assert terms(unicodedata.normalize("NFD", text)) == terms(unicodedata.normalize("NFC", text))
    assert {*query_terms(text)} <= {*terms(text)}
