"""An index that is saved finds after loading what it found before, and one that somebody made up does no harm."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.chat import dialogue
from tests.support.token_vectors import VOCAB, WORDS, made_up_vectors
from zsmerge_llm.retrieval import saved_index
from zsmerge_llm.retrieval.passage_index import PassageIndex
from zsmerge_llm.retrieval.passages import Passage
from zsmerge_llm.retrieval.questions import Query
from zsmerge_llm.retrieval.saved_index import check_index, index_tensors, restored_index
from zsmerge_llm.types import Message

SIZE = 16
VECTORS = made_up_vectors()
FACT = "On 3 May 2024 the keeper told us that the password of the harbour vault is falcon seven, and went home."
QUESTION = [Query("Which code opens the vault of the port?"), Query("password of the harbour vault")]
WORD = st.sampled_from([*WORDS, "the", "a", "rained", "May 3, 2024\n", "# Harbour\n", ". ", "\n\n"])
MESSAGES = st.lists(
    st.builds(
        lambda role, words: {"role": role, "content": " ".join(words)},
        st.sampled_from(["user", "assistant"]),
        st.lists(WORD, max_size=60),
    ),
    max_size=8,
)


def messages() -> list[Message]:
    said = [FACT, "Yes.", "# Market\n\n" + "Bread is sold in the market of the village. " * 6, "I see."]
    return dialogue(*said)


def index_of(texts: list[Message], by_meaning: bool = True) -> PassageIndex:
    index = PassageIndex(SIZE, VECTORS if by_meaning else None)
    index.find(texts, QUESTION)
    return index


def found(index: PassageIndex, texts: list[Message]) -> tuple[list[list[int]], list[Any]]:
    rankings, passages = index.find(texts, QUESTION)
    return rankings, list(passages)


ORIGINAL = index_tensors(index_of(messages()))
CHECKSUM = 3803386916
"""Of the tensors of `ORIGINAL` by the rules of the number in the test."""


@settings(deadline=None, max_examples=60)
@given(before=MESSAGES, after=MESSAGES, dropped=st.integers(0, 8), by_meaning=st.booleans())
def test_a_restored_index_goes_on_as_one_that_was_never_saved(
    before: list[Message], after: list[Message], dropped: int, by_meaning: bool
) -> None:
    vectors = VECTORS if by_meaning else None
    tensors = index_tensors(index_of(before, by_meaning))
    check_index(tensors, VOCAB)
    restored = restored_index(tensors, before, SIZE, vectors) if tensors else PassageIndex(SIZE, vectors)
    assert restored is not None
    for texts in (before, before + after, before[:dropped] + after):
        assert found(restored, texts) == found(index_of(texts, by_meaning), texts)


def test_of_a_saved_index_only_new_messages_are_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = index_tensors(index_of(messages()))
    new: list[Message] = [{"role": "user", "content": "The guard of the tower is asleep, and nobody knows the code."}]
    split: list[Passage] = []
    plain = saved_index.PassageIndex._append
    monkeypatch.setattr(PassageIndex, "_append", lambda self, passage: (split.append(passage), plain(self, passage))[1])
    restored = restored_index(tensors, messages() + new, SIZE, VECTORS)
    assert restored is not None
    assert found(restored, messages() + new)[0][1]
    assert [each.text for each in split] == [new[0]["content"]]


def test_an_index_is_made_anew_beside_other_messages_or_by_other_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, said = index_tensors(index_of(messages())), messages()
    edited = [{**said[0], "content": FACT.replace("seven", "eight")}, *said[1:]]

    assert restored_index(tensors, said, SIZE, VECTORS) is not None
    assert restored_index(tensors, edited, SIZE, VECTORS) is None
    assert restored_index(tensors, said[:-1], SIZE, VECTORS) is None
    assert restored_index(tensors, said, 2 * SIZE, VECTORS) is None
    assert restored_index(tensors, said, SIZE, None) is None
    monkeypatch.setattr(saved_index, "RULES", saved_index.RULES + 1)
    assert restored_index(tensors, said, SIZE, VECTORS) is None


def test_rules_that_change_what_is_indexed_have_another_number() -> None:
    """Where this fails on purpose, raise `RULES`: indexes that were saved must not be mixed with new ones."""
    arrays = (tensor.numpy().tobytes() for name, tensor in sorted(ORIGINAL.items()))
    assert (saved_index.RULES, zlib.crc32(b"".join(arrays))) == (3, CHECKSUM)


def test_an_index_of_nothing_is_not_saved() -> None:
    assert index_tensors(PassageIndex(SIZE, VECTORS)) == {}
    assert index_tensors(index_of([{"role": "user", "content": "!!!"}])) == {}


def put(name: str, place: int, value: int) -> dict[str, Tensor]:
    tensor = ORIGINAL[name].clone()
    tensor[place % len(tensor)] = value % 256 if tensor.dtype == torch.uint8 else value
    return {**ORIGINAL, name: tensor}


@settings(deadline=None, max_examples=400)
@given(
    name=st.sampled_from(sorted(ORIGINAL)),
    place=st.integers(0, 500),
    value=st.one_of(st.integers(-2, 40), st.sampled_from([-(2**31), 2**31 - 1, VOCAB - 1, VOCAB, 0xFFFF, 0x10000])),
)
def test_an_index_with_another_number_is_refused_or_does_no_harm(name: str, place: int, value: int) -> None:
    tensors = put(name, place, value)
    try:
        check_index(tensors, VOCAB)
    except ValueError:
        return
    restored = restored_index(tensors, messages(), SIZE, VECTORS)
    if restored is not None:
        found(restored, messages())
        found(restored, messages()[:1])


@pytest.mark.parametrize("name", sorted(ORIGINAL))
@pytest.mark.parametrize("change", ["missing", "empty", "longer", "two dimensions", "floats"])
def test_an_index_of_other_parts_is_refused(name: str, change: str) -> None:
    tensor = ORIGINAL[name]
    changed = {
        "empty": tensor[:0],
        "longer": torch.cat([tensor, tensor[-1:]]),
        "two dimensions": tensor[None],
        "floats": tensor.float(),
    }
    tensors = {key: changed.get(change, value) if key == name else value for key, value in ORIGINAL.items()}
    if change == "missing":
        del tensors[name]
    if (name, change) == ("index.similar_tokens", "longer"):
        check_index(tensors, VOCAB)  # the last passage has one token more
        return
    with pytest.raises(ValueError, match=r"index|Extra data"):
        check_index(tensors, VOCAB)


@pytest.mark.parametrize("about", [b"[]", b"{}", b'{"rules": 1}', b"\xff", b"[" * 100_000, b'{"rules": NaN}'])
def test_an_index_that_says_other_things_of_itself_is_refused(about: bytes) -> None:
    tensors = {**ORIGINAL, saved_index.ABOUT: torch.frombuffer(bytearray(about), dtype=torch.uint8)}
    with pytest.raises((ValueError, RecursionError)):  # a file's reader turns both into a SessionCorruptError
        check_index(tensors, VOCAB)


def test_a_token_outside_of_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="contradict"):
        check_index(put("index.similar_tokens", 0, VOCAB), VOCAB)
