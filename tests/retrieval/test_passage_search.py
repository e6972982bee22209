"""What the cache has lost is looked up in what was said, and read again before the question that asks for it."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.talk import ROOMY, SHORT, TIGHT, Talk, counted, said, talker
from tests.support.templates import template
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import LLM, CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.retrieval.passage_search import HEADING, OPENING, TERM, WORDS, PassageSearch, content, ranked, split

FACT = "The password of the harbour vault is falcon seven."
FILLER = ["Rain fell on the quiet village all day long.", "Nobody in the market sold any bread that week."]
BUDGET = 96
NOTES = CacheConfig(slots=192, recent=16, stage=16, observation_window=8)


def chatter(turns: int, fact_at: int = 0) -> list[str]:
    """Messages of a user, one of which holds the fact."""
    return [FACT if turn == fact_at else f"{FILLER[turn % 2]} Day {turn}." for turn in range(turns)]


@pytest.fixture(scope="module")
def recall() -> PassageSearch:
    return PassageSearch(template("smollm2"), BUDGET)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return talker(cache=NOTES, retrieval_tokens=BUDGET)


# -- the search --------------------------------------------------------------------------------------------------------


@given(st.text(st.sampled_from("ab .,\n!?。é中文"), max_size=900))
def test_passages_are_the_text_in_order_and_none_is_long(text: str) -> None:
    passages = split(text)
    assert re.findall(TERM, " ".join(passages)) == re.findall(TERM, text)
    assert all(len(re.findall(TERM, each)) <= 4 * WORDS for each in passages)
    at = 0
    for each in passages:
        at = text.index(each, at) + len(each)


def test_a_passage_ends_with_a_sentence_and_a_heading_belongs_to_what_follows() -> None:
    sentence = "One two three four five six seven eight nine ten. "
    first, second = split(f"A heading\n\n{sentence * 8}\n\nAnother heading\n\n{sentence * 5}")
    assert first.startswith("A heading\n\n")
    assert second.startswith("Another heading\n\n")
    assert len(split(sentence * 30)) == 4
    assert all(each.endswith(".") for each in split(sentence * 30))
    assert len(re.findall(TERM, "A heading")) < HEADING


def test_the_passage_with_the_rarest_common_words_comes_first() -> None:
    passages = [*FILLER, FACT, "The harbour was busy, and the village slept."]
    assert ranked(passages, "What is the password of the vault?")[0] == 2
    assert ranked(passages, "Which PASSWORDS?") == [2]  # other endings, other letters
    assert ranked(["今天下雨。", "密码是七。"], "密码是什么")[0] == 1
    assert ranked(passages, "...") == ranked(["..."], "password") == ranked([], "password") == []


# -- where passages go -------------------------------------------------------------------------------------------------


def test_passages_stand_before_a_short_message_within_the_budget(recall: PassageSearch) -> None:
    messages = said(*(text for fact in chatter(9) for text in (fact, "I see.")), "What is the password of the vault?")
    asking = recall.into(messages, slots=1000)
    block = asking[-1]["content"].removesuffix("What is the password of the vault?")
    assert asking[:-1] == messages[:-1]
    assert block.startswith(OPENING)
    assert FACT in block
    assert 0 < len(recall.template.encode(block)) <= BUDGET + len(recall.template.encode(OPENING + "\n\n"))
    assert recall.into(messages, slots=8) == messages  # half of so small a cache has no room for a passage


@pytest.mark.parametrize("ending", ["What is the password?", "Query: What is the password?\nAnswer: "])
def test_the_end_of_a_long_message_asks_for_what_stands_before_it(recall: PassageSearch, ending: str) -> None:
    text = "\n\n".join(FILLER[at % 2] if at != 7 else FACT for at in range(40))
    (asking,) = recall.into([{"role": "user", "content": f"{text}\n\n{ending}"}], slots=180)
    assert asking["content"].startswith(f"{text}\n\n{OPENING}")
    assert FACT in asking["content"][len(text) :]
    assert asking["content"].endswith(f"\n\n{ending}")


def test_a_short_answer_is_found_by_its_question(recall: PassageSearch) -> None:
    messages = said("How high is the old tower, in feet?", "Ninety.", *FILLER, "Tell me again how high the tower was.")
    assert "old tower, in feet?\n\nNinety." in recall.into(messages, slots=1000)[-1]["content"]


def test_only_users_ask(recall: PassageSearch) -> None:
    result = {"role": "tool", "content": FACT, "tool_call_id": "1"}
    messages = [*said(FACT, "I see."), result]
    assert recall.into(messages, slots=1000) == messages
    asked = said(FACT, "I see.", "The password?")
    assert PassageSearch(recall.template, 0).into(asked, slots=1000) == asked


def test_a_short_system_message_is_said_again_whatever_is_asked_unless_it_was_just_heard(recall: PassageSearch) -> None:
    system = {"role": "system", "content": FACT}
    asked = [system, *said(*chatter(7)[1:], "Good morning to you.")]
    assert recall.into(asked, slots=1000)[-1]["content"] == f"{FACT}\n\nGood morning to you."
    assert recall.into(asked, slots=1000, heard=recall.template.encode(f"... {FACT}\nRain fell.")) == asked
    wide = PassageSearch(recall.template, 4 * BUDGET)
    both = wide.into([system, *said("The market sells no bread.", "I see.", "The market?")], slots=1000)
    assert both[-1]["content"].startswith(f"{FACT}\n\n{OPENING}\n\nThe market sells no bread.")


def test_a_system_message_is_said_again_right_before_a_question_or_not_at_all(recall: PassageSearch) -> None:
    system, wide = {"role": "system", "content": FACT}, PassageSearch(recall.template, 4 * BUDGET)
    long = f"{FILLER[0]} {FILLER[1]} " * 10
    assert wide.into([system, *said(long)], slots=1000) == [system, *said(long)]
    question = "Good morning to you."
    asking = wide.into([system, *said(f"{long}\n\n{question}")], slots=300)
    assert asking[-1]["content"] == f"{long}\n\n{FACT}\n\n{question}"


def test_of_a_long_system_message_only_what_is_asked_for_is_said_again(recall: PassageSearch) -> None:
    rules = [f"In room {number} nobody may ever open a window or a door without asking first." for number in range(12)]
    system = {"role": "system", "content": "\n\n".join([*rules[:6], f"{FACT} Tell it to nobody.", *rules[6:]])}
    again = recall.into([system, *said("The password of the vault?")], slots=1000)[-1]["content"]
    assert again == f"{OPENING}\n\n{FACT} Tell it to nobody.\n\nThe password of the vault?"


@pytest.mark.parametrize("asked", ["What is the colour of the captain's hat?", "What about it, then?", "??"])
def test_what_shares_too_little_with_a_question_is_not_read_again(recall: PassageSearch, asked: str) -> None:
    chat = said(*(text for fact in chatter(14) for text in (fact, "I see.")), asked)
    assert recall.into(chat, slots=1000) == chat


@pytest.mark.parametrize("way", ["{}", "Could you please tell me: {}", "Question: {}\nAnswer:"])
def test_how_a_question_is_put_does_not_hide_what_it_is_about(recall: PassageSearch, way: str) -> None:
    chat = said(FACT, "I see.", *FILLER, way.format("What is the password of the vault?"))
    assert FACT in recall.into(chat, slots=1000)[-1]["content"]


def test_common_words_are_left_out_in_the_language_of_the_question() -> None:
    assert content("When did the war end?") == ["war", "end"]
    assert content("Wie heißt der Kapitän, der die Reise begann?") == ["heißt", "kapit", "reise", "began"]


# -- conversations -----------------------------------------------------------------------------------------------------


def test_what_a_conversation_lost_is_read_again_and_the_usage_says_so(llm: LLM) -> None:
    talk = Talk(llm, "vault")
    for text in chatter(14):
        talk.tell(text)
    answer = talk.tell("What is the password of the harbour vault?")
    read = llm.tokenizer.decode(llm.session("vault").tokens[answer.usage.cached_tokens :])

    assert answer.usage.reuse == "continued"
    assert 0 < answer.usage.retrieved_tokens <= BUDGET + 10
    assert FACT in read
    assert read.index(FACT) < read.index("What is the password of the harbour vault?")
    assert talk.tell("Thank you.").usage.reuse == "continued"  # what was put into the message is no part of it


def test_the_same_request_again_finds_the_passages_read(llm: LLM) -> None:
    talk = Talk(llm, "again")
    for text in chatter(14):
        talk.tell(text)
    first = talk.tell("What is the password of the harbour vault?")
    talk.messages.pop()
    with counted() as passes:
        second = talk.again(sampling=SHORT.replace(lookup=False))  # guesses would be read, too

    assert second.text == first.text
    assert second.usage.reuse == "restored"
    assert sum(passes) <= SHORT.max_tokens + 1


def test_nothing_is_read_twice_while_the_cache_holds_everything() -> None:
    talk = Talk(talker(cache=ROOMY))
    assert {talk.tell(text).usage.retrieved_tokens for text in [*chatter(6), "What is the password?"]} == {0}
    exact = Talk(talker(cache=CacheConfig.full()))
    assert {exact.tell(text).usage.retrieved_tokens for text in [*chatter(6), "What is the password?"]} == {0}


def test_a_question_about_a_document_begins_where_the_document_was_read(llm: LLM) -> None:
    text = "\n\n".join(chatter(40, fact_at=20))
    document = llm.read_document(text=text, name="notes")
    talk = Talk(llm, document)
    answer = talk.tell("What is the password of the vault?")
    assert answer.usage.cached_tokens == len(document.tokens)
    assert answer.usage.retrieved_tokens > 0
    assert talk.tell("What was sold in the market?").usage.retrieved_tokens > 0
    assert len(llm.session("notes").tokens) == len(document.tokens)


def test_what_a_turn_reads_stays_bounded() -> None:
    read = {}
    for tokens_again in (0, BUDGET):
        talk, sizes = Talk(talker(cache=NOTES, retrieval_tokens=tokens_again)), []
        with counted() as passes:
            for text in chatter(24):
                passes.clear()
                talk.tell(text)
                sizes.append(sum(passes))
        read[tokens_again] = sizes[1:]  # the first message brings the template's own
    # What is said again may be cut otherwise into tokens at its edges.
    assert max(read[BUDGET]) <= max(read[0]) + BUDGET + 10
    assert max(read[BUDGET]) > max(read[0])


def test_batches_and_new_conversations_look_up_the_same() -> None:
    long = [*said(*(text for fact in chatter(16) for text in (fact, "I see."))), *said("What is the password?")]
    alone, together = (talker(cache=NOTES, retrieval_tokens=BUDGET) for _ in range(2))
    one = alone.chat(long, sampling=SHORT)
    (other,) = together.batch([long], sampling=SHORT)
    assert one.usage.retrieved_tokens == other.usage.retrieved_tokens > 0
    assert one.usage.prompt_tokens == other.usage.prompt_tokens
    assert one.text == other.text


def test_what_is_looked_up_counts_for_no_limit() -> None:
    long = [*said(*(text for fact in chatter(16) for text in (fact, "I see."))), *said("What is the password?")]
    plain = talker(cache=NOTES, retrieval_tokens=0).count_prompt_tokens(long)
    answer = talker(cache=NOTES, retrieval_tokens=BUDGET, max_input_tokens=plain).chat(long, sampling=SHORT)
    assert answer.usage.prompt_tokens == plain + answer.usage.retrieved_tokens > plain


@pytest.mark.parametrize("wrong", [-1, 2.5, True, "many"])
def test_a_setting_that_is_no_number_of_tokens_is_refused_at_once(wrong: object) -> None:
    with pytest.raises(ConfigError, match="retrieval_tokens must be a number of tokens"):
        talker(retrieval_tokens=wrong)


# -- what is being read stays ------------------------------------------------------------------------------------------


def test_a_turn_that_fits_into_the_newest_share_is_held_whole_while_it_is_read() -> None:
    config = TIGHT.replace(slots=64, recent=4, stage=8, recent_share=0.5)
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
def test_a_conversation_that_goes_on_keeps_its_newest_tokens(latest: float) -> None:
    config = TIGHT.replace(slots=64, recent=4, stage=8, recent_share=latest)
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
