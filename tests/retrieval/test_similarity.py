"""Token vectors tell which tokens mean like things, and an index of them finds what a question asks in other words."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.chat import dialogue, make_llm
from tests.support.token_vectors import LIKE, VOCAB, WORDS, embeddings, made_up_vectors
from zsmerge_llm import LLM
from zsmerge_llm.errors import InputError
from zsmerge_llm.retrieval.passage_index import PassageIndex
from zsmerge_llm.retrieval.questions import Query
from zsmerge_llm.retrieval.similarity_index import SimilarityIndex
from zsmerge_llm.retrieval.token_vectors import MAX_LETTERS, MIN_WIDTH, TokenVectors, principal_directions
from zsmerge_llm.runtime import token_vectors
from zsmerge_llm.types import Message

# -- vectors -----------------------------------------------------------------------------------------------------------


def test_tokens_that_a_tokenizer_has_and_its_model_has_not_are_left_out() -> None:
    vectors = TokenVectors(lambda ids: embeddings()[torch.as_tensor(ids)], lambda texts: [[VOCAB + 1, 2]], VOCAB)
    assert vectors.distinct_tokens(["<|control|> text"]) == [[2]]


def test_directions_are_those_of_the_most_variance_in_their_order() -> None:
    deviations = torch.tensor([9.0, 5.0, 3.0, *[0.1] * 13])
    rows = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1)) * deviations
    torch.testing.assert_close(principal_directions(rows, 3).abs(), torch.eye(16)[:, :3], atol=0.05, rtol=0)


def test_nobody_elses_random_numbers_change() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    made_up_vectors().similarity([0, 1], np.array([2], dtype=np.uint32))
    assert torch.equal(torch.rand(1), expected)


def test_a_token_is_like_itself_and_more_like_one_of_its_meaning_than_like_others() -> None:
    vectors = made_up_vectors()
    everything = np.arange(len(WORDS), dtype=np.uint32)
    similarity = vectors.similarity(list(range(len(WORDS))), everything)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=2e-3)
    assert similarity.min() >= 0
    for word, like in LIKE.items():
        order = (-similarity[WORDS.index(word)]).argsort()
        assert [WORDS[at] for at in order[:2]] == [word, like]


def test_vectors_are_made_once_and_the_same_from_many_threads() -> None:
    rows, asked = embeddings(), list[int]()

    def embed(ids: Sequence[int]) -> Tensor:
        asked.extend(ids)
        return rows[torch.as_tensor(ids)]

    vectors, expected = TokenVectors(embed, lambda texts: [], VOCAB), made_up_vectors()
    parts = [np.arange(at, at + 6, dtype=np.uint32) for at in range(len(WORDS) - 6)] * 8
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda part: vectors.similarity([0], part), parts))
    for part, one in zip(parts, found, strict=True):
        # Tokens that are asked for together are rounded together: threads do not decide the last bit of a float16.
        np.testing.assert_allclose(one, expected.similarity([0], part), atol=1e-3)
    assert len(asked) <= VOCAB + len(WORDS)  # the sample that they are fitted to, and each token once


# -- the index ---------------------------------------------------------------------------------------------------------

TEXT = st.lists(st.sampled_from([*WORDS, "of", "the"]), max_size=40).map(lambda words: " ".join(words) + ".")
CHAT = st.lists(TEXT, min_size=1, max_size=8).map(lambda texts: dialogue(*texts))


def test_a_passage_that_says_it_in_other_words_is_more_like_a_question_than_one_about_something_else() -> None:
    index = SimilarityIndex(made_up_vectors())
    for text in ("the harbour vault password", "rain village tower bread", "market bread market"):
        index.append(text)
    scores = index.scores("code of the safe in the port")
    assert scores.argmax() == 0
    assert 0 <= scores.min() <= scores.max() <= 1
    assert index.scores("harbour password")[0] == pytest.approx(1, abs=5e-3)


def test_texts_without_any_token_are_like_nothing_and_break_nothing() -> None:
    index = SimilarityIndex(made_up_vectors())
    assert index.scores("harbour").tolist() == []
    for text in ("...", "harbour", "..."):
        index.append(text)
    assert index.scores("...").tolist() == [0, 0, 0]
    assert index.scores("harbour").argmax() == 1


@settings(max_examples=60, deadline=None)
@given(chats=st.lists(CHAT, min_size=1, max_size=4), cut=st.integers(0, 8), question=TEXT)
def test_an_index_that_follows_a_conversation_ranks_as_one_made_at_once(
    chats: list[list[Message]], cut: int, question: str
) -> None:
    vectors, messages = made_up_vectors(), list[Message]()
    index = PassageIndex(12, vectors)
    for chat in chats:  # each continues a prefix of the one before, as after an edit
        messages = messages[: max(0, len(messages) - cut)] + chat
        found, passages = index.find(messages, [Query(question)])
        again, others = PassageIndex(12, vectors).find(messages, [Query(question)])
        assert found == again
        assert list(passages) == list(others)
        copied, _ = index.copy().find(messages + chat, [Query(question)])
        assert copied == PassageIndex(12, vectors).find(messages + chat, [Query(question)])[0]


def test_of_passages_with_a_questions_words_the_one_that_says_the_rest_in_other_words_comes_first() -> None:
    texts = ["harbour rain", "harbour vault password", "harbour bread", *["rain in the village market"] * 40]
    messages = [{"role": "user", "content": text} for text in texts]
    by_words, by_both = (
        PassageIndex(12, vectors).find(messages, [Query("code at the harbour"), Query("guard")])[0]
        for vectors in (None, made_up_vectors())
    )
    assert by_words == [[0, 2, 1], []]
    assert by_both[0][0] == 1
    assert by_both[1] == []  # what words do not find, meaning alone does not


# -- of real models ----------------------------------------------------------------------------------------------------


def test_a_model_of_narrow_embeddings_is_searched_by_words_alone() -> None:
    llm = make_llm()
    assert llm.engine.model.config.hidden_size < MIN_WIDTH
    assert token_vectors(llm.engine, llm.tokenizer) is None


def test_embeddings_of_tokens_are_the_models_own() -> None:
    llm = make_llm()
    weight = llm.engine.model.get_input_embeddings().weight
    torch.testing.assert_close(llm.engine.token_embeddings([5, 3, 5]), weight[[5, 3, 5]].float())
    with pytest.raises(InputError, match="lie between"):
        llm.engine.token_embeddings([10**6])


@pytest.fixture(scope="module")
def vectors(smollm2: LLM) -> TokenVectors:
    made = token_vectors(smollm2.engine, smollm2.tokenizer)
    assert made is not None
    return made


def test_any_text_has_tokens_in_a_moment_and_what_is_no_unicode_breaks_nothing(vectors: TokenVectors) -> None:
    started = time.monotonic()
    long, broken, plain, empty = vectors.distinct_tokens(["a" * 10**7, "the \ud800harbour", "the harbour", ""])
    assert 0 < len(long) <= MAX_LETTERS
    assert broken == plain
    assert len(empty) <= 1
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("word", "like", "other"),
    [
        ("doctor", "physician", "carpet"),
        ("car", "vehicle", "banana"),
        ("big", "large", "seven"),
        ("ship", "boat", "and"),
    ],
)
def test_real_tokens_of_like_meaning_are_alike(vectors: TokenVectors, word: str, like: str, other: str) -> None:
    (asked, *others) = vectors.distinct_tokens([word, like, other])
    ((first, second),) = vectors.similarity(asked, np.array([tokens[0] for tokens in others], np.uint32))
    assert first > 0.5 > 2 * second


def test_a_chat_is_searched_for_what_means_the_same(smollm2: LLM, vectors: TokenVectors) -> None:
    told = [
        "The doctor examined Lena in the evening and gave her a brown syrup against her cough.",
        "A ship brought forty barrels of salt to the island in the north on the same day.",
        "Lena painted the long fence behind the school with the others in the afternoon.",
        "Nobody in the market sold any bread in that week, and nobody knew why it was so.",
    ]
    messages = dialogue(*(text for each in told for text in (each, "I see.")))
    by_words, by_both = (
        PassageIndex(40, each).find(messages, [Query("Lena's medicine?")])[0][0] for each in (None, vectors)
    )
    assert by_words == [2, 0]  # both that name her, the shorter one first
    assert by_both[0] == 0
    search = smollm2._load().conversations.prompts.passage_search
    assert search.vectors is not None  # so it is in every turn
