"""Who is served: keys, names, sizes and paces, and clients that leave."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.conftest import KEYS, serving
from tests.support.chat import make_llm
from zsmerge_llm import LLM
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.server.settings import ServerSettings, check_exposure

ASK = [{"role": "user", "content": "Name a tree."}]
BODY = {"model": "tiny", "messages": ASK, "max_tokens": 4}
PRIVATE = [
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("GET", "/v1/sessions"),
    ("POST", "/v1/sessions?id=x"),
    ("GET", "/v1/sessions/x"),
    ("GET", "/v1/sessions/x/map"),
    ("GET", "/v1/sessions/x/file"),
    ("POST", "/v1/sessions/x/fork"),
    ("DELETE", "/v1/sessions/x"),
    ("GET", "/v1/documents"),
    ("POST", "/v1/documents"),
    ("POST", "/v1/documents/file"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), PRIVATE)
def test_without_a_right_key_nothing_is_served(locked: str, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEYS[0]}, {"x-api-key": KEYS[0][:-1]}):
        reply = httpx.request(method, f"{locked}{path}", headers=headers, json={} if method == "POST" else None)
        assert reply.status_code == 401
        error = reply.json()["error"]
        assert error["type"] == "authentication_error"
        assert ("type" in reply.json()) == path.startswith("/v1/messages")


def test_a_key_is_taken_from_either_header_and_the_page_needs_none(locked: str) -> None:
    for headers in ({"authorization": f"bearer {KEYS[0]}"}, {"x-api-key": KEYS[1]}):
        assert httpx.get(f"{locked}/v1/models", headers=headers).status_code == 200
    for path in ("/", "/assets/chat.js", "/assets/chat.css", "/health"):
        assert httpx.get(f"{locked}{path}").status_code == 200
    assert httpx.get(f"{locked}/assets/..%2fapp.py").status_code == 404


def test_other_machines_are_served_with_keys_only() -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ConfigError, match="ZSMERGE_API_KEYS"):
            check_exposure(host, ServerSettings(), insecure=False)
        check_exposure(host, ServerSettings(api_keys=KEYS), insecure=False)
        check_exposure(host, ServerSettings(), insecure=True)
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        check_exposure(host, ServerSettings(), insecure=False)


def test_short_keys_are_refused() -> None:
    for key in ("short", "with a\nline break in it", "ключ-ключ-ключ-ключ"):
        with pytest.raises(ConfigError, match="openssl"):
            ServerSettings(api_keys=(key,))


def test_a_server_without_keys_answers_to_names_of_this_machine_only(address: str) -> None:
    for host, status in (
        ("localhost:1", 200),
        ("[::1]:80", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil", 403),
        ("", 403),
    ):
        assert httpx.get(f"{address}/v1/models", headers={"host": host}).status_code == status


def test_a_page_elsewhere_cannot_send_requests(http: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        reply = http.post("/v1/chat/completions", content='{"model": "tiny"}', headers={"content-type": kind})
        assert reply.status_code == 400
    assert "access-control-allow-origin" not in http.options("/v1/chat/completions").headers


def test_a_body_that_is_too_large_is_refused_in_the_dialects_form(http: httpx.Client) -> None:
    large = {**BODY, "messages": [{"role": "user", "content": "a" * 9_000_000}]}
    for path in ("/v1/chat/completions", "/v1/messages"):
        reply = http.post(path, json=large)
        assert reply.status_code == 413
        assert reply.json()["error"]["type"] == "request_too_large"

    def chunks() -> Any:
        for _ in range(30):
            yield b"a" * 300_000

    assert http.post("/v1/chat/completions", content=chunks()).status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"null", b'"x"', b"{}", b"\xff", b'{"model": 5, "messages": "x"}', b"[" * 50_000),
        b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}], "tool_choice": "\\ud800"}',
    ],
)
def test_a_malformed_body_is_refused_in_the_dialects_form(http: httpx.Client, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/documents"):
        reply = http.post(path, content=body, headers=headers)
        assert reply.status_code == 400, (path, reply.text)
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_paths_in_ids_lead_nowhere(http: httpx.Client) -> None:
    for name in ("..", "../x", "..%2f..%2fetc%2fpasswd", "%00", "a" * 300, "%2e%2e"):
        for method, path in (("GET", ""), ("GET", "/file"), ("DELETE", ""), ("GET", "/map")):
            reply = http.request(method, f"/v1/sessions/{name}{path}")
            assert reply.status_code in (307, 400, 404, 405), (name, path, reply.status_code)
        reply = http.post("/v1/chat/completions", json={**BODY, "session_id": f"{name}\n"})
        assert reply.status_code == 400


def test_a_client_that_sends_slowly_is_cut_off(llm: LLM) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with serving(llm, ServerSettings(body_timeout=0.3)) as address:
        where = ("127.0.0.1", int(address.rsplit(":", 1)[1]))
        with socket.create_connection(where, timeout=20) as slow:
            slow.sendall(head + b"content-length: 100\r\n\r\n{")
            began = time.monotonic()
            assert b" 408 " in slow.recv(4096)
            assert time.monotonic() - began < 10


def test_too_many_requests_and_too_long_ones_are_told_so(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(llm, ServerSettings(timeout=0.05, max_tokens=100_000)) as address:
        reply = httpx.post(f"{address}/v1/chat/completions", json={**BODY, "max_tokens": 100_000}, timeout=60)
        assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    with serving(llm) as address:
        monkeypatch.setattr(llm.engine.requests, "_most", 0)
        reply = httpx.post(f"{address}/v1/messages", json=BODY)
        assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
        assert reply.headers["retry-after"]


@pytest.mark.parametrize("stream", [False, True])
def test_where_the_client_is_gone_the_answer_stops_and_the_conversation_stays(
    llm: LLM, stream: bool, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    messages = [{"role": "user", "content": f"Name all trees. {stream}"}]
    with serving(llm, ServerSettings(max_tokens=1_000_000)) as address:
        schema = {"type": "array", "items": {"type": "integer"}, "minItems": 9_000}
        long = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": schema}}
        body: Any = {"model": "tiny", "messages": messages, "stream": stream, "session_id": f"left {stream}"}
        body["response_format"] = long
        with httpx.Client(base_url=address, timeout=2) as client:
            if stream:
                with client.stream("POST", "/v1/chat/completions", json=body) as reply:
                    next(reply.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post("/v1/chat/completions", json=body)
        wait_until(lambda: llm.engine.requests.num_running == 0)
        body |= {"stream": False, "max_tokens": 3}
        again = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
        assert again.json()["usage"]["zsmerge"]["reuse"] in ("restored", "continued")


def test_a_failure_of_our_own_is_not_told_to_clients(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("/secret/path")

    monkeypatch.setattr(LLM, "chat", fail)
    with serving(llm) as address:
        reply = httpx.post(f"{address}/v1/chat/completions", json=BODY)
        assert reply.status_code == 500
        assert "secret" not in reply.text


def test_a_server_is_healthy_before_its_model_is_loaded() -> None:
    with make_llm() as llm, serving(llm) as address:
        assert httpx.get(f"{address}/health").json() == {"status": "ok", "loaded": False}
