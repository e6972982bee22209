"""A question about something that earlier ones did not need: the conversation is read again for it."""

from __future__ import annotations

import pytest

from tests.support.talk import SHORT, TIGHT, Talk, talker
from zsmerge_llm import LLM

STORY = "Ada lives in the tower. " * 30


@pytest.fixture(scope="module")
def llm() -> LLM:
    return talker()


def test_the_whole_conversation_is_read_again_and_the_usage_says_so(llm: LLM) -> None:
    talk = Talk(llm, "tower")
    talk.tell(f"{STORY}\nWho?")
    second = talk.tell("Where?", reread=True)

    assert second.usage.cached_tokens == 0
    assert second.usage.reuse == "reread: asked for"
    third = talk.tell("When?")
    assert third.usage.reuse == "continued"
    assert third.usage.cached_tokens > second.usage.prompt_tokens


def test_it_is_kept_for_this_question_alone(llm: LLM) -> None:
    """As if it had been asked of a model that never heard the conversation before, and holds nothing in reserve."""
    talk = Talk(llm, "alone")
    talk.tell(f"{STORY}\nWho?")
    talk.tell("Where?", reread=True)
    fresh = Talk(talker(cache=TIGHT.replace(history_share=0.0)), "alone", talk.messages[:2])
    fresh.tell("Where?")

    mine, theirs = (each.llm.session("alone").snapshots.values() for each in (talk, fresh))
    at_prompt = [next(point for point in points if point.kind == "prompt") for points in (mine, theirs)]
    for a, b in zip(at_prompt[0].cache.layers, at_prompt[1].cache.layers, strict=True):
        assert (a.position == b.position).all()


def test_a_document_is_read_again_for_a_question_about_it(llm: LLM) -> None:
    document = llm.read_document(text=STORY * 2, name="story")
    answer = llm.chat("Where?", session=document, reread=True, sampling=SHORT)

    assert answer.usage.cached_tokens == 0
    assert answer.usage.prompt_tokens > llm.count_tokens(STORY * 2)
    again = llm.chat("Who?", session=document, sampling=SHORT)
    assert again.usage.cached_tokens > 0  # the document as it was read ahead is still there
