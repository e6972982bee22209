"""What the system message and the tools say is kept word for word, however long the conversation gets."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chat import SHORT, SMALL_CACHE, Chat, dialogue, make_llm
from tests.support.templates import template
from zsmerge_llm import LLM, CacheConfig

SYSTEM = {"role": "system", "content": "You are Ada. Begin each answer with AHOY."}
MANUAL = {"role": "system", "content": "You are Ada. Begin each answer with AHOY. " * 40}
LOOKUP = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
WIDE = SMALL_CACHE.replace(slots=1024)


def chat_on(llm: LLM, first: list[dict[str, Any]], turns: int = 12, **settings: Any) -> Any:
    """The cache of a conversation that has gone on far beyond its slots."""
    chat = Chat(llm, "it", first)
    for number in range(turns):
        chat.ask(f"Once more, for the {number}th time: what is the {number} of {number * 17}?" * 3, **settings)
    cache = llm.session("it").cache
    assert cache.seen > 2.5 * cache.config.slots
    return cache


def held_by_all(cache: Any, first: int) -> bool:
    """Whether each head of each layer still holds the first tokens."""
    wanted = set(range(first))
    heads = [
        set(positions[count > 0].tolist())
        for layer in cache.layers
        for positions, count in zip(layer.position[0], layer.multiplicity[0], strict=True)
    ]
    return all(wanted <= head for head in heads)


def length(name: str, messages: list[dict[str, Any]], tools: Any = None) -> int:
    """Tokens of a system message and tools, up to where the user's message begins."""
    text = template(name).render([*messages, *dialogue("\x1f")], tools)
    return len(template(name).encode(text.partition("\x1f")[0].rpartition("<|im_start|>")[0]))


def test_every_head_holds_the_whole_system_message_for_ever() -> None:
    llm = make_llm()
    cache = chat_on(llm, [SYSTEM])

    assert 4 < length("smollm2", [SYSTEM]) <= cache.config.sink <= SMALL_CACHE.slots // 2
    assert held_by_all(cache, cache.config.sink)
    assert not held_by_all(chat_on(make_llm(), []), cache.config.sink)


def test_it_is_repeated_once_it_is_as_many_tokens_behind_as_there_are_slots() -> None:
    llm = make_llm(cache=SMALL_CACHE.replace(slots=256))
    chat = Chat(llm, "it", [SYSTEM])
    again = [chat.ask(f"Go on with {number}.").usage.retrieved_tokens for number in range(40)]
    text = llm.tokenizer.decode(llm.session("it").tokens)
    parts = [len(llm.tokenizer.encode(part)) for part in text.split(SYSTEM["content"])]

    assert len(parts) > 4
    assert max(parts[1:]) <= 256 + 64  # a turn more at most
    assert min(parts[1:-1]) >= 256 - 64
    assert sum(count > 0 for count in again) == len(parts) - 2


def test_tools_are_held_as_the_system_message_is() -> None:
    llm = make_llm("qwen2.5", cache=WIDE)
    cache = chat_on(llm, [SYSTEM], 24, tools=[LOOKUP], tool_choice="none")

    assert length("qwen2.5", [SYSTEM], [LOOKUP]) <= cache.config.sink
    assert held_by_all(cache, cache.config.sink)


@pytest.mark.parametrize("name", ["gemma2", "llama2", "mistral-v0.3"])
def test_a_system_message_that_is_folded_into_the_question_is_held_too(name: str) -> None:
    llm = make_llm(name, cache=SMALL_CACHE.replace(slots=160))
    cache = chat_on(llm, [SYSTEM])
    read = [llm.tokenizer.decode(llm.session("it").tokens[:end]) for end in range(cache.config.sink + 1)]

    assert any("Begin each answer with AHOY." in text for text in read)
    assert held_by_all(cache, cache.config.sink)


def test_tools_in_the_user_s_message_are_held_as_well() -> None:
    llm = make_llm("llama3", cache=WIDE)
    cache = chat_on(llm, [], 24, tools=[LOOKUP], tool_choice="none")
    text = llm.tokenizer.decode(llm.session("it").tokens[: cache.config.sink])

    assert '"name": "look"' in text
    assert held_by_all(cache, cache.config.sink)


def test_a_restart_and_a_fork_keep_it(tmp_path: Any) -> None:
    llm = make_llm(sessions_dir=tmp_path)
    chat = Chat(llm, "it", [SYSTEM])
    chat.ask("Hello")
    again = Chat(make_llm(sessions_dir=tmp_path), "it", chat.messages)
    for number in range(12):
        assert again.ask(f"What is {number} and {number}? " * 6).usage.reuse == "continued"
    cache = again.llm.session("it").cache

    assert held_by_all(cache, cache.config.sink)
    assert again.llm.session("it").fork("other").cache.config == cache.config


def test_one_that_takes_up_more_than_half_of_the_slots_is_not_pinned() -> None:
    llm = make_llm()
    llm.chat([MANUAL, *dialogue("Hello")], session="it", sampling=SHORT)

    assert length("smollm2", [MANUAL]) > SMALL_CACHE.slots // 2
    assert llm.session("it").cache.config.sink == SMALL_CACHE.sink


@pytest.mark.parametrize("preset", [CacheConfig.h2o(96), CacheConfig.paper(96), CacheConfig.streaming(96)])
def test_other_policies_pin_nothing(preset: CacheConfig) -> None:
    llm = make_llm(cache=preset)
    llm.chat([SYSTEM, *dialogue("Hello")], session="it", sampling=SHORT)

    assert llm.session("it").cache.config.sink == preset.sink


def test_conversations_with_system_messages_of_like_length_decode_in_one_pass() -> None:
    llm = make_llm(cache=WIDE)
    for name, system in (("one", SYSTEM), ("two", {**SYSTEM, "content": SYSTEM["content"] + " And be brief."})):
        llm.chat([system, *dialogue("Hello")], session=name, sampling=SHORT)

    assert llm.session("one").cache.config == llm.session("two").cache.config
    assert llm.session("one").cache.config.sink > SMALL_CACHE.sink


def test_prompts_of_a_batch_have_their_system_messages_pinned_too() -> None:
    long = [SYSTEM, *dialogue("What now, after all that was said? " * 60)]
    alone, together = make_llm(), make_llm()

    assert together.batch([long, long], sampling=SHORT)[1].text == alone.chat(long, sampling=SHORT).text
