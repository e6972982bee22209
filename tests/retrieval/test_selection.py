"""How many tokens are read again, which passages, and what is shown with them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zsmerge_llm.retrieval.passages import Passage, excerpt
from zsmerge_llm.retrieval.selection import (
    FULL_OVERFLOW,
    MAX_TOO_LONG,
    choose,
    merge,
    passage_words,
    token_limit,
    with_context,
    with_replies,
)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(8, 10**5))
def test_the_more_is_lost_the_more_is_read_again_and_never_more_than_is_held(a: int, b: int, slots: int) -> None:
    shorter, longer = sorted((a, b))
    assert 0 <= token_limit("auto", shorter, slots) <= token_limit("auto", longer, slots) <= 0.75 * slots
    assert token_limit("auto", longer, slots) >= token_limit(256, longer, slots)


def test_a_fixed_number_stays_and_takes_half_of_the_slots_at_most() -> None:
    assert token_limit(256, 10**6, 1024) == token_limit(256, 1024, 1024) == 256
    assert token_limit(256, 10**6, 300) == 150
    assert token_limit("auto", 1024, 1024) == 256
    assert token_limit("auto", round(FULL_OVERFLOW * 1024), 1024) == token_limit("auto", 10**6, 1024) == 640


@given(st.integers(0, 10**5))
def test_passages_are_short_where_little_is_read_again_and_of_few_sizes(tokens: int) -> None:
    assert passage_words(tokens) in {12, 16, 32, 48, 64, 80}
    assert passage_words(tokens) <= passage_words(tokens + 100)


def test_the_parts_of_a_question_take_turns() -> None:
    assert merge([[4, 1], [7, 4], []]) == [4, 7, 1]
    assert merge([[], []]) == []


@given(st.lists(st.integers(1, 50), unique=True), st.integers(0, 200))
def test_what_is_chosen_fits_and_stands_in_the_texts_order(ranked: list[int], most: int) -> None:
    chosen = choose(ranked, lambda number: number, most)
    assert sum(chosen) <= most
    assert chosen == sorted(set(chosen) & set(ranked))


def test_few_passages_are_looked_at_where_none_has_room() -> None:
    looked_at: list[int] = []
    assert choose(range(1000), lambda number: looked_at.append(number) or 50, 40) == []
    assert len(looked_at) == MAX_TOO_LONG
    assert choose(range(1000), lambda number: 50 if number < MAX_TOO_LONG - 1 else 30, 40) == [MAX_TOO_LONG - 1]


def test_headings_are_shown_once_and_not_where_the_passage_before_shows_them() -> None:
    date = "8 May 2023"
    shown = with_context(
        [
            Passage("I went.", date),
            Passage("I came.", f"{date}\n## Plans"),
            Passage("9 May 2023\nI saw."),
            Passage("I won.", "9 May 2023"),
        ]
    )
    assert shown == [f"{date}\nI went.", "## Plans\nI came.", "9 May 2023\nI saw.", "I won."]


def test_replies_are_shown_as_far_as_there_is_room_and_where_they_are_not_found_themselves() -> None:
    found = {at: Passage(f"{at}") for at in (0, 1, 5)}
    replies = {0: "none", 1: "one", 5: "a much longer reply"}

    def shown(max_tokens: int) -> list[str]:
        longer = with_replies(found, replies.__getitem__, lambda passage: len(passage.text.split()), max_tokens)
        return [passage.text for passage in longer.values()]

    assert shown(3) == ["0", "1", "5"]
    assert shown(4) == ["0", "1\none", "5"]
    assert shown(8) == ["0", "1\none", "5\na much longer reply"]


def test_an_excerpt_has_the_sentences_that_say_what_is_asked_for_and_their_neighbours() -> None:
    text = "One. Two. The tower is old. Four. Five. Six. Seven.\nThe tower fell. Nine."
    assert excerpt(text, {"tower": 1.0}) == "Two. The tower is old. Four. ... Seven.\nThe tower fell. Nine."
    assert excerpt(text, {"tower": 1.0, "fell": 2.0}) == "Seven.\nThe tower fell. Nine."
    assert excerpt(text, {"tower": 1.0}, neighbours=0) == "The tower is old. ... The tower fell."
    assert excerpt(text, {"bread": 1.0}) == excerpt(text, {}) == text


@given(st.text(alphabet="ab. \n", max_size=60), st.dictionaries(st.sampled_from("ab"), st.floats(0.1, 9)))
def test_an_excerpt_is_made_of_the_text_in_its_order(text: str, weights: dict[str, float]) -> None:
    found, start = excerpt(text, weights), 0
    for part in found.split("... "):
        start = text.index(part, start) + len(part)
    assert not any(term in text.split() and term not in found for term in weights if len(weights) == 1)
