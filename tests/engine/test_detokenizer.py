"""Pieces of text add up to the decoding of all tokens, characters come whole, and a stop string ends the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from tests.support.templates import byte_level, sentencepiece
from zsmerge_llm.engine.detokenizer import Detokenizer, StopStrings

TOKENIZERS = [byte_level(), sentencepiece(True), sentencepiece(False), ByT5Tokenizer()]
KINDS = ["byte-level", "sentencepiece", "sentencepiece-without-prefix", "slow"]
words = st.text(st.sampled_from("abt stop\nheé中🙂🚀\u200d�"), max_size=40)


def stream(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, StopStrings]:
    """Return the text of ids that are pushed one by one, up to the first stop string."""
    detokenizer, stops = Detokenizer(tokenizer), StopStrings(stop)
    pieces = [stops.push(detokenizer.push(token)) for token in ids]
    return "".join([*pieces, stops.push(detokenizer.finish()), stops.finish()]), stops


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Return the text before the stop string that is completed first, or the longest of those that are."""
    for end in range(len(text) + 1):
        if hits := [each for each in stop if text[:end].endswith(each)]:
            return text[: end - max(map(len, hits))]
    return text


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=KINDS)
@settings(max_examples=150, deadline=None)
@given(text=words, stop=st.lists(st.text(st.sampled_from("abt stop\n中🙂�"), min_size=1, max_size=5), max_size=3))
def test_pieces_add_up_to_the_decoded_text_before_the_first_stop_string(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: list[str]
) -> None:
    text = text.replace("��", "�")
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = decoded(tokenizer, ids)
    expected = cut(whole, tuple(stop))
    streamed, stops = stream(tokenizer, ids, tuple(stop))

    assert streamed == expected
    assert stops.stopped == (expected != whole or any(each in whole for each in stop))


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 419), max_size=60))
def test_pieces_of_any_byte_level_token_sequence_add_up_to_its_decoding(ids: list[int]) -> None:
    assert stream(byte_level(), ids)[0] == decoded(byte_level(), ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.sampled_from([2, 3, 150, 170, 200, 201, 240, 241, 260, 300]), max_size=60))
def test_pieces_of_bytes_that_are_not_utf8_add_up_too(ids: list[int]) -> None:
    assert stream(byte_level(), ids)[0] == decoded(byte_level(), ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=KINDS)
def test_a_character_of_several_tokens_is_emitted_once_and_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode("a🚀国🚀 b", add_special_tokens=False)]

    assert "".join(pieces) == "a🚀国🚀 b"
    assert "🚀" in pieces
    assert not any("�" in piece for piece in pieces)


def test_a_stop_string_across_pieces_ends_the_text() -> None:
    stops = StopStrings(("###END",))
    pieces = [stops.push(letter) for letter in "Yes. ###END more"]

    assert "".join(pieces) == "Yes. "
    assert pieces[:8] == ["Y", "e", "s", ".", " ", "", "", ""]
    assert stops.stopped
    assert stops.finish() == ""


def test_a_partial_stop_string_that_does_not_complete_is_emitted() -> None:
    stops = StopStrings(("###END", "##!"))

    assert [stops.push(letter) for letter in "a####x#"] == ["a", "", "", "", "#", "###x", ""]
    assert stops.finish() == "#"
    assert not stops.stopped


def test_a_stop_string_may_complete_in_the_last_flush() -> None:
    detokenizer, stops = Detokenizer(byte_level()), StopStrings(("�",))
    ids = byte_level().encode("a☃")

    assert "".join(stops.push(detokenizer.push(token)) for token in ids[:-1]) == "a"
    assert (stops.push(detokenizer.finish()), stops.stopped) == ("", True)


def test_special_tokens_are_left_out_unless_they_are_visible() -> None:
    ids = [byte_level().bos_token_id, *byte_level().encode("a b"), byte_level().eos_token_id]
    whole = Detokenizer(byte_level(), skip_special_tokens=False)
    begin = Detokenizer(byte_level(), visible_special_ids=[ids[0]])

    assert stream(byte_level(), ids)[0] == "a b"
    assert "".join(whole.push(token) for token in ids) + whole.finish() == "<bos>a b</s>"
    assert "".join(begin.push(token) for token in ids) + begin.finish() == "<bos>a b"


def test_a_completion_keeps_the_space_between_prompt_and_answer() -> None:
    prompt, answer = (sentencepiece().encode(text, add_special_tokens=False) for text in ("stop", "the"))
    continuation = Detokenizer(sentencepiece(), context=prompt)

    assert stream(sentencepiece(), answer)[0] == "the"
    assert "".join(continuation.push(token) for token in answer) + continuation.finish() == " the"


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=KINDS)
@pytest.mark.parametrize("text", ["word the ", "中国", "\n", "�", " "])
def test_each_step_decodes_a_few_tokens_only(
    tokenizer: PreTrainedTokenizerBase, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    decode = type(tokenizer).decode

    def recording(self: PreTrainedTokenizerBase, ids: list[int], **settings: bool) -> str:
        sizes.append(len(ids))
        return str(decode(self, ids, **settings))

    ids = tokenizer.encode(text * 100, add_special_tokens=False)
    broken = ids + tokenizer.encode("🚀", add_special_tokens=False)[-2:] * 100
    monkeypatch.setattr(type(tokenizer), "decode", recording)
    stream(tokenizer, broken, ("\n\nstop",))
    assert max(sizes) <= 40
    assert len(sizes) <= 2 * len(broken) + 2
