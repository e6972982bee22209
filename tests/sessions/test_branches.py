"""Answers given again, messages edited, questions aside: a conversation branches and is not read anew for it."""

from __future__ import annotations

import pytest

from tests.support.chat import LARGE_CACHE, SHORT, SYSTEM, Chat, dialogue, make_llm, record_passes
from tests.support.templates import SPECIAL_TOKENS
from zsmerge_llm import SamplingParams


@pytest.mark.parametrize("edited", [False, True])
def test_side_questions_read_only_themselves_however_many_they_are(edited: bool) -> None:
    """Where the answers are the caller's own words too: what a frame or a guard makes of them."""
    llm = make_llm(cache=LARGE_CACHE)
    chat, sizes = Chat(llm, "it"), []
    for turn in range(8):
        chat.ask(f"Question {turn}")
        if edited:
            chat.messages[-1]["content"] = f"Answer {turn}"
    for turn in range(6):
        aside = llm.chat([*chat.messages, *dialogue(f"Aside {turn}")], sampling=SHORT).usage
        sizes.append(aside.prompt_tokens - aside.cached_tokens)

    assert max(sizes) <= sizes[0] + 2
    assert max(len(llm.session(info.name).snapshots) for info in llm.store) <= 7


def test_regenerating_an_answer_reads_nothing() -> None:
    llm = make_llm()
    chat = Chat(llm, "it")
    first = [chat.ask("Hello").text, chat.ask("More").text]
    with record_passes() as passes:
        again = llm.chat(chat.messages[:-1], session="it", sampling=SHORT)

    assert again.usage.reuse == "restored"
    assert again.usage.cached_tokens == again.usage.prompt_tokens
    assert passes == [1] * len(passes)
    assert again.text == first[1]
    assert len(llm.store) == 1


def test_an_answer_that_was_replaced_can_be_continued() -> None:
    llm = make_llm()
    chat = Chat(llm, "it")
    chat.ask("Hello")
    old = list(chat.messages)
    llm.chat(old[:-1], session="it", sampling=SamplingParams(max_tokens=6, temperature=2.0, seed=1))
    back = llm.chat([*old, *dialogue("Go on")], session="it", sampling=SHORT)

    assert back.usage.reuse == "restored"
    assert len(llm.store) == 1


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS])
def test_the_last_message_and_the_answer_before_can_be_edited(name: str) -> None:
    llm = make_llm(name, cache=LARGE_CACHE)
    chat = Chat(llm, "it")
    for turn in range(3):
        chat.ask(f"Question {turn}")
    messages = chat.messages[:-2]
    last = llm.chat([*messages, *dialogue("Another question")], session="it", sampling=SHORT)
    answer = {"role": "assistant", "content": "I was told to say this."}
    told = llm.chat([*messages[:-1], answer, *dialogue("Was I?")], session="it", sampling=SHORT)
    text = llm.tokenizer.decode(llm.session("it").tokens)

    assert last.usage.reuse == "restored"
    assert 0 < last.usage.cached_tokens < last.usage.prompt_tokens
    assert told.usage.reuse.startswith(("restored", "reread: the chat template"))
    assert text.count("I was told to say this.") == 1
    assert text.count("Question 2") == 0


def test_an_edit_of_any_earlier_message_resumes_from_a_snapshot_not_far_before_it() -> None:
    llm = make_llm(cache=LARGE_CACHE)
    chat = Chat(llm, "it")
    sizes = [chat.ask(f"Question {turn}").usage.prompt_tokens for turn in range(40)]
    session = llm.session("it")
    kinds = [snapshot.kind for snapshot in session.snapshots.values()]
    kept = sorted(snapshot.messages // 2 for snapshot in session.snapshots.values() if snapshot.kind == "answer")

    assert kinds.count("answer") == 4
    assert kinds.count("prompt") == 1
    assert kept[-2:] == [39, 40]
    for turn in range(kept[0], 40):
        back = max(at for at in kept if at <= turn)
        assert turn - back <= 40 - turn + 2, kept  # never much more to read again than there is behind it
    edited = llm.chat([*chat.messages[: 2 * kept[1]], *dialogue("Instead")], session="it", sampling=SHORT)
    assert edited.usage.reuse == "restored"
    assert edited.usage.cached_tokens > sizes[kept[1] - 1]


def test_an_edit_before_every_snapshot_left_reads_all_again_and_says_why() -> None:
    llm = make_llm()
    chat = Chat(llm, "it")
    for turn in range(9):
        chat.ask(f"Question {turn}")
    edited = llm.chat([*chat.messages[:2], *dialogue("Instead")], sampling=SHORT)

    assert edited.usage.reuse == "reread: no snapshot of this conversation before message 3 is left"
    assert edited.usage.cached_tokens == 0
    assert chat.ask("Are you there?").usage.reuse == "continued"


def test_a_second_request_on_the_same_conversation_becomes_a_branch() -> None:
    llm = make_llm()
    chat = Chat(llm, "it")
    chat.ask("Hello")
    messages = list(chat.messages)
    left, right = (llm.stream([*messages, *dialogue(text)], session="it", sampling=SHORT) for text in ("Left", "Right"))
    for _ in range(3):
        next(left), next(right)
    assert [chunk.finish_reason for chunk in left][-1] != "cancelled"  # first come, so it keeps the name
    assert [chunk.finish_reason for chunk in right][-1] != "cancelled"

    assert len(llm.store) == 2
    held = {info.name: llm.tokenizer.decode(llm.session(info.name).tokens) for info in llm.store}
    assert sorted(("Left" in text, "Right" in text) for text in held.values()) == [(False, True), (True, False)]
    assert "Left" in held["it"]


def test_a_fork_continues_by_itself_under_its_name() -> None:
    llm = make_llm()
    chat = Chat(llm, "it")
    chat.ask("Hello")
    fork = llm.session("it").fork("branch")
    before = llm.session("it").tokens
    bytes_before = llm.store.nbytes
    llm.add_session(fork)
    assert llm.store.nbytes == bytes_before  # what they share counts once
    branch = Chat(llm, fork, chat.messages)

    assert branch.ask("Elsewhere").usage.reuse == "continued"
    assert llm.session("it").tokens == before
    assert len(llm.session("branch").tokens) > len(before)
    assert chat.ask("Here").usage.reuse == "continued"
    assert len(llm.store) == 2


def test_snapshots_are_bounded_however_a_conversation_branches() -> None:
    llm = make_llm()
    chat = Chat(llm, "it", [SYSTEM])
    for turn in range(12):
        chat.ask(f"Question {turn}")
        llm.chat(chat.messages[:-1], session="it", sampling=SamplingParams(max_tokens=3, temperature=1.5, seed=turn))
        llm.chat([*chat.messages[:-2], *dialogue("Instead")], session="it", sampling=SHORT)
        chat.session = "it"

    assert max(len(llm.session(info.name).snapshots) for info in llm.store) <= 6
