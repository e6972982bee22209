"""Which replica a request goes to: the same one for all turns of a conversation, whatever a client adds to them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zsmerge_llm.server.replicas.routing import conversation_key, replica_order

TEXT = st.text(max_size=30)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": TEXT})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)
CHAT = "/v1/chat/completions"


def key(body: Any, path: str = CHAT, query: dict[str, str] | None = None, **headers: str) -> str:
    return conversation_key(path, query or {}, {name.replace("_", "-"): each for name, each in headers.items()}, body)


@given(TEXT, TEXT, st.lists(MESSAGE, max_size=5), st.lists(MESSAGE, max_size=5), st.integers(0, 2))
def test_a_conversation_without_an_id_stays_with_its_replica(
    system: str, question: str, one: list[Any], more: list[Any], temperature: int
) -> None:
    beginning = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    now = key({"messages": [*beginning, *one]})
    assert now == key({"messages": [*beginning, *one, *more], "temperature": temperature, "stream": True})


@given(TEXT, TEXT)
def test_marks_that_a_client_adds_to_blocks_change_nothing(system: str, question: str) -> None:
    def body(**mark: Any) -> dict[str, Any]:
        return {
            "system": [{"type": "text", "text": system, **mark}],
            "messages": [{"role": "user", "content": [{"type": "text", "text": question, **mark}]}],
        }

    assert key(body()) == key(body(cache_control={"type": "ephemeral"}))


@given(TEXT, TEXT, TEXT)
def test_an_id_goes_before_everything_else(name: str, one: str, other: str) -> None:
    name = f"x{name}"
    bodies = ({"session_id": name, "input": each} for each in (one, other))
    by_body = {key(body) for body in bodies}
    assert by_body == {
        key({"messages": []}, x_session_id=name),
        key({"prompt_cache_key": name}),
        key(None, path=f"/v1/sessions/{name.replace('/', '')}/map") if "/" not in name else key({"session_id": name}),
        key(None, query={"id": name}),
    }


def test_two_users_conversations_in_the_same_words_are_two() -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    keys = {
        key(body),
        key(body, authorization="Bearer a"),
        key(body, authorization="Bearer b"),
        key(body, x_api_key="c"),
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    ("path", "field"), [(CHAT, "messages"), ("/v1/responses", "input"), ("/v1/completions", "prompt")]
)
def test_conversations_that_begin_otherwise_are_spread(path: str, field: str) -> None:
    bodies = [
        {field: [{"role": "user", "content": f"Question {number}"}] if field == "messages" else f"Question {number}"}
        for number in range(300)
    ]
    first = [replica_order(key(body, path), 3)[0] for body in bodies]
    assert all(60 < first.count(replica) < 140 for replica in range(3))


@given(st.text(min_size=1), st.integers(1, 12))
def test_every_replica_has_its_place_in_the_order(name: str, number: int) -> None:
    assert sorted(replica_order(name, number)) == list(range(number))


@given(st.text(min_size=1), st.integers(2, 12), st.data())
def test_only_the_conversations_of_a_dead_replica_move(name: str, number: int, data: st.DataObject) -> None:
    dead = data.draw(st.integers(0, number - 1))
    order = replica_order(name, number)
    left = [replica for replica in order if replica != dead]
    assert (left[0] == order[0]) == (order[0] != dead)


@given(st.text(min_size=1), st.integers(1, 12))
def test_one_more_replica_takes_conversations_and_moves_no_others(name: str, number: int) -> None:
    assert replica_order(name, number + 1)[0] in (replica_order(name, number)[0], number)


@given(JSON, st.dictionaries(st.sampled_from(["messages", "input", "prompt", "system", "session_id"]), JSON))
def test_no_body_breaks_the_routing(body: Any, fields: dict[str, Any]) -> None:
    for each in (body, fields, {"messages": body}):
        assert len(key(each)) == 64
