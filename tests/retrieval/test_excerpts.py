"""Where not all passages have room, those that may answer are shown, with less of each."""

from __future__ import annotations

from zsmerge_llm.retrieval.excerpts import MAX_ALIKE, alike, most_of, sought_terms
from zsmerge_llm.retrieval.passages import Passage


def test_passages_that_say_as_much_as_the_best_one_are_alike_unless_they_are_many() -> None:
    texts = [Passage(text) for text in ("the key of the tower", "a key of a tower", "a tower", "bread")]
    assert alike([0, 1, 2, 3], texts.__getitem__, {"key": 5.0, "tower": 1.0, "the": 0.1}) == {0, 1}
    assert alike([3, 2], texts.__getitem__, {"key": 5.0}) == {3}, "found by meaning alone"
    assert alike(range(MAX_ALIKE + 1), lambda _: Passage("a key"), {"key": 1.0}) == {0}
    assert alike(range(MAX_ALIKE), lambda _: Passage("a key"), {"key": 1.0}) == set(range(MAX_ALIKE))


def test_the_first_choice_that_has_all_that_is_wanted_is_taken_or_else_the_fullest() -> None:
    one, two, others = ({at: Passage(str(at)) for at in numbers} for numbers in ([0], [0, 1], [2, 3, 4]))
    assert most_of({0}, [one, two]) is one
    assert most_of({0, 1}, [others, one, two]) is two
    assert most_of({0, 9}, [others, one, two]) is one
    assert most_of({9}, [{}, others, one]) is others
    assert most_of({9}, []) == {}


def test_a_name_or_an_identifier_counts_as_much_as_all_other_terms_of_a_question() -> None:
    assert sought_terms([0, 1], {1: ["boris"], 2: ["anna"]}, {"key": 2.0, "boris": 1.0}, []) == {
        0: {"key": 2.0, "boris": 1.0},
        1: {"key": 2.0, "boris": 3.0},
        2: {"anna": 3.0},
    }
    assert sought_terms([0], {}, {"key": 2.0, "7.2": 1.0}, ["7.2", "user8"]) == {0: {"key": 2.0, "7.2": 3.0}}
    assert sought_terms([], {0: ["anna"]}, {}, []) == {0: {"anna": 1.0}}
