"""Tokens are drawn as transformers draws them; text comes out of tokens whole, and ends where a stop string begins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.templates import byte_level, sentencepiece
from zsmerge_llm.config import SamplingParams
from zsmerge_llm.engine.sampler import Detokenizer, Sampler
from zsmerge_llm.errors import ZSMergeError

VOCAB = 50
TOKENIZERS = [byte_level(), sentencepiece(True), sentencepiece(False)]
FORMS = ["byte-level", "sentencepiece", "sentencepiece-without-prefix"]
words = st.text(st.sampled_from("abt stop\nheé中🙂🚀\u200d�"), max_size=40)


def draw(params: SamplingParams, logits: Tensor, seen: list[int] | None = None, times: int = 1) -> list[int]:
    sampler = Sampler(params, seen or [], "cpu")
    return [int(sampler(logits)) for _ in range(times)]


def logits(seed: int = 0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.8),
        SamplingParams(temperature=1, min_p=0.1),
        SamplingParams(temperature=2.0, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.5),
    ],
)
def test_tokens_come_with_the_probabilities_that_transformers_gives_them(params: SamplingParams) -> None:
    seen = [3, 4, 3, 9, 3]
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    generation = GenerationConfig(
        do_sample=True,
        temperature=float(params.temperature),
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
    )
    ids = torch.tensor([seen])
    processors = LlamaForCausalLM(config)._get_logits_processor(generation, input_ids_seq_length=len(seen))
    expected = processors(ids, logits()[None])[0].softmax(-1)

    drawn = torch.tensor(draw(params.replace(seed=1), logits(), seen, times=4_000))
    share = torch.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert (share[expected == 0] == 0).all()
    assert (share - expected).abs().max() < 0.035


def test_temperature_zero_takes_the_best_token_and_tiny_temperatures_nearly_so() -> None:
    best = int(logits().argmax())

    assert draw(SamplingParams(), logits()) == [best]
    assert draw(SamplingParams(temperature=1e-40), logits() * 1e30, times=50) == [best] * 50


def test_a_seed_makes_the_draw_repeatable_and_none_does_not() -> None:
    seeded = SamplingParams(temperature=1.0, seed=7)
    torch.manual_seed(0)
    free = draw(seeded.replace(seed=None), logits(), times=60)
    torch.manual_seed(0)

    assert draw(seeded, logits(), times=60) == draw(seeded, logits(), times=60)
    assert draw(seeded, logits(), times=60) != draw(seeded.replace(seed=8), logits(), times=60)
    assert draw(seeded.replace(seed=None), logits(), times=60) != free


def test_the_repetition_penalty_counts_prompt_and_answer_and_ids_beyond_the_logits() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, -1.0])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0, 0, 900], "cpu")

    sampler.accept(2)
    assert int(sampler(scores)) == 1
    sampler.accept(1)
    assert int(sampler(scores)) == 0  # 2.5 against 2.0, 1.5 and -1.0
    assert Sampler(SamplingParams(repetition_penalty=2.0), [0, 1, 2, 3], "cpu")(-scores.abs()).item() == 3


def test_masked_tokens_are_never_drawn() -> None:
    masked = torch.full((VOCAB,), -torch.inf)
    masked[[4, 7]] = 0.0

    assert set(draw(SamplingParams(temperature=5.0, seed=1), masked, times=200)) == {4, 7}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers_end_in_an_error_that_names_the_remedy(temperature: float, broken: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9, top_k=4, min_p=0.1, repetition_penalty=1.2)
    one_bad = logits()
    one_bad[5] = broken
    for bad in (one_bad, torch.full((VOCAB,), broken), torch.full((VOCAB,), -torch.inf)):
        sampler = Sampler(params, [1], "cpu")
        token = int(sampler(bad))
        assert token == -1
        with pytest.raises(ZSMergeError, match="dtype='float32' or 'bfloat16'"):
            sampler.accept(token)


def test_a_token_is_one_number_on_the_device() -> None:
    for temperature in (0.0, 1.0):
        token = Sampler(SamplingParams(temperature=temperature), [], "cpu")(logits())
        assert (token.shape, token.dtype) == ((), torch.int64)


def stream(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[str, Detokenizer]:
    reader = Detokenizer(tokenizer, stop)
    return "".join([reader.push(token) for token in ids] + [reader.finish()]), reader


def decoded(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Letter by letter: the text before the stop string that is completed first, the longest of them."""
    for end in range(len(text) + 1):
        if hits := [each for each in stop if text[:end].endswith(each)]:
            return text[: end - max(map(len, hits))]
    return text


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=FORMS)
@settings(max_examples=150, deadline=None)
@given(text=words, stop=st.lists(st.text(st.sampled_from("abt stop\n中🙂�"), min_size=1, max_size=5), max_size=3))
def test_pieces_add_up_to_the_decoded_text_before_the_first_stop_string(
    tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]
) -> None:
    text = text.replace("��", "�")
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = decoded(tokenizer, ids)
    expected = cut(whole, tuple(stop))
    got, reader = stream(tokenizer, ids, tuple(stop))

    assert got == expected
    assert reader.stopped == (expected != whole or any(each in whole for each in stop))


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 419), max_size=60))
def test_any_tokens_of_a_byte_level_tokenizer_add_up_to_their_decoding(ids: list[int]) -> None:
    assert stream(byte_level(), ids)[0] == decoded(byte_level(), ids)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.sampled_from([2, 3, 150, 170, 200, 201, 240, 241, 260, 300]), max_size=60))
def test_bytes_that_are_no_text_add_up_too(ids: list[int]) -> None:
    assert stream(byte_level(), ids)[0] == decoded(byte_level(), ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=FORMS)
def test_a_character_of_several_tokens_appears_once_and_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    reader = Detokenizer(tokenizer)
    pieces = [reader.push(token) for token in tokenizer.encode("a🚀国🚀 b", add_special_tokens=False)]

    assert "".join(pieces) == "a🚀国🚀 b"
    assert "🚀" in pieces
    assert not any("�" in piece for piece in pieces)


def test_a_stop_string_across_tokens_ends_the_answer() -> None:
    ids = [byte_level().encode(letter)[0] for letter in "Yes. ###END more"]
    reader = Detokenizer(byte_level(), ("###END",))
    pieces = [reader.push(token) for token in ids]

    assert "".join(pieces) == "Yes. "
    assert pieces[:8] == ["Y", "e", "s", ".", " ", "", "", ""]
    assert reader.stopped
    assert reader.finish() == ""


def test_the_beginning_of_a_stop_string_that_goes_on_otherwise_is_given_out() -> None:
    reader = Detokenizer(byte_level(), ("###END", "##!"))
    ids = [byte_level().encode(letter)[0] for letter in "a####x#"]

    assert [reader.push(token) for token in ids] == ["a", "", "", "", "#", "###x", ""]
    assert reader.finish() == "#"
    assert not reader.stopped


def test_a_stop_string_may_show_only_at_the_end() -> None:
    reader = Detokenizer(byte_level(), ("�",))
    ids = byte_level().encode("a☃")

    assert "".join(reader.push(token) for token in ids[:-1]) == "a"
    assert (reader.finish(), reader.stopped) == ("", True)


def test_special_tokens_are_left_out_unless_wanted() -> None:
    ids = [byte_level().bos_token_id, *byte_level().encode("a b"), byte_level().eos_token_id]
    shown = Detokenizer(byte_level(), skip_special_tokens=False)

    assert stream(byte_level(), ids)[0] == "a b"
    assert "".join(shown.push(token) for token in ids) + shown.finish() == "<bos>a b</s>"


def test_a_completion_keeps_the_space_between_prompt_and_answer() -> None:
    prompt, answer = (sentencepiece().encode(text, add_special_tokens=False) for text in ("stop", "the"))
    behind = Detokenizer(sentencepiece(), context=prompt)

    assert stream(sentencepiece(), answer)[0] == "the"
    assert "".join(behind.push(token) for token in answer) + behind.finish() == " the"


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=FORMS)
@pytest.mark.parametrize("text", ["word the ", "中国", "\n", "�", " "])
def test_each_step_decodes_a_few_tokens_only(
    tokenizer: PreTrainedTokenizerFast, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    plain = type(tokenizer).decode

    def counting(self: PreTrainedTokenizerFast, ids: list[int], **settings: bool) -> str:
        sizes.append(len(ids))
        return str(plain(self, ids, **settings))

    ids = tokenizer.encode(text * 100, add_special_tokens=False)
    broken = ids + tokenizer.encode("🚀", add_special_tokens=False)[-2:] * 100
    monkeypatch.setattr(type(tokenizer), "decode", counting)
    stream(tokenizer, broken, ("\n\nstop",))
    assert max(sizes) <= 40
    assert len(sizes) <= 2 * len(broken) + 2
