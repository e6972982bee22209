"""Two servers of a tiny model that share a sessions folder, behind a router: as programs use them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.asgi_server import running
from tests.support.chat import LARGE_CACHE, make_llm
from zsmerge_llm import SamplingParams
from zsmerge_llm.server.app import create_app
from zsmerge_llm.server.replicas.pool import Replica
from zsmerge_llm.server.replicas.router import create_router
from zsmerge_llm.server.settings import ServerSettings

KEYS = ("key-of-ann-0123456789", "key-of-bob-0123456789")


class Pair:
    """Two replicas, and a client of each and of their router."""

    def __init__(self, addresses: list[str], router: str, replicas: list[Replica]) -> None:
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        self.http = httpx.Client(base_url=router, timeout=60, headers=headers)
        self.direct = [httpx.Client(base_url=address, timeout=60, headers=headers) for address in addresses]
        self.openai = openai.OpenAI(base_url=f"{router}/v1", api_key=KEYS[0], max_retries=0)
        self.replicas = replicas

    def only(self, number: int | None) -> None:
        """Let one replica answer, or all."""
        for replica in self.replicas:
            replica.answers = number in (None, replica.number)

    def ask(self, messages: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
        body = {"model": "tiny", "messages": messages, **fields}
        answer: dict[str, Any] = self.http.post("/v1/chat/completions", json=body).raise_for_status().json()
        messages.append(answer["choices"][0]["message"])
        return answer

    def tiers(self, name: str) -> list[str]:
        """Where each replica has a session."""
        listed = [client.get("/v1/sessions").json()["data"] for client in self.direct]
        return [next(each["tier"] for each in data if each["id"] == name) for data in listed]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder: Path = tmp_path_factory.mktemp("sessions")
    settings = ServerSettings(api_keys=KEYS, max_tokens=8, responses_dir=folder / "responses")
    one, two = (make_llm(cache=LARGE_CACHE, sessions_dir=folder, retrieval_tokens=0, compile=False) for _ in range(2))
    one.model = two.model = "tiny"
    with one, two, running(create_app(one, settings)) as first, running(create_app(two, settings)) as second:
        replicas = [Replica(0), Replica(1)]
        replicas[0].listen(first)
        replicas[1].listen(second)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("zsmerge_llm.server.replicas.pool.CHECK_SECONDS", 3600)  # the tests say who answers
            with running(create_router(replicas, settings)) as router:
                yield Pair([first, second], router, replicas)


@pytest.fixture
def pair(shared: Pair) -> Iterator[Pair]:
    yield shared
    shared.only(None)


def test_conversations_go_on_where_they_are_and_are_spread(pair: Pair) -> None:
    held = set()
    for number in range(6):
        messages = [{"role": "user", "content": f"Tell me about island {number}"}]
        name = pair.ask(messages)["session_id"]
        for question in ("Why?", "And then?"):
            messages.append({"role": "user", "content": question})
            assert pair.ask(messages)["usage"]["zsmerge"]["reuse"] == "continued"
        (holder,) = [number for number, tier in enumerate(pair.tiers(name)) if tier != "disk"]
        held.add(holder)
    assert held == {0, 1}


def test_a_conversation_moves_with_its_cache_and_back(pair: Pair) -> None:
    alone = make_llm(cache=LARGE_CACHE, retrieval_tokens=0, compile=False)
    messages: list[dict[str, Any]] = []
    undisturbed: list[dict[str, Any]] = []
    for turn, answering in enumerate((0, 1, 0, 1, 1, 0)):
        pair.only(answering)
        messages.append({"role": "user", "content": f"What came after year {turn}?"})
        answer = pair.ask(messages)
        assert answer["usage"]["zsmerge"]["reuse"] == ("continued" if turn else "new")
        undisturbed.append({"role": "user", "content": f"What came after year {turn}?"})
        result = alone.chat(undisturbed, sampling=SamplingParams(max_tokens=8))
        undisturbed.append({"role": "assistant", "content": result.text})
    assert [each["content"] for each in messages] == [each["content"] for each in undisturbed]


def test_lists_are_unions_and_names_work_on_every_replica(pair: Pair) -> None:
    names = []
    for answering in (0, 1):
        pair.only(answering)
        messages = [{"role": "user", "content": f"Hello from {answering}"}]
        names.append(pair.ask(messages, session_id=f"named-{answering}")["session_id"])
    pair.only(None)
    listed = pair.http.get("/v1/sessions").json()["data"]
    assert set(names) <= {each["id"] for each in listed}
    assert len({each["id"] for each in listed}) == len(listed)
    assert [each["tier"] for each in listed if each["id"] in names] == ["host", "host"]
    for answering in (0, 1):
        pair.only(answering)
        for name in names:
            assert pair.http.get(f"/v1/sessions/{name}").json()["cache"]["read_tokens"] > 0
            assert pair.http.post(f"/v1/sessions/{name}/fork", json={"id": "named-0"}).status_code == 409
    pair.only(None)
    assert pair.http.post("/v1/sessions/named-0/fork", json={"id": "named-2"}).status_code == 201
    saved = pair.http.get("/v1/sessions/named-2/file").content
    assert pair.http.post("/v1/sessions", params={"id": "named-3"}, content=saved).status_code == 201


def test_a_deleted_session_is_gone_everywhere(pair: Pair) -> None:
    messages: list[dict[str, Any]] = []
    for answering in (0, 1):
        pair.only(answering)
        messages.append({"role": "user", "content": f"Remember {answering}"})
        pair.ask(messages, session_id="doomed")
    pair.only(None)
    assert pair.http.delete("/v1/sessions/doomed").json() == {"id": "doomed", "deleted": True}
    assert pair.http.delete("/v1/sessions/doomed").status_code == 404
    for client in pair.direct:
        assert "doomed" not in client.get("/v1/sessions").text


def test_a_response_is_continued_on_the_same_replica_and_on_any_other(pair: Pair) -> None:
    first = pair.openai.responses.create(model="tiny", input="Name a tree.")
    name = str(first.model_extra and first.model_extra["session_id"])
    *_, last = pair.openai.responses.create(model="tiny", input="Another", previous_response_id=first.id, stream=True)
    assert last.type == "response.incomplete"
    second = last.response
    assert sorted(pair.tiers(name)) == ["disk", "host"]
    for answering in (0, 1):
        pair.only(answering)
        third = pair.openai.responses.create(model="tiny", input="And one", previous_response_id=second.id)
        assert third.usage is not None
        assert third.usage.input_tokens_details.cached_tokens > 0
    with pytest.raises(openai.NotFoundError):
        pair.openai.responses.create(model="tiny", input="x", previous_response_id="resp_" + "0" * 32)
    with pytest.raises(openai.NotFoundError):
        pair.openai.responses.create(model="tiny", input="x", previous_response_id="../resp_x")
    bob = openai.OpenAI(base_url=pair.openai.base_url, api_key=KEYS[1], max_retries=0)
    with pytest.raises(openai.NotFoundError):
        bob.responses.create(model="tiny", input="x", previous_response_id=second.id)


def test_a_document_is_read_once_and_asked_on_every_replica(pair: Pair) -> None:
    upload = {"file": ("log.txt", "The keeper of the light was called Ada. " * 20)}
    document = pair.http.post("/v1/documents/file", files=upload).json()
    assert document["id"] in {each["id"] for each in pair.http.get("/v1/documents").json()["data"]}
    for answering in (0, 1):
        pair.only(answering)
        usage = pair.ask([{"role": "user", "content": "Who?"}], document_id=document["id"])["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= document["tokens"] - 8


def test_figures_are_told_apart_by_replica(pair: Pair) -> None:
    pair.ask([{"role": "user", "content": "Count this"}])
    text = pair.http.get("/metrics").text
    for number in (0, 1):
        assert f'zsmerge_queue{{replica="{number}"}} 0.0' in text
        assert re.search(rf'zsmerge_tokens_total{{kind="prompt",replica="{number}"}} \d', text)
        assert f'zsmerge_first_token_seconds_bucket{{le="1.0",replica="{number}"}}' in text
        assert f'zsmerge_replica_up{{replica="{number}"}} 1.0' in text
    assert text.count("# TYPE zsmerge_tokens_total counter") == 1


def test_keys_are_asked_for_as_without_a_router(pair: Pair) -> None:
    stranger = httpx.Client(base_url=pair.http.base_url, timeout=30)
    for path in ("/metrics", "/v1/sessions", "/v1/models"):
        assert stranger.get(path).status_code == 401
    assert stranger.delete("/v1/sessions/x").status_code == 401
    assert stranger.post("/v1/messages", json={}).json()["type"] == "error"
    assert stranger.get("/health").json()["status"] == "ok"
    bob = httpx.Client(base_url=pair.http.base_url, timeout=30, headers={"x-api-key": KEYS[1]})
    assert bob.get("/v1/sessions").json()["data"] == []


def test_the_chat_page_and_what_it_asks_for_come_through(pair: Pair) -> None:
    page = pair.http.get("/")
    assert "text/html" in page.headers["content-type"]
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in set(re.findall(r"assets/[a-z.]+", page.text)):
        assert pair.http.get(f"/{name}").status_code == 200
    assert pair.http.get("/v1/models").json()["data"][0]["id"] == "tiny"
    name = pair.ask([{"role": "user", "content": "Show me"}])["session_id"]
    assert "<html" in pair.http.get(f"/v1/sessions/{name}/map").text
    assert pair.http.get("/no/such/page").status_code == 404
    reply = pair.http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert reply.json()["error"]["message"] == "The body is no valid JSON."
