"""A conversation is recognised by its content and every token of it is read once, whatever its template does."""

from __future__ import annotations

import itertools
from datetime import date
from pathlib import Path
from threading import Event
from typing import Any
from unittest import mock

import pytest
import torch

from tests.support.chat import (
    LARGE_CACHE,
    SHORT,
    SMALL_CACHE,
    SYSTEM,
    Chat,
    dialogue,
    make_llm,
    record_passes,
    scripted_ids,
)
from tests.support.templates import SPECIAL_TOKENS, TOOLS, generated_text, long_chat
from zsmerge_llm import LLM, CacheConfig, Grammar, SamplingParams
from zsmerge_llm.errors import InputError
from zsmerge_llm.kvcache.cache_state import cache_state
from zsmerge_llm.language.chat_template import normalize_messages
from zsmerge_llm.sessions.conversations import Conversations


def steps(name: str) -> list[list[dict[str, Any]]]:
    """A 12-turn chat with tool calls and results; with a system message where the template takes one."""
    chat = long_chat(12)
    if name == "gemma2":
        del chat[0][0]
    return chat


def greedy(llm: LLM, cache: Any, count: int = 6) -> list[int]:
    """The ids that follow, greedily; the cache is left alone."""
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return [token for (token,) in llm.engine.decode(cache.clone(), [params], [[]]) if token is not None]


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS])
def test_twelve_turns_with_tools_read_every_token_once_and_as_a_fresh_read_does(name: str) -> None:
    llm, chat = make_llm(name, cache=LARGE_CACHE), steps(name)
    replies = [normalize_messages([*step[:1], {"role": "user", "content": "-"}])[0] for step in chat[1:]]
    replies.append({"role": "assistant", "content": "the end"})
    encode, end = llm._load().template.encode, llm.tokenizer.eos_token_id
    script = {at: [*encode(generated_text(name, reply)), end] for at, reply in enumerate(replies)}

    messages: list[dict[str, Any]] = []
    with record_passes() as passes, scripted_ids(script, dict(enumerate(replies))):
        for turn, step in enumerate(chat):
            messages += step
            before = llm.session("it").cache.seen if turn else 0
            answer = llm.chat(messages, tools=TOOLS, session="it")
            session = llm.session("it")
            assert answer.usage.reuse == ("continued" if turn else "new")
            assert answer.usage.cached_tokens == before
            assert answer.usage.prompt_tokens + len(script[turn]) - 1 == len(session.tokens)
            assert sum(passes) == session.cache.seen == len(session.tokens)
    fresh = llm.engine.read(llm.engine.new_cache(), session.tokens)
    torch.testing.assert_close(session.cache.logits[0].float(), fresh, rtol=1e-3, atol=1e-3)
    assert len(llm.store) == 1


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS])
def test_greedy_answers_equal_those_of_a_fresh_read_of_the_same_ids(name: str) -> None:
    llm = make_llm(name, cache=LARGE_CACHE)
    system = [] if name == "gemma2" else [SYSTEM]
    chat = Chat(llm, "it", system)
    for turn in range(12):
        result = chat.ask(f"Question {turn}, what now?")
        session = llm.session("it")
        prompt = session.tokens[: result.usage.prompt_tokens]
        fresh = llm.engine.new_cache()
        logits = llm.engine.read(fresh, prompt)
        asked = [snapshot for snapshot in session.snapshots.values() if snapshot.kind in ("prompt", "branch")][-1]
        cache, header = asked.cache.clone(), prompt[len(asked.tokens) :]
        assert [*asked.tokens, *header] == prompt
        if header:  # a template that leaves out reasoning: the snapshot is before it
            llm.engine.read(cache, header)
        torch.testing.assert_close(cache.logits[0].float(), logits, rtol=1e-3, atol=1e-3)
        answer = session.tokens[len(prompt) :]
        assert greedy(llm, fresh)[: len(answer)] == answer
        assert result.usage.reuse == ("continued" if turn else "new")


@pytest.mark.parametrize("session", [None, "alice", "changing"])
def test_a_conversation_is_found_without_a_name_with_its_name_and_with_a_wrong_one(session: str | None) -> None:
    llm = make_llm()
    chat = Chat(llm, session)
    chat.ask("Hello")
    for turn in range(4):
        chat.session = f"name-{turn}" if session == "changing" else session
        assert chat.ask(f"And {turn}?").usage.reuse == "continued"

    assert len(llm.store) == (5 if session == "changing" else 1)


def test_two_conversations_under_one_name_are_never_mixed() -> None:
    llm, alone = make_llm(), make_llm()
    one, two = Chat(llm, "same"), Chat(llm, "same")
    answers = [(one.ask(f"A {turn}").text, two.ask(f"B {turn}").text) for turn in range(3)]
    lone_one, lone_two = Chat(alone), Chat(alone)

    assert answers == [(lone_one.ask(f"A {turn}").text, lone_two.ask(f"B {turn}").text) for turn in range(3)]
    tokens = llm.session("same").tokens
    assert llm.tokenizer.decode(tokens).count("B 2") == 1
    assert llm.tokenizer.decode(tokens).count("A ") == 0


def test_a_name_that_is_another_conversations_is_taken_over_and_the_reason_given() -> None:
    llm = make_llm()
    first = Chat(llm, "alice")
    first.ask("Hello")
    second = llm.chat("Quite another thing", session="alice", sampling=SHORT)

    assert second.usage.reuse == "reread: the messages and tools are not those of session 'alice'"
    assert "Quite another" in llm.tokenizer.decode(llm.session("alice").tokens)
    first.session = None
    assert first.ask("Are you still there?").usage.reuse == "continued"  # it goes on without the name


def test_other_tools_make_another_conversation() -> None:
    llm = make_llm("qwen2.5")
    chat = Chat(llm, "it")
    chat.ask("Hello", tools=TOOLS)

    assert chat.ask("And now?").usage.reuse.startswith("reread: the messages and tools")
    assert chat.ask("And now?").usage.reuse == "continued"


def test_a_common_prefix_is_read_once_for_all_conversations() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE)
    first = llm.chat([SYSTEM, *dialogue("One")], sampling=SHORT)
    with record_passes() as passes:
        second = llm.chat([SYSTEM, *dialogue("Two")], sampling=SHORT)

    assert (first.usage.reuse, second.usage.reuse) == ("new", "restored")
    assert second.usage.cached_tokens > 64
    assert sum(passes[:1]) < 40
    assert len(llm.store) == 2


def test_cancelling_while_reading_changes_nothing() -> None:
    llm = make_llm(chunk=16)
    chat = Chat(llm, "it")
    chat.ask("Hello")
    before = llm.session("it").tokens
    cancel = Event()
    result = llm.chat(
        [*chat.messages, *dialogue("Read this, " * 30)],
        session="it",
        cancel=cancel,
        progress=lambda done, total: cancel.set() if done > 40 else None,
    )

    assert result.finish_reason == "cancelled"
    assert result.text == ""
    assert llm.session("it").tokens == before
    assert chat.ask("Never mind").usage.reuse == "continued"


def test_cancelling_a_new_conversation_while_reading_leaves_its_name_to_the_old_one() -> None:
    llm = make_llm("qwen2.5", cache=LARGE_CACHE, chunk=16)
    Chat(llm, "it").ask("Hello")
    before = llm.session("it").tokens
    cancel = Event()
    llm.chat([SYSTEM, *dialogue("x" * 90)], session="it", cancel=cancel, progress=lambda done, _: cancel.set())

    assert llm.session("it").tokens == before
    assert len(llm.store) == 1


@pytest.mark.parametrize("how", ["event", "close"])
def test_cancelling_an_answer_leaves_the_prompt_read(how: str) -> None:
    llm = make_llm()
    chat = Chat(llm, "it")
    chat.ask("Hello")
    cancel = Event()
    messages = [*chat.messages, *dialogue("A long answer, please")]
    stream = llm.stream(messages, session="it", sampling=SamplingParams(max_tokens=50, ignore_eos=True), cancel=cancel)
    pieces = list(itertools.islice(stream, 3))
    if how == "event":
        cancel.set()
        assert [chunk.finish_reason for chunk in stream][-1] == "cancelled"
    else:
        stream.close()

    kinds = [snapshot.kind for snapshot in llm.session("it").snapshots.values()]
    assert (kinds.count("prompt"), llm.session("it").head.kind) == (1, "answer")
    with record_passes() as passes:
        again = llm.chat(messages, session="it", sampling=SHORT)
    assert (again.usage.reuse, passes) == ("restored", [1] * len(passes))
    part = {"role": "assistant", "content": "".join(chunk.text for chunk in pieces)}
    assert llm.chat([*messages, part, *dialogue("Go on")], session="it", sampling=SHORT).usage.reuse == "restored"


def test_the_date_stays_that_of_the_day_on_which_a_conversation_began() -> None:
    llm = make_llm("llama3", cache=LARGE_CACHE)
    object.__setattr__(llm._load().conversations, "today", lambda: day)
    day = date(2024, 5, 1)
    old = Chat(llm, "old", [SYSTEM])
    old.ask("Hello")
    day = date(2024, 5, 2)
    new = Chat(llm, "new", [SYSTEM])

    assert new.ask("Good morning").usage.reuse == "new"  # yesterday's beginning shows yesterday's date
    assert old.ask("And now?").usage.reuse == "continued"
    decode = llm.tokenizer.decode
    assert "01 May 2024" in decode(llm.session("old").tokens)
    assert "02 May 2024" in decode(llm.session("new").tokens)
    assert "02 May 2024" not in decode(llm.session("old").tokens)


def test_thinking_stays_in_the_session_when_the_caller_sends_it_back_without() -> None:
    llm = make_llm("qwen3", cache=LARGE_CACHE)
    encode, end = llm._load().template.encode, llm.tokenizer.eos_token_id
    texts = ["<think>\nWell.\n</think>\n\nFirst answer", "<think>\nHm.\n</think>\n\nSecond answer"]
    script = {at: [*encode(text), end] for at, text in enumerate(texts)}
    replies = {at: {"role": "assistant", "content": text} for at, text in enumerate(texts)}
    with scripted_ids(script, replies):
        llm.chat(dialogue("One?"), session="it")
        second = llm.chat(dialogue("One?", "First answer", "Two?"), session="it")

    assert second.usage.reuse == "continued"
    assert llm.tokenizer.decode(llm.session("it").tokens).count("<think>") == 2


DOCUMENT = "The keeper of the lighthouse on the island is called Odile. " * 8


@pytest.mark.parametrize("name", [*SPECIAL_TOKENS])
def test_a_document_is_read_once_and_asked_many_questions(name: str) -> None:
    llm = make_llm(name)
    document = llm.read_document(DOCUMENT, name="island")
    whole = document.tokens
    for number in range(5):
        with record_passes() as passes:
            chat = Chat(llm, document)
            first, second = chat.ask(f"Question {number}?"), chat.ask("Are you sure?")
        assert first.usage.reuse == "restored"
        assert first.usage.cached_tokens == len(whole)
        assert second.usage.reuse == "continued"
        assert sum(passes) < 120

    assert llm.session("island").tokens == whole
    assert llm.session("island").head.kind == "document"
    assert len(llm.store) == 6
    assert llm.tokenizer.decode(whole).count("Odile") == 8


def test_a_document_is_asked_with_a_system_message_too() -> None:
    llm = make_llm("qwen2.5")
    document = llm.read_document(DOCUMENT)
    answer = llm.chat([SYSTEM, *dialogue("Who?")], session=document, sampling=SHORT)
    text = llm.tokenizer.decode(llm.session(next(iter(llm.store)).name).tokens)

    assert answer.usage.cached_tokens == len(document.tokens)
    assert text.index("Odile") < text.index("islands, lighthouses") < text.index("Who?")


def test_a_document_asked_with_tools_it_was_not_read_with_is_read_again() -> None:
    llm = make_llm("qwen2.5")
    document = llm.read_document(DOCUMENT)
    answer = llm.chat("Who?", session=document, tools=TOOLS, sampling=SHORT)

    assert answer.usage.reuse == "reread: the document was read without these tools"
    assert answer.usage.prompt_tokens > len(document.tokens)


def test_a_documents_fork_is_a_named_conversation_about_it() -> None:
    llm = make_llm()
    document = llm.read_document(DOCUMENT, name="island")
    chat = Chat(llm, document.fork("alice"))
    first, second = chat.ask("Who?"), chat.ask("Why?")

    assert (first.usage.cached_tokens, second.usage.reuse) == (len(document.tokens), "continued")
    assert llm.session("alice").head.messages == 4
    assert llm.session("island").tokens == document.tokens
    assert len(llm.store) == 2


def test_a_text_that_is_also_the_name_of_a_file_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Odile").write_text("The keeper of the lighthouse.", encoding="utf-8")
    llm = make_llm()

    assert llm.read_document("Odile").document == "The keeper of the lighthouse."
    assert llm.read_document(text="Odile").document == "Odile"
    wrongs: list[dict[str, Any]] = [{}, {"document": "Odile", "text": "Odile"}]
    for wrong in wrongs:
        with pytest.raises(InputError, match="text="):
            llm.read_document(**wrong)
    with pytest.raises(InputError, match="empty"):
        llm.read_document("")
    with pytest.raises(InputError, match="empty"):
        llm.read_document(text=" ")


def test_warming_up_loads_the_model_and_reads_its_vocabulary() -> None:
    llm = make_llm()
    llm.warm_up()
    assert llm.loaded
    with mock.patch("llguidance.hf.from_tokenizer", side_effect=AssertionError("read again")):
        llm.complete("a", grammar=Grammar.choice("b"), sampling=SHORT)
    assert len(llm.store) == 0


def test_the_same_document_is_not_read_twice_and_another_does_not_take_its_place() -> None:
    llm = make_llm()
    document = llm.read_document(DOCUMENT)
    with record_passes() as passes:
        assert llm.read_document(DOCUMENT).tokens == document.tokens
    other = llm.read_document("Something else entirely.")

    assert passes == []
    assert other.name != document.name
    assert llm.session(document.name).document == DOCUMENT


def test_the_exact_cache_and_sliding_windows_keep_sessions_too() -> None:
    for cache in (CacheConfig.full(), CacheConfig.streaming(64), CacheConfig.paper(64), SMALL_CACHE):
        llm = make_llm("gemma3", cache=cache)
        chat = Chat(llm)
        assert [chat.ask(f"Question {turn}").usage.reuse for turn in range(4)] == ["new"] + ["continued"] * 3


def test_a_turn_costs_the_same_however_long_the_conversation_is() -> None:
    llm = make_llm(retrieval_tokens=0)
    chat = Chat(llm, "it")
    read, held = [], []
    with record_passes() as passes:
        for _ in range(30):
            passes.clear()
            chat.ask("The same question.")
            read.append(sum(passes))
            held.append(llm.session("it").cache.nbytes)

    assert len(set(held[1:])) == 1
    assert max(read[1:]) - min(read[1:]) <= 8


def test_conversations_never_share_what_they_write_to() -> None:
    llm = make_llm()
    chat = Chat(llm, "it")
    chat.ask("Hello")
    session = llm.session("it")
    before = {name: tensor.clone() for name, tensor in cache_state(session.cache)[0].items()}
    cache = session.cache
    for text in ("Left", "Right"):
        llm.chat([*chat.messages, *dialogue(text)], sampling=SHORT)

    assert all(torch.equal(tensor, before[name]) for name, tensor in cache_state(cache)[0].items())


def test_an_unfinished_stream_that_nobody_reads_leaves_no_trace() -> None:
    llm = make_llm()
    llm.stream(dialogue("Hello"), session="it")

    assert len(llm.store) == 0
    assert isinstance(llm._load().conversations, Conversations)


def test_a_template_that_hides_answers_works_too() -> None:
    source = "{% for m in messages if m.role != 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    plain = make_llm()
    llm = LLM(plain.engine.model, tokenizer=plain.tokenizer, chat_template=source, cache=SMALL_CACHE)
    chat = Chat(llm, "it")
    chat.ask("Hello")
    result = chat.ask("Go on")
    read = llm.session("it").tokens[: result.usage.prompt_tokens]

    assert result.usage.reuse == "restored"
    assert llm.tokenizer.decode(read) == "<|im_start|>Hello<|im_end|><|im_start|>Go on<|im_end|>"
