"""What a turn costs on the host does not grow with the conversation, and what is not computed again is right."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat import SMALL_CACHE, Chat, make_llm
from tests.support.templates import SPECIAL_TOKENS, TOOLS, byte_level, long_chat, template, tool_call
from zsmerge_llm.language import digests
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.language.messages import MessageHistory, normalize_messages
from zsmerge_llm.retrieval import passage_index
from zsmerge_llm.retrieval.passages import Span, split_spans
from zsmerge_llm.sessions.delta_renderer import DeltaRenderer, ignores_length
from zsmerge_llm.sessions.token_ids import TokenIds

# -- a turn's work -----------------------------------------------------------------------------------------------------


@contextmanager
def counted_work() -> Iterator[dict[str, int]]:
    """Count the characters that are rendered, tokenised, hashed and split into passages."""
    work = dict.fromkeys(("rendered", "tokenised", "hashed", "split"), 0)
    render, ids, digest = ChatTemplate.render, ChatTemplate._ids, digests._digest

    def counting_render(self: ChatTemplate, *given: Any, **named: Any) -> str:
        text = render(self, *given, **named)
        work["rendered"] += len(text)
        return text

    def counting_ids(self: ChatTemplate, text: str, **named: Any) -> list[int]:
        work["tokenised"] += len(text)
        return ids(self, text, **named)

    def counting_digest(before: str, item: Any) -> str:
        work["hashed"] += len(json.dumps(item))
        return digest(before, item)

    def counting_split(text: str, size: int, date: str) -> list[Span]:
        work["split"] += len(text)
        return split_spans(text, size, date)

    with (
        mock.patch.object(ChatTemplate, "render", counting_render),
        mock.patch.object(ChatTemplate, "_ids", counting_ids),
        mock.patch.object(digests, "_digest", counting_digest),
        mock.patch.object(passage_index, "split_spans", counting_split),
    ):
        yield work


@pytest.mark.parametrize("name", [name for name in SPECIAL_TOKENS if name != "gemma2"])
def test_a_turn_renders_tokenises_hashes_and_splits_only_new_text(name: str) -> None:
    chat = Chat(
        make_llm(name, cache=SMALL_CACHE, retrieval_tokens=40), "it", [{"role": "system", "content": "Be brief."}]
    )
    sizes: list[dict[str, int]] = []
    with counted_work() as work:
        for turn in range(60):
            work.update(dict.fromkeys(work, 0))
            assert chat.ask(f"Is the {turn}th lighthouse of the {turn % 7} islands open?").usage.reuse != "restored"
            sizes.append(dict(work))

    for kind in work:
        early, late = ([size[kind] for size in sizes[start : start + 15]] for start in (15, 45))
        # Once, when their number has doubled, all messages are rendered to check what is rendered of them.
        assert sorted(late)[-2] <= 1.2 * max(early) + 200, kind


def test_a_step_of_an_agent_does_so_too_however_long_its_request() -> None:
    document = " ".join(f"The {number}th lighthouse is open at night." for number in range(300))
    request = f"{document}\n\nWhich lighthouse of the islands is open?"
    chat = Chat(make_llm(cache=SMALL_CACHE, retrieval_tokens=40), "it", [{"role": "user", "content": request}])
    sizes: list[dict[str, int]] = []
    with counted_work() as work:
        for step in range(60):
            work.update(dict.fromkeys(work, 0))
            answer = chat.reply()
            assert answer.usage.reuse == ("continued" if step else "new")
            sizes.append(dict(work))
            result = f"The {step}th lighthouse of the {step % 7} islands is closed. {'It rains. ' * 9}"
            chat.messages.append({"role": "tool", "content": result, "tool_call_id": str(step)})

    for kind in ("tokenised", "hashed", "split"):  # the messages since the request are rendered together
        early, late = ([size[kind] for size in sizes[start : start + 15]] for start in (15, 45))
        assert sorted(late)[-2] <= 1.2 * max(early) + 200, kind
        assert sorted(late)[-2] < len(document), kind


def test_a_restored_session_and_a_branch_go_on_as_cheaply(tmp_path: Any) -> None:
    llm = make_llm(cache=SMALL_CACHE, sessions_dir=tmp_path)
    chat = Chat(llm, "it")
    for turn in range(30):
        chat.ask(f"Question {turn}?")
    again = Chat(make_llm(cache=SMALL_CACHE, sessions_dir=tmp_path), "it", chat.messages)
    branch = Chat(llm, llm.session("it").fork("branch"), chat.messages)
    for other in (again, branch):
        other.ask("What is kept is made once more.")
        with counted_work() as work:
            assert other.ask("And now?").usage.reuse == "continued"
        assert max(work.values()) < 2500


def test_the_index_of_a_conversation_is_on_disk_with_it(tmp_path: Any) -> None:
    settings: Any = {"cache": replace(SMALL_CACHE, slots=512), "retrieval_tokens": 250, "sessions_dir": tmp_path}
    chat = Chat(make_llm(**settings), "it")
    for turn in range(30):
        chat.ask(f"Is the {turn}th lighthouse of the {turn % 7} islands open?")
    again = Chat(make_llm(**settings), "it", chat.messages)
    with counted_work() as work:
        usage = again.ask("Is the 3th lighthouse of the 3 islands open?").usage
    chat.ask("Is the 3th lighthouse of the 3 islands open?")

    assert usage.reuse == "continued"
    assert usage.retrieved_tokens > 0
    assert again.messages[-1] == chat.messages[-1]
    newest = sum(len(message["content"]) for message in chat.messages[-4:])
    assert work["split"] <= newest < sum(len(message["content"]) for message in chat.messages) / 4


def test_a_document_is_split_once_for_all_conversations_about_it() -> None:
    llm = make_llm(cache=replace(SMALL_CACHE, slots=512), retrieval_tokens=250)
    text = " ".join(f"The lighthouse of island {number} is kept by keeper {number}." for number in range(80))
    document = llm.read_document(text=text)
    sizes = []
    with counted_work() as work:
        for conversation in range(3):
            chat = Chat(llm, document)
            for island in (7 + conversation, 70 + conversation):
                work["split"] = 0
                result = chat.ask(f"Who keeps island {island}?")
                assert result.usage.retrieved_tokens
                chat.session = result.session
                sizes.append(work["split"])
    assert sizes[0] > len(text)
    assert max(sizes[1:]) < 400


# -- deltas ------------------------------------------------------------------------------------------------------------


def plain_chat(turns: int) -> list[dict[str, Any]]:
    chat = [{"role": "system", "content": "You are terse."}]
    for turn in range(turns):
        chat += [{"role": "user", "content": f"question-{turn}"}, {"role": "assistant", "content": f"answer-{turn}"}]
    return [*chat, {"role": "user", "content": "the last"}]


@pytest.mark.parametrize("name", [name for name in SPECIAL_TOKENS if name != "gemma2"])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_delta_of_a_tail_is_that_of_the_whole_conversation(name: str, tools: Any) -> None:
    form, renderer, rendered = template(name), DeltaRenderer(), []
    messages: list[dict[str, Any]] = []
    render = ChatTemplate.render

    def counting(self: ChatTemplate, messages: Any, *given: Any, **named: Any) -> str:
        rendered.append(len(messages))
        return render(self, messages, *given, **named)

    for step in long_chat(40) if tools else [plain_chat(0), *([m] for m in plain_chat(60)[2:])]:
        n = len(messages) + 1
        messages = normalize_messages([*messages, *step], partial=True)
        if messages[-1]["role"] == "assistant" or n == 1 or messages[n - 1]["role"] != "assistant":
            n = len(messages) - 1
            if n < 1 or messages[n - 1]["role"] != "assistant" or messages[-1]["role"] == "assistant":
                continue
        rendered.clear()
        with mock.patch.object(ChatTemplate, "render", counting):
            delta = renderer.delta(form, messages, n, tools)
        assert delta == form.delta(messages, n, tools)
    assert max(rendered) < len(messages) / 2


COUNTS = {
    "the number of messages": "{% if messages|length > 40 %}LATE{% endif %}",
    "the place of a message": "{% if loop.index0 > 40 %}LATE{% endif %}",
    "every third message": "{% if loop.index0 % 3 == 0 %}THIRD{% endif %}",
    "every fourth user": "{% set ns.users = ns.users + 1 %}{% if (ns.users // 4) is odd %}ODD{% endif %}",
}


@pytest.mark.parametrize("trick", COUNTS.values(), ids=COUNTS)
def test_a_template_that_counts_messages_gets_all_of_them(trick: str) -> None:
    source = (
        "{% set ns = namespace(users=0) %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        + trick
        + "</>{% endfor %}"
    )
    form, renderer = ChatTemplate(byte_level(), source), DeltaRenderer()
    assert not ignores_length(form.source())
    for turns in range(1, 50):
        messages = plain_chat(turns)
        assert renderer.delta(form, messages, len(messages) - 1, None) == form.delta(messages, len(messages) - 1)


FLAG = """{% set ns = namespace(seen=false) %}{% for m in messages %}
{%- if m.tool_calls %}{% set ns.seen = true %}{% endif %}<{{ m.role }}>{{ m.content }}{{ ' CALLED' if ns.seen }}</>
{%- for c in m.tool_calls or [] %} {{ c.id }}{% endfor %}{% endfor %}"""


def test_a_template_that_remembers_an_early_call_gets_all_messages() -> None:
    form, renderer = ChatTemplate(byte_level(), FLAG), DeltaRenderer()
    assert ignores_length(form.source())
    start = [
        {"role": "user", "content": "warm?"},
        {"role": "assistant", "content": "", "tool_calls": [tool_call("Bern", 1)]},
        {"role": "tool", "content": "12 degrees", "tool_call_id": "abcdefg01"},
        {"role": "assistant", "content": "It is."},
    ]
    for turns in range(1, 50):
        messages = normalize_messages([*start, *plain_chat(turns)[1:]])
        assert renderer.delta(form, messages, len(messages) - 1, None) == form.delta(messages, len(messages) - 1)


# -- what is kept of messages ------------------------------------------------------------------------------------------

ARGUMENTS = st.sampled_from(['{"a": 1}', '{"a": true}', {"a": 1}, {"a": True}, {"a": 1.0}, "{broken"])
PLAIN = st.builds(
    lambda role, text, extra: {"role": role, "content": text, **extra},
    st.sampled_from(["user", "assistant", "system"]),
    st.sampled_from(["", "Hello", "<think>hm</think> Well", "Bye"]),
    st.sampled_from([{}, {"id": "1"}, {"name": "alice"}, {"refusal": None}]),
)
BLOCKS = st.just({"role": "user", "content": [{"type": "text", "text": "one"}, "two"]})
CALLS = st.builds(
    lambda ids, arguments: {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": each, "function": {"name": f"f{each}", "arguments": arguments}} for each in ids],
    },
    st.lists(st.sampled_from(["", "x", "y"]), min_size=1, max_size=3),
    ARGUMENTS,
)
RESULTS = st.builds(
    lambda key, value: {"role": "tool", "content": "r", key: value},
    st.sampled_from(["tool_call_id", "name"]),
    st.sampled_from(["x", "y", "fx", "f"]),
)
MESSAGES = st.lists(st.one_of(PLAIN, BLOCKS, CALLS, RESULTS), min_size=1, max_size=8)


@settings(max_examples=300, deadline=None)
@given(requests=st.lists(MESSAGES, min_size=1, max_size=4), cut=st.integers(0, 8), note=st.booleans())
def test_messages_and_digests_of_a_conversation_that_goes_on_are_those_of_a_new_one(
    requests: list[list[dict[str, Any]]], cut: int, note: bool
) -> None:
    form, history, messages = template("qwen3"), MessageHistory(), list[dict[str, Any]]()
    chain = form.digest_chain(TOOLS)
    for new in requests:
        messages = copy.deepcopy([*messages[: max(0, len(messages) - cut)], *new])
        history = history.normalize(messages, partial=True)
        assert history.messages == normalize_messages(messages, partial=True)
        asked = list(history.messages)
        if note:
            asked[-1] = {**asked[-1], "note": "Answer in JSON."}
        chain = chain.of(asked)
        assert chain.digests == form.digests(normalize_messages(messages, partial=True)[:-1] + asked[-1:], TOOLS)
        assert chain.lengths == {digest: length for length, digest in enumerate(chain.digests)}
        for message in messages:  # the caller's own, which it may change
            message["content"] = "changed"
        messages = copy.deepcopy(history.given)


@given(parts=st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6), data=st.data())
def test_ids_that_share_a_buffer_never_change(parts: list[list[int]], data: st.DataObject) -> None:
    known: list[tuple[TokenIds, list[int]]] = [(TokenIds(), [])]
    for part in parts:
        ids, plain = data.draw(st.sampled_from(known))
        known.append((ids + part, plain + part))
    for ids, plain in known:
        assert list(ids) == plain
        assert list(ids[-3:]) == plain[-3:]
        assert [ids[at] for at in range(-len(plain), len(plain))] == [*plain, *plain]
        assert len(ids) == len(plain)
