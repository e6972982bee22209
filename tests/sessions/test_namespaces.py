"""A namespace keeps the conversations of one user apart: nothing of them is recognized by, or told to, others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.chat import LARGE_CACHE, SHORT, SYSTEM, dialogue, make_llm
from zsmerge_llm import LLM
from zsmerge_llm.errors import InputError

SECRET = dialogue("My account is 4711.", "Noted.", "What is it?")


def ask(llm: LLM, messages: list[dict[str, Any]], **options: Any) -> Any:
    return llm.chat(messages, sampling=SHORT, **options).usage


def test_another_user_neither_continues_a_conversation_nor_learns_that_it_exists() -> None:
    with make_llm(cache=LARGE_CACHE) as llm:
        for options, others in (({}, ("bob", None)), ({"session": "talk"}, ("eve", "kim"))):
            first = ask(llm, [SYSTEM, *SECRET], namespace="ann", **options)
            for other in others:
                usage = ask(llm, [SYSTEM, *SECRET], namespace=other, **options)
                assert (usage.reuse, usage.cached_tokens) == ("new", 0)
                assert usage.prompt_tokens == first.prompt_tokens
            again = ask(llm, [SYSTEM, *SECRET], namespace="ann", **options)
            assert again.reuse == "restored"


def test_the_same_name_is_another_session_in_another_namespace(tmp_path: Path) -> None:
    with make_llm(cache=LARGE_CACHE, sessions_dir=tmp_path) as llm:
        ask(llm, dialogue("I am bob."), namespace="bob", session="talk")
        answer = llm.chat(dialogue("I am ann."), namespace="ann", session="talk", sampling=SHORT)
        assert {info.name for info in llm.store} == {"ann/talk", "bob/talk"}
    with make_llm(cache=LARGE_CACHE, sessions_dir=tmp_path) as llm:
        messages = dialogue("I am ann.", answer.text, "Who am I?")
        assert ask(llm, messages, namespace="bob").cached_tokens == 0
        assert ask(llm, messages, namespace="ann", session="talk").reuse == "continued"


def test_an_answer_names_its_conversation_which_lies_in_its_namespace() -> None:
    with make_llm(cache=LARGE_CACHE) as llm:
        for options in ({}, {"session": "talk"}, {"namespace": "ann"}, {"namespace": "ann", "session": "talk"}):
            answer = llm.chat(dialogue(f"I am {options}."), sampling=SHORT, **options)
            *_, last = llm.stream(dialogue(f"I am {options}.", answer.text, "Who?"), sampling=SHORT, **options)
            assert last.session == answer.session
            assert last.session == options.get("session", last.session)
            prefix = "ann/" if "namespace" in options else ""
            assert f"{prefix}{last.session}" in llm.store
            assert last.usage.reuse == "continued"
        names = [info.name for info in llm.store]
        assert len(names) == 4
        assert sum(name.startswith("ann/") for name in names) == 2
        assert llm.complete("Once", sampling=SHORT).session == ""


def test_a_document_serves_every_namespace_and_its_questions_stay_apart() -> None:
    with make_llm(cache=LARGE_CACHE) as llm:
        document = llm.read_document(text="The keeper of the light is Ann. " * 20)
        first = ask(llm, dialogue("Who is it?"), session=document, namespace="ann")
        other = ask(llm, dialogue("Who is it?"), session=document, namespace="bob")
        again = ask(llm, dialogue("Who is it?"), session=document, namespace="ann")

        assert first.cached_tokens == other.cached_tokens == len(document.tokens)
        assert again.cached_tokens > first.cached_tokens


def test_why_a_conversation_is_read_again_names_no_session_of_others() -> None:
    with make_llm() as llm:
        messages = dialogue("Hello 0")
        for turn in range(9):
            answer = llm.chat(messages, session="the merger", sampling=SHORT)
            messages += [{"role": "assistant", "content": answer.text}, *dialogue(f"Hello {turn + 1}")]
        usage = ask(llm, [*messages[:2], *dialogue("Instead")])
        assert usage.reuse.startswith("reread: ")
        assert "merger" not in usage.reuse


@pytest.mark.parametrize("namespace", ["", "a/b", 7, b"ann", ["ann"]])
def test_a_namespace_is_a_text_without_a_slash(namespace: Any) -> None:
    with make_llm() as llm, pytest.raises(InputError, match="namespace must be"):
        ask(llm, dialogue("Hello"), namespace=namespace)


def test_the_repr_of_a_session_shows_nothing_that_was_said() -> None:
    with make_llm(cache=LARGE_CACHE) as llm:
        document = llm.read_document(text="The captain is Eve.")
        ask(llm, SECRET, session="talk")
        for session in (document, llm.session("talk"), document.head):
            assert "Eve" not in repr(session)
            assert "4711" not in repr(session)
