"""Long texts are tokenized in pieces, with the ids of the whole, and what is too long is refused before that."""

from __future__ import annotations

import copy
import random
from threading import Event
from typing import Any
from unittest import mock

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.chat import make_llm
from tests.support.templates import byte_level, sentencepiece
from zsmerge_llm.errors import ContextLimitError
from zsmerge_llm.language import long_text
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.language.long_text import LongText

QWEN = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split_like_qwen() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with the pattern and the normalizer of Qwen 2.5."""
    tokenizer = copy.deepcopy(byte_level())
    split = pre_tokenizers.Split(Regex(QWEN), "isolated")
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_pieces])
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = copy.deepcopy(sentencepiece(False))
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def words_with_spaces_behind() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose words end with their space, so that a cut before one would change them."""
    tokenizer = copy.deepcopy(byte_level())
    split = pre_tokenizers.Split(Regex(r"\w+ ?|[^\w]"), "isolated")
    byte_pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_pieces])
    return tokenizer


TOKENIZERS = {
    "GPT-2": (byte_level, True),
    "Qwen": (split_like_qwen, True),
    "Metaspace": (metaspace, True),
    "no words": (sentencepiece, False),
    "spaces behind": (words_with_spaces_behind, False),
}


def long(seed: int, length: int) -> str:
    parts = [
        "the ship",
        " and ",
        "is it",
        " ",
        "\n\n",
        "12345",
        "naïve",
        "e\u0301",
        "中文",
        "  ",
        "<|im_end|>",
        "🙂",
        ". A",
    ]
    rng = random.Random(seed)
    return "".join(rng.choice(parts) for _ in range(length))


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("seed", range(5))
def test_the_ids_of_a_text_in_pieces_are_those_of_the_whole(name: str, seed: int) -> None:
    make, is_cut = TOKENIZERS[name]
    tokenizer = make()
    text = long(seed, 4000)
    with mock.patch.object(long_text, "PIECE", 500):
        pieces = list(LongText(tokenizer).pieces(text))
        form = ChatTemplate(tokenizer)
        ids, prompt = form.encode(text), form.encode_prompt(text)
        guarded = form.encode_text(text)

    assert (len(pieces) > 5) is is_cut
    assert "".join(pieces) == text
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt == tokenizer(text)["input_ids"]
    assert guarded == form.encode_text(text)


def test_special_tokens_stand_around_the_whole_of_a_prompt() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(byte_level())
    ids = [("<bos>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A </s>", special_tokens=ids)
    text = long(0, 4000)
    with mock.patch.object(long_text, "PIECE", 500):
        assert ChatTemplate(tokenizer).encode_prompt(text) == tokenizer(text)["input_ids"]


def test_a_text_is_not_cut_where_an_added_token_takes_the_space() -> None:
    for settings in (
        {"content": "keeper", "rstrip": True},
        {"content": "ship", "lstrip": True},
        {"content": "the ship"},
    ):
        tokenizer = copy.deepcopy(byte_level())
        tokenizer.add_tokens([AddedToken(**settings)])
        with mock.patch.object(long_text, "PIECE", 10):
            assert len(list(LongText(tokenizer).pieces("the keeper of the ship " * 20))) == 1


def test_a_text_without_words_stays_whole() -> None:
    with mock.patch.object(long_text, "PIECE", 10):
        assert list(LongText(byte_level()).pieces("中" * 1000)) == ["中" * 1000]
        assert list(LongText(byte_level()).pieces("")) == [""]


def test_a_text_beyond_the_limit_is_refused_before_it_is_tokenized() -> None:
    tokenizer: Any = mock.Mock(wraps=byte_level())
    form = ChatTemplate(tokenizer)
    for limit in ("MAX_TEXT", "MAX_WHOLE"):
        with mock.patch.object(long_text, limit, 1000):
            for encode in (form.encode, form.encode_prompt, form.encode_text):
                with pytest.raises(ContextLimitError, match="at most 1,000"):
                    encode("a" * 1001)
    tokenizer.assert_not_called()


def test_an_interrupt_is_heard_between_two_pieces() -> None:
    tokenizer, calls = byte_level(), []

    class Interrupted:
        backend_tokenizer, added_tokens_decoder = tokenizer.backend_tokenizer, tokenizer.added_tokens_decoder

        def __call__(self, text: str, **settings: Any) -> Any:
            calls.append(len(text))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return tokenizer(text, **settings)

    with mock.patch.object(long_text, "PIECE", 100), pytest.raises(KeyboardInterrupt):
        ChatTemplate(Interrupted()).encode("the ship and the sea " * 100)  # type: ignore[arg-type]
    assert max(calls) <= 200


def test_a_cancelled_document_is_not_tokenized_to_its_end() -> None:
    from zsmerge_llm.engine.scheduling import Cancelled

    with make_llm() as llm, mock.patch.object(long_text, "PIECE", 100):
        cancel, encoded = Event(), []
        tokenizer = llm.tokenizer
        call = type(tokenizer).__call__

        def counting(self: Any, text: str, **settings: Any) -> Any:
            encoded.append(len(text))
            if len(encoded) == 3:
                cancel.set()
            return call(self, text, **settings)

        with mock.patch.object(type(tokenizer), "__call__", counting), pytest.raises(Cancelled):
            llm.read_document(text="the ship and the sea " * 1000, cancel=cancel)
        assert len(encoded) == 3
        assert len(llm.store) == 0


def test_models_without_words_are_supported() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    assert ChatTemplate(tokenizer).encode("a a") is not None
