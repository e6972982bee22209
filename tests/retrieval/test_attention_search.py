"""Where a question's words find nothing, the places of a document that its attention goes to are read again."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat import SHORT, Chat
from tests.support.templates import template
from tests.support.tiny_models import FAMILIES, tiny_model, tokens
from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.attention_search import EXCERPT_TOKENS, AttentionSearch, MaxAttention, peaks, score_tokens
from zsmerge_llm.retrieval.passage_search import INTRODUCTION, PassageSearch
from zsmerge_llm.retrieval.questions import Query
from zsmerge_llm.types import Usage

SMALL = CacheConfig(slots=64, sink=2, recent=6, stage=16, observation_window=4)
TOWN = """\
The bakery in Mill Lane opens at five in the morning. Its owner, Rosa Klein, bakes rye bread in a stone oven
that her grandfather built. On Saturdays there are plum cakes, and people stand in a row down to the bridge.

The football club of the town won the cup last summer. Its goalkeeper, Ivan Petrov, stopped two penalties in
the final, and the trainer, a quiet man from Porto, was carried through the streets.

The volcano behind the village last erupted in 1902. Ash fell for nine days and covered the vineyards, and
since then the red wine of the valley tastes of smoke.

The hospital stands on the hill. Doctor Helen Marsh has worked there for thirty years, and she still visits
the old people at home by bicycle, in rain and in snow.

The violin maker Paolo Conti cuts the wood for his instruments in winter, when the moon is small. One violin
takes him four months, and he sells it for nine thousand francs.

The railway station was closed in 1978. A painter, Nora Lind, bought it for one crown and paints the sea on
its walls, though the sea is far away.

The school has only eleven pupils. Their teacher, Mr. Okafor, lets them keep bees behind the gym, and the
honey pays for a journey to the capital each spring.

The prison on the island was emptied after the war. Nobody ever broke out of it but one man, a locksmith named
Emil Gross, who swam for six hours."""
SENTENCES = [f"Day {number} was cold and long." for number in range(40)]


# -- the attention of a query ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_of_a_query_is_the_models_own(family: str) -> None:
    model, engine = tiny_model(family), Engine(tiny_model(family), CacheConfig.full())
    read, asked = tokens(40), tokens(5, seed=1)
    cache = engine.new_cache()
    engine.read(cache, read)
    paid = engine.query_attention(cache, asked)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        exact = model(torch.tensor([read + asked]), output_attentions=True).attentions
    layers = [index for index, layer in enumerate(cache.layers) if layer.spec.window is None]
    for layer, most in zip(layers, paid, strict=True):
        rows = exact[layer][0, :, len(read) :]  # [Hq, m, n + m]
        own, learned_sink = rows[..., : len(read)], 1 - rows.sum(-1, keepdim=True)
        own = own / (own.sum(-1, keepdim=True) + learned_sink)  # what they pay each other does not count
        grouped = own.view(most.shape[0], -1, len(asked), len(read)).amax((1, 2))
        torch.testing.assert_close(most, grouped, atol=1e-4, rtol=1e-3)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 300), asked=st.integers(1, 40), compressed=st.booleans())
def test_a_query_pass_changes_nothing(length: int, asked: int, compressed: bool) -> None:
    engine = Engine(tiny_model("llama"), SMALL if compressed else CacheConfig.full())
    looked, other = engine.new_cache(), engine.new_cache()
    for cache in (looked, other):
        engine.read(cache, tokens(length))
    engine.query_attention(looked, tokens(asked, seed=1))
    for cache in (looked, other):
        engine.read(cache, tokens(50, seed=2))
    assert torch.equal(looked.logits, other.logits)
    for own, same in zip(looked.layers, other.layers, strict=True):
        used = own.num_filled[0]
        assert torch.equal(own.position[:, :, :used], same.position[:, :, :used])
        assert torch.equal(own.score[:, :, :used], same.score[:, :, :used])


# -- where it leads ----------------------------------------------------------------------------------------------------


def attending(at: int, general: Sequence[int] = ()) -> tuple[AttentionSearch, Cache, list[int]]:
    """A document of tokens that is held whole, in which a question looks at one token, and any question at others."""
    own = template("smollm2")
    ids = own.encode(" ".join(SENTENCES))
    engine = Engine(tiny_model("llama", vocab=len(own.tokenizer)), CacheConfig(slots=2048))
    cache = engine.new_cache()
    engine.read(cache, ids)
    looks = []

    def look(cache: Cache, asked: Sequence[int]) -> MaxAttention:
        paid = torch.zeros(cache.layers[0].keys.shape[1], len(ids))
        paid[:, [*general]] = 0.5
        if not looks:
            paid[:, at] = 0.4
        looks.append(asked)
        return [paid, *[torch.zeros_like(paid)] * (len(cache.layers) - 1)]

    return AttentionSearch(look, own), cache, ids


def test_the_sentences_around_what_is_attended_to_are_read_whole() -> None:
    search, cache, ids = attending(at=300)
    (text,) = search.search(cache, ids, "What is it?", 256)
    assert all(part in SENTENCES for part in (f"{each}." for each in text.removesuffix(".").split(". ")))
    assert search.template.tokenizer.decode(ids[298:302]).strip(" .") in text
    assert len(search.template.encode(text)) <= 2 * EXCERPT_TOKENS


def test_what_any_question_attends_to_is_not_what_this_one_asks_for() -> None:
    search, cache, ids = attending(at=300, general=[100])
    (text,) = search.search(cache, ids, "What is it?", 256)
    assert search.template.tokenizer.decode(ids[298:302]).strip(" .") in text
    search, cache, ids = attending(at=300, general=[100, 200, 300])
    assert search.search(cache, ids, "Thank you!", 256) == [], "little of it is its own"


def test_excerpts_that_do_not_fit_are_left_out() -> None:
    search, cache, ids = attending(at=300)
    assert search.search(cache, ids, "What is it?", 10) == []


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=500))
def test_peaks_come_by_their_scores_and_apart_from_each_other(given: list[float]) -> None:
    voted = torch.tensor(given)
    found = list(peaks(voted))
    assert all(abs(a - b) >= EXCERPT_TOKENS for a in found for b in found if a != b)
    assert voted[found].tolist() == sorted(voted[found].tolist(), reverse=True)
    assert len(found) > 0 or not voted.any()


def test_nothing_behind_the_document_and_no_sink_has_a_score() -> None:
    engine = Engine(tiny_model("llama"), SMALL.replace(slots=256))
    cache = engine.new_cache()
    engine.read(cache, tokens(100))
    paid = [torch.ones(layer.keys.shape[1], 100) for layer in cache.layers]
    voted = score_tokens(cache, paid, [torch.zeros_like(each) for each in paid], 50)
    assert voted is not None
    assert len(voted) == 50
    sinks = [each[:, :2] for each in paid]
    assert score_tokens(cache, sinks, [torch.zeros_like(each) for each in sinks], 50) is None


# -- in the product ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", cache=CacheConfig(slots=192, stage=32), compile=False, retrieval_tokens=90)


def read_for(llm: LLM, asked: str, name: str) -> tuple[Usage, str]:
    """What an answer to a question about the town cost, and the text that was read for it."""
    document = llm.read_document(text=TOWN, name="town")
    llm.add_session(document.fork(name))
    usage = llm.chat(asked, session=name, sampling=SHORT).usage
    return usage, llm.tokenizer.decode(llm.session(name).tokens[len(document.tokens) :])


@pytest.mark.slow
def test_a_question_in_other_words_than_the_documents_finds_its_place(llm: LLM) -> None:
    asked = "How did the convict escape?"
    words = PassageSearch(ChatTemplate(llm.tokenizer), 90)
    assert words.search([{"role": "user", "content": TOWN}], [Query(asked)], 90) == []
    usage, read = read_for(llm, asked, "one")
    assert 0 < usage.retrieved_tokens <= 100
    assert INTRODUCTION in read
    assert "swam for six hours" in read


def test_a_greeting_reads_nothing_again(llm: LLM) -> None:
    usage, read = read_for(llm, "Hello!", "two")
    assert usage.retrieved_tokens == 0
    assert INTRODUCTION not in read


def test_a_later_question_searches_the_document_and_not_what_was_said_since(llm: LLM) -> None:
    document = llm.read_document(text=TOWN, name="town")
    llm.add_session(document.fork("talk"))
    chat = Chat(llm, session="talk")
    chat.ask("Hello!")
    before = len(llm.session("talk").tokens)
    answer = chat.ask("How did the convict escape?")
    read = llm.tokenizer.decode(llm.session("talk").tokens[before:])
    assert answer.usage.reuse == "continued"
    assert answer.usage.retrieved_tokens > 0
    again = read.partition(INTRODUCTION)[2].partition("How did")[0].strip()
    assert all(part.strip()[:30] in TOWN for part in again.split("\n\n"))
