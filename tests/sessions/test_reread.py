"""A question about something that earlier ones did not need: the conversation is read again for it."""

from __future__ import annotations

import pytest

from tests.support.chat import SHORT, SMALL_CACHE, Chat, make_llm
from zsmerge_llm import LLM

STORY = "Ada lives in the tower. " * 30


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm()


def test_the_whole_conversation_is_read_again_and_the_usage_says_so(llm: LLM) -> None:
    chat = Chat(llm, "tower")
    chat.ask(f"{STORY}\nWho?")
    second = chat.ask("Where?", reread=True)

    assert second.usage.cached_tokens == 0
    assert second.usage.reuse == "reread: asked for"
    third = chat.ask("When?")
    assert third.usage.reuse == "continued"
    assert third.usage.cached_tokens > second.usage.prompt_tokens


def test_it_is_kept_for_this_question_alone(llm: LLM) -> None:
    """As if it had been asked of a model that never heard the conversation before, and holds nothing in reserve."""
    chat = Chat(llm, "alone")
    chat.ask(f"{STORY}\nWho?")
    chat.ask("Where?", reread=True)
    fresh = Chat(make_llm(cache=SMALL_CACHE.replace(history_share=0.0)), "alone", chat.messages[:2])
    fresh.ask("Where?")

    mine, theirs = (each.llm.session("alone").snapshots.values() for each in (chat, fresh))
    at_prompt = [next(each for each in snapshots if each.kind == "prompt") for snapshots in (mine, theirs)]
    for a, b in zip(at_prompt[0].cache.layers, at_prompt[1].cache.layers, strict=True):
        assert (a.position == b.position).all()


def test_a_document_is_read_again_for_a_question_about_it(llm: LLM) -> None:
    document = llm.read_document(text=STORY * 2, name="story")
    answer = llm.chat("Where?", session=document, reread=True, sampling=SHORT)

    assert answer.usage.cached_tokens == 0
    assert answer.usage.prompt_tokens > llm.count_tokens(STORY * 2)
    again = llm.chat("Who?", session=document, sampling=SHORT)
    assert again.usage.cached_tokens > 0  # the document as it was read ahead is still there
