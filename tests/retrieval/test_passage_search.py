"""What the cache has lost is looked up in what was said, and read again before the question that asks for it."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch

from tests.retrieval.test_questions import LANGCHAIN, LLAMAINDEX
from tests.support.chat import LARGE_CACHE, SHORT, SMALL_CACHE, Chat, dialogue, make_llm, record_passes
from tests.support.templates import template
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.retrieval.passage_search import INTRODUCTION, PassageSearch

FACT = "The password of the harbour vault is falcon seven."
FILLER = ["Rain fell on the quiet village all day long.", "Nobody in the market sold any bread that week."]
BUDGET = 96
NOTES = CacheConfig(slots=192, recent=16, stage=16, observation_window=8)


def chatter(turns: int, fact_at: int = 0) -> list[str]:
    """Messages of a user, one of which holds the fact."""
    return [FACT if turn == fact_at else f"{FILLER[turn % 2]} Day {turn}." for turn in range(turns)]


@pytest.fixture(scope="module")
def search() -> PassageSearch:
    return PassageSearch(template("smollm2"), BUDGET)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm(cache=NOTES, retrieval_tokens=BUDGET)


# -- where passages go -------------------------------------------------------------------------------------------------


def test_passages_stand_before_a_short_message_within_the_budget(search: PassageSearch) -> None:
    messages = dialogue(
        *(text for fact in chatter(9) for text in (fact, "I see.")), "What is the password of the vault?"
    )
    asking = search.augment(messages, slots=1000)
    block = asking[-1]["content"].removesuffix("What is the password of the vault?")
    assert asking[:-1] == messages[:-1]
    assert block.startswith(INTRODUCTION)
    assert FACT in block
    assert 0 < len(search.template.encode(block)) <= BUDGET + len(search.template.encode(INTRODUCTION + "\n\n"))
    assert search.augment(messages, slots=8) == messages  # half of so small a cache has no room for a passage


@pytest.mark.parametrize("ending", ["What is the password?", "Query: What is the password?\nAnswer: "])
def test_the_end_of_a_long_message_asks_for_what_stands_before_it(search: PassageSearch, ending: str) -> None:
    text = "\n\n".join(FILLER[at % 2] if at != 7 else FACT for at in range(40))
    (asking,) = search.augment([{"role": "user", "content": f"{text}\n\n{ending}"}], slots=180)
    assert asking["content"].startswith(f"{text}\n\n{INTRODUCTION}")
    assert FACT in asking["content"][len(text) :]
    assert asking["content"].endswith(f"\n\n{ending}")


@pytest.mark.parametrize("form", ["{}", LANGCHAIN, LLAMAINDEX, "Answer in a short sentence: {}"])
def test_a_framework_s_prompt_around_a_question_finds_what_the_question_finds(search: PassageSearch, form: str) -> None:
    # The instructions share their words with a passage of the conversation.
    told = form.format("").strip()
    messages = dialogue(*(text for said in [*chatter(9), told] for text in (said, "I see.")))
    asked = form.format("What is the password of the vault?")
    asking = search.augment([*messages, *dialogue(asked)], slots=1000)[-1]["content"]
    assert asking == f"{INTRODUCTION}\n\n{FACT}\n\nI see.\n\n{asked}"


def test_a_follow_up_finds_what_its_question_is_about_and_not_that_question(search: PassageSearch) -> None:
    born = "Anna, the keeper of the lighthouse, was born in the spring of 1851 and left in 1902."
    messages = dialogue(*(text for said in [born, *chatter(9)[1:]] for text in (said, "I see.")))
    messages += dialogue("What was the name of the keeper of the lighthouse?", "Anna.")
    (*_, asking) = search.augment([*messages, *dialogue("When did she leave?")], slots=1000)
    assert asking["content"] == f"{INTRODUCTION}\n\n{born}\n\nI see.\n\nWhen did she leave?"


def test_an_answer_that_stands_in_many_places_is_found_in_more_of_them_than_have_room_as_a_whole(
    search: PassageSearch,
) -> None:
    names = ["Anna", "Boris", "Clara", "Dmitri", "Elena", "Fedor"]
    around = " ".join(f"{FILLER[at % 2]}" for at in range(8))
    text = "\n\n".join(f"{around} A keeper of the lighthouse was {name}. {around}" for name in names)
    messages = dialogue(text, "I see.", "Name all keepers of the lighthouse.")
    (*_, asking) = replace(search, max_tokens=900).augment(messages, slots=2000)
    assert all(f"lighthouse was {name}" in asking["content"] for name in names)
    assert asking["content"].count(around) == 1  # the best one is whole
    (*_, asking) = replace(search, max_tokens=3000).augment(messages, slots=6000)
    assert asking["content"].count(around) == 6  # all have room


def test_where_whole_passages_have_no_room_every_sentence_that_may_answer_is_found(search: PassageSearch) -> None:
    codes = ["48151", "62342", "10815", "23116"]
    around = " ".join(FILLER)
    paragraphs = [f"{around} A secret number of the gloomy harbour is {code}. {around} It rained." for code in codes]
    messages = dialogue("\n\n".join(paragraphs), "I see.", "What are all the secret numbers of the gloomy harbour?")
    (*_, asking) = replace(search, max_tokens=200).augment(messages, slots=1000)
    assert all(code in asking["content"] for code in codes)
    assert around not in asking["content"]


def test_a_line_is_found_where_a_passage_of_few_words_has_more_tokens_than_may_be_read(search: PassageSearch) -> None:
    draw = Random(0)
    keys = [f"{draw.getrandbits(64):016x}-{draw.getrandbits(64):016x}" for _ in range(40)]
    lines = [f"The special key of {name} is {key}." for name, key in zip(keys[::2], keys[1::2], strict=True)]
    messages = dialogue("\n".join(lines), "I see.", f"What is the special key of {keys[14]}?")
    (*_, asking) = search.augment(messages, slots=1000)
    assert keys[15] in asking["content"]


def test_a_short_answer_is_found_by_its_question(search: PassageSearch) -> None:
    messages = dialogue(
        "How high is the old tower, in feet?", "Ninety.", *FILLER, "Tell me again how high the tower was."
    )
    assert "old tower, in feet?\n\nNinety." in search.augment(messages, slots=1000)[-1]["content"]


def test_only_users_ask(search: PassageSearch) -> None:
    messages = [*dialogue(FACT, "I see."), {"role": "system", "content": "The password?"}]
    assert search.augment(messages, slots=1000) == messages
    asked = dialogue(FACT, "I see.", "The password?")
    assert PassageSearch(search.template, 0).augment(asked, slots=1000) == asked


def test_a_short_system_message_is_repeated_whatever_is_asked_unless_it_is_among_the_recent_ids(
    search: PassageSearch,
) -> None:
    system = {"role": "system", "content": FACT}
    asked = [system, *dialogue(*chatter(7)[1:], "Good morning to you.")]
    assert search.augment(asked, slots=1000)[-1]["content"] == f"{FACT}\n\nGood morning to you."
    assert search.augment(asked, slots=1000, recent_ids=search.template.encode(f"... {FACT}\nRain fell.")) == asked
    wide = PassageSearch(search.template, 4 * BUDGET)
    both = wide.augment([system, *dialogue("The market sells no bread.", "I see.", "The market?")], slots=1000)
    assert both[-1]["content"].startswith(f"{FACT}\n\n{INTRODUCTION}\n\nThe market sells no bread.")


def test_a_system_message_is_repeated_right_before_a_question_or_not_at_all(search: PassageSearch) -> None:
    system, wide = {"role": "system", "content": FACT}, PassageSearch(search.template, 4 * BUDGET)
    long = f"{FILLER[0]} {FILLER[1]} " * 10
    assert wide.augment([system, *dialogue(long)], slots=1000) == [system, *dialogue(long)]
    question = "Good morning to you."
    asking = wide.augment([system, *dialogue(f"{long}\n\n{question}")], slots=300)
    assert asking[-1]["content"] == f"{long}\n\n{FACT}\n\n{question}"


def test_of_a_long_system_message_only_what_is_asked_for_is_repeated(search: PassageSearch) -> None:
    rules = [f"In room {number} nobody may ever open a window or a door without asking first." for number in range(12)]
    system = {"role": "system", "content": "\n\n".join([*rules[:6], f"{FACT} Tell it to nobody.", *rules[6:]])}
    again = search.augment([system, *dialogue("The password of the vault?")], slots=1000)[-1]["content"]
    assert again == f"{INTRODUCTION}\n\n{FACT} Tell it to nobody.\n\nThe password of the vault?"


@pytest.mark.parametrize("asked", ["What is the colour of the captain's hat?", "What about it, then?", "??"])
def test_what_shares_too_little_with_a_question_is_not_read_again(search: PassageSearch, asked: str) -> None:
    chat = dialogue(*(text for fact in chatter(14) for text in (fact, "I see.")), asked)
    assert search.augment(chat, slots=1000) == chat


@pytest.mark.parametrize("way", ["{}", "Could you please tell me: {}", "Question: {}\nAnswer:"])
def test_the_wording_of_a_question_does_not_hide_what_it_is_about(search: PassageSearch, way: str) -> None:
    chat = dialogue(FACT, "I see.", *FILLER, way.format("What is the password of the vault?"))
    assert FACT in search.augment(chat, slots=1000)[-1]["content"]


# -- conversations -----------------------------------------------------------------------------------------------------


def test_what_the_cache_evicted_is_read_again_and_the_usage_says_so(llm: LLM) -> None:
    chat = Chat(llm, "vault")
    for text in chatter(14):
        chat.ask(text)
    answer = chat.ask("What is the password of the harbour vault?")
    read = llm.tokenizer.decode(llm.session("vault").tokens[answer.usage.cached_tokens :])

    assert answer.usage.reuse == "continued"
    assert 0 < answer.usage.retrieved_tokens <= BUDGET + 10
    assert FACT in read
    assert read.index(FACT) < read.index("What is the password of the harbour vault?")
    assert chat.ask("Thank you.").usage.reuse == "continued"  # what was put into the message is no part of it


def test_the_same_request_again_finds_the_passages_read(llm: LLM) -> None:
    chat = Chat(llm, "again")
    for text in chatter(14):
        chat.ask(text)
    first = chat.ask("What is the password of the harbour vault?")
    chat.messages.pop()
    with record_passes() as passes:
        second = chat.reply(sampling=SHORT.replace(lookup=False))  # guesses would be read, too

    assert second.text == first.text
    assert second.usage.reuse == "restored"
    assert sum(passes) <= SHORT.max_tokens + 1


def test_nothing_is_read_twice_while_the_cache_holds_everything() -> None:
    chat = Chat(make_llm(cache=LARGE_CACHE))
    assert {chat.ask(text).usage.retrieved_tokens for text in [*chatter(6), "What is the password?"]} == {0}
    exact = Chat(make_llm(cache=CacheConfig.full()))
    assert {exact.ask(text).usage.retrieved_tokens for text in [*chatter(6), "What is the password?"]} == {0}


def test_a_question_about_a_document_begins_where_the_document_was_read(llm: LLM) -> None:
    text = "\n\n".join(chatter(40, fact_at=20))
    document = llm.read_document(text=text, name="notes")
    chat = Chat(llm, document)
    answer = chat.ask("What is the password of the vault?")
    assert answer.usage.cached_tokens == len(document.tokens)
    assert answer.usage.retrieved_tokens > 0
    assert chat.ask("What was sold in the market?").usage.retrieved_tokens > 0
    assert len(llm.session("notes").tokens) == len(document.tokens)


def test_what_a_turn_reads_stays_bounded() -> None:
    read = {}
    for tokens_again in (0, BUDGET):
        chat, sizes = Chat(make_llm(cache=NOTES, retrieval_tokens=tokens_again)), []
        with record_passes() as passes:
            for text in chatter(24):
                passes.clear()
                chat.ask(text)
                sizes.append(sum(passes))
        read[tokens_again] = sizes[1:]  # the first message brings the template's own
    # What is said again may be cut otherwise into tokens at its edges.
    introduction = len(chat.llm.tokenizer.encode(INTRODUCTION))
    assert max(read[BUDGET]) <= max(read[0]) + BUDGET + introduction + 4
    assert max(read[BUDGET]) > max(read[0])


def test_batches_and_new_conversations_retrieve_the_same() -> None:
    long = [*dialogue(*(text for fact in chatter(16) for text in (fact, "I see."))), *dialogue("What is the password?")]
    alone, together = (make_llm(cache=NOTES, retrieval_tokens=BUDGET) for _ in range(2))
    one = alone.chat(long, sampling=SHORT)
    (other,) = together.batch([long], sampling=SHORT)
    assert one.usage.retrieved_tokens == other.usage.retrieved_tokens > 0
    assert one.usage.prompt_tokens == other.usage.prompt_tokens
    assert one.text == other.text


def test_retrieved_passages_count_for_no_limit() -> None:
    long = [*dialogue(*(text for fact in chatter(16) for text in (fact, "I see."))), *dialogue("What is the password?")]
    plain = make_llm(cache=NOTES, retrieval_tokens=0).count_prompt_tokens(long)
    answer = make_llm(cache=NOTES, retrieval_tokens=BUDGET, max_input_tokens=plain).chat(long, sampling=SHORT)
    assert answer.usage.prompt_tokens == plain + answer.usage.retrieved_tokens > plain


@pytest.mark.parametrize("wrong", [-1, 2.5, True, "many"])
def test_a_setting_that_is_no_number_of_tokens_is_refused_at_once(wrong: object) -> None:
    with pytest.raises(ConfigError, match="retrieval_tokens must be a number of tokens"):
        make_llm(retrieval_tokens=wrong)


# -- what is being read stays ------------------------------------------------------------------------------------------


def test_a_turn_that_fits_into_the_newest_share_is_held_whole_while_it_is_read() -> None:
    config = SMALL_CACHE.replace(slots=64, recent=4, stage=8, recent_share=0.5)
    engine = Engine(tiny_model("qwen2"), config)
    cache = engine.new_cache()
    engine.read(cache, tokens(200))
    assert config.num_recent == (64 - config.sink) // 2
    engine.read(cache, tokens(config.num_recent, seed=1), probe=tokens(3, seed=2))
    end = 200 + config.num_recent
    for layer in cache.layers:
        held = layer.position[0][layer.multiplicity[0] > 0].view(layer.spec.kv_heads, -1)
        assert all(set(range(200, end)) <= set(head.tolist()) for head in held)
    engine.read(cache, tokens(50, seed=3), probe=tokens(3, seed=2))
    newest = [set(head.tolist()) >= set(range(end, end + 50)) for layer in cache.layers for head in layer.position[0]]
    assert not all(newest)  # a longer one has to share


@pytest.mark.parametrize("latest", [0.25, 0.75])
def test_a_multi_turn_conversation_keeps_its_newest_tokens(latest: float) -> None:
    config = SMALL_CACHE.replace(slots=64, recent=4, stage=8, recent_share=latest)
    engine = Engine(tiny_model("qwen2"), config)
    cache = engine.new_cache()
    engine.read(cache, tokens(200), probe=tokens(3, seed=2))
    engine.read(cache, tokens(80, seed=1), probe=tokens(3, seed=2), multi_turn=True)
    cache.compress_stage()
    kept = config.num_recent
    for layer in cache.layers:
        for head in layer.position[0, :, :64]:
            assert set(range(280 - kept, 280)) <= set(head.tolist())
            assert torch.equal(head.unique(), head)
