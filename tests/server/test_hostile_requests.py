"""What strangers may try: without a key, with another's ids, with paths, sizes, forms and paces that nobody means well.

Each is refused in the form of the dialect, and leads nowhere. docs/serving.md has how many of each kind there are.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.conftest import KEYS, serving
from tests.server.test_access import PRIVATE
from tests.support.chat import LARGE_CACHE, make_llm
from zsmerge_llm import LLM
from zsmerge_llm.server.connections import TimedConnection
from zsmerge_llm.server.settings import ServerSettings

ASK = [{"role": "user", "content": "Name a tree."}]
CHATS = {
    "/v1/chat/completions": {"model": "tiny", "messages": ASK, "max_tokens": 2},
    "/v1/completions": {"model": "tiny", "prompt": "Once", "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "Name a tree.", "max_output_tokens": 2},
    "/v1/messages": {"model": "tiny", "messages": ASK, "max_tokens": 2},
}
RESPONSES = [("GET", "/v1/responses/resp_x"), ("DELETE", "/v1/responses/resp_x")]
STRANGERS: list[dict[str, str]] = [
    {},
    {"authorization": ""},
    {"authorization": "Bearer"},
    {"authorization": "Bearer "},
    {"authorization": "Bearer wrong"},
    {"authorization": KEYS[0]},
    {"authorization": f"Basic {KEYS[0]}"},
    {"authorization": f"Bearer {KEYS[0]}x"},
    {"authorization": f"Bearer {KEYS[0][:-1]}"},
    {"authorization": f"Bearer {KEYS[0].upper()}"},
    {"authorization": f"Bearer {KEYS[0]},{KEYS[1]}"},
    {"authorization": "Bearer " + "a" * 10_000},
    {"x-api-key": "wrong"},
    {"x-api-key": f"Bearer {KEYS[0]}"},
    {"x-api-key": "null"},
    {"cookie": f"key={KEYS[0]}"},
]
PATHS = [
    *(
        "..",
        "../..",
        "../x",
        "..\\x",
        ".",
        "./x",
        "/etc/passwd",
        "//x",
        "a/b",
        "C:\\x",
        "~/x",
        "x\0",
        "\0",
        "x\n",
        "\r\n",
    ),
    *("../" * 50 + "etc/passwd", "a" * 201, "a" * 3000, "é" * 300, "\x7f", "x/../../y", "..;/x", "file:///etc/passwd"),
]
"""Ids that are none: each has a slash or a control character, or is too long, or leads to no session."""
STRANGE_NAMES = [
    "..",
    ".",
    "ключ",
    "名",
    "🙂",
    "\u202eabc",
    "e\u0301",
    "con",
    "nul.json",
    "-rf",
    "%2e%2e",
    "a b",
    "'; drop",
    "${x}",
]
"""Ids that are allowed, and must be safe as names of files."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def locked(folder: Path) -> Iterator[str]:
    """A server of two users, that keeps sessions and responses in a folder within `folder`."""
    sessions = folder / "sessions"
    with make_llm(cache=LARGE_CACHE, sessions_dir=sessions, retrieval_tokens=0) as llm:
        llm.model = "tiny"
        limits: dict[str, Any] = {"max_tokens": 12, "max_body": 100_000, "timeout": 20.0, "max_messages": 50}
        with serving(llm, ServerSettings(api_keys=KEYS, responses_dir=sessions / "responses", **limits)) as address:
            yield address


def send(address: str, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, Any]]:
    """Send a request with its path as it is; return the status and the JSON of the reply."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    with closing(connection):
        connection.request(method, path, body, {"content-type": "application/json", **headers})
        reply = connection.getresponse()
        text = reply.read()
        return reply.status, json.loads(text) if text else {}


def as_ann(address: str, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    data = None if body is None else json.dumps(body).encode()
    return send(address, method, path, data, authorization=f"Bearer {KEYS[0]}")


def is_error_of(path: str, reply: dict[str, Any]) -> bool:
    """Return whether a reply is an error in the form of the dialect of a path."""
    error = reply["error"]
    is_anthropic = path.startswith("/v1/messages")
    return ("type" in reply) == is_anthropic and set(error) == (
        {"type", "message"} if is_anthropic else {"type", "message", "param", "code"}
    )


@pytest.mark.parametrize("headers", STRANGERS, ids=range(len(STRANGERS)))
def test_strangers_are_refused_everywhere(locked: str, headers: dict[str, str]) -> None:
    for method, path in PRIVATE + RESPONSES:
        body = b"{}" if method == "POST" else None
        status, reply = send(locked, method, path, body, **headers)
        assert status == 401
        assert reply["error"]["type"] == "authentication_error"
        assert is_error_of(path, reply)


def test_what_is_anothers_does_not_exist(locked: str) -> None:
    ann, bob = (httpx.Client(base_url=locked, timeout=60, headers={"x-api-key": key}) for key in KEYS)
    with ann, bob:
        ann.post("/v1/chat/completions", json={**CHATS["/v1/chat/completions"], "session_id": "talk"})
        response = ann.post("/v1/responses", json=CHATS["/v1/responses"]).json()["id"]
        document = ann.post("/v1/documents", json={"text": "The keeper is Ann. " * 20}).json()["id"]
        before = ann.get("/v1/sessions/talk").json()["cache"]
        owner = ServerSettings(api_keys=KEYS).owner(KEYS[0])

        tried: list[tuple[httpx.Response, str]] = []
        for name in ("talk", f"{owner}/talk", quote(f"{owner}/talk", safe=""), document):
            for method, end in (("GET", ""), ("GET", "/map"), ("GET", "/file"), ("POST", "/fork"), ("DELETE", "")):
                path = f"/v1/sessions/{name}{end}"
                tried.append((bob.request(method, path, json={"id": "mine"} if end == "/fork" else None), path))
        for method in ("GET", "DELETE"):
            for path in (f"/v1/responses/{response}", f"/v1/documents/{document}"):
                tried.append((bob.request(method, path), path))
        for path, body in CHATS.items():
            if path != "/v1/completions":
                for name in (document, f"{owner}/{document}"):
                    tried.append((bob.post(path, json={**body, "document_id": name}), path))
        tried.append((bob.post("/v1/responses", json={**CHATS["/v1/responses"], "previous_response_id": response}), ""))
        for reply, path in tried:
            assert reply.status_code in (400, 404, 405), (path, reply.text)
            assert is_error_of(path, reply.json())

        taken = bob.post("/v1/chat/completions", json={**CHATS["/v1/chat/completions"], "session_id": "talk"}).json()
        assert taken["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert bob.delete("/v1/sessions/talk").status_code == 200
        assert ann.get("/v1/sessions/talk").json()["cache"] == before
        assert document in {each["id"] for each in ann.get("/v1/documents").json()["data"]}


@pytest.mark.parametrize("name", PATHS, ids=range(len(PATHS)))
def test_paths_in_ids_lead_nowhere(locked: str, folder: Path, name: str) -> None:
    before = outside(folder)
    for written in (quote(name, safe=""), quote(name, safe="/.\\")):
        for method, end in (("GET", ""), ("GET", "/map"), ("GET", "/file"), ("POST", "/fork"), ("DELETE", "")):
            for kind in ("sessions", "documents", "responses"):
                path = f"/v1/{kind}/{written}{end}"
                status, reply = as_ann(locked, method, path, {"id": "x"} if method == "POST" else None)
                assert status in (307, 400, 404, 405), (path, reply)
                assert status == 307 or is_error_of(path, reply)
        if written.isascii():
            status, _ = as_ann(locked, "GET", f"/assets/{written}")
            assert status in (404,)
    for path, body in CHATS.items():
        for field in ("session_id", "document_id", "prompt_cache_key", "previous_response_id"):
            status, reply = as_ann(locked, "POST", path, {**body, field: name})
            if name in (".", "..", "./x", "..\\x", "C:\\x") and status == 200:
                continue  # a name like any other, as no path is made of it
            assert status in (400, 404), (path, field, reply)
            assert is_error_of(path, reply)
    assert outside(folder) == before


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_strange_ids_are_names_like_any_other(locked: str, folder: Path, name: str) -> None:
    before = outside(folder)
    status, reply = as_ann(
        locked, "POST", "/v1/chat/completions", {**CHATS["/v1/chat/completions"], "session_id": name}
    )
    assert (status, reply["session_id"]) == (200, name)
    if name not in (".", ".."):
        assert as_ann(locked, "GET", f"/v1/sessions/{quote(name, safe='')}")[0] == 200
    assert outside(folder) == before


def outside(folder: Path) -> list[str]:
    """Return the names of what is not within the folder of the sessions."""
    return sorted(path.name for path in (*folder.iterdir(), *folder.parent.iterdir()))


BODIES: list[bytes] = [
    *(
        b"",
        b"{",
        b"}",
        b"[]",
        b"null",
        b"true",
        b"0",
        b'""',
        b'"x"',
        b"{}",
        b"\xff",
        b"\x00",
        b"\xef\xbb\xbf{}",
        b"NaN",
    ),
    *(b"[" * 50_000, b'{"a":' * 15_000, b"{" * 90_000, b'{"messages": [' * 5_000, b"9" * 90_000, b'{"model": 1e999}'),
    *(b'{"model": "tiny"', b"{'model': 'tiny'}", b'{"model": "tiny",}', b"<xml/>", b"model=tiny", b"--x\r\n"),
    *(b'{"model": "\\ud800"}', b'{"model": "tiny", "model": null}', b'{"\\u0000": 1}', b'{"model": "' + b"a" * 90_000),
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_bodies_that_are_no_requests_are_refused(locked: str, body: bytes) -> None:
    for path in (*CHATS, "/v1/messages/count_tokens", "/v1/documents", "/v1/sessions/x/fork"):
        status, reply = send(locked, "POST", path, body, authorization=f"Bearer {KEYS[0]}")
        assert status == 400, (path, reply)
        assert is_error_of(path, reply)


@pytest.mark.parametrize("size", [100_001, 1_000_000])
def test_bodies_that_are_too_large_are_refused(locked: str, size: int) -> None:
    for path in (*CHATS, "/v1/documents", "/v1/documents/file", "/v1/sessions?id=x"):
        headers = {"authorization": f"Bearer {KEYS[0]}", "content-length": str(size)}
        status, reply = send(locked, "POST", path, b"a" * min(size, 1_000_000), **headers)
        assert (status, reply["error"]["type"]) == (413, "request_too_large")
        assert is_error_of(path, reply)


json_value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["\ud800", "\0", "../x", "<script>", "tiny", "user", "text", "x" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    *(
        "messages",
        "prompt",
        "input",
        "system",
        "tools",
        "tool_choice",
        "stop",
        "stop_sequences",
        "temperature",
        "top_p",
    ),
    *("seed", "stream", "stream_options", "response_format", "text", "metadata", "include", "thinking", "session_id"),
    *("document_id", "previous_response_id", "prompt_cache_key", "logit_bias", "n", "user", "store", "output_config"),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(sorted(CHATS)), field=st.sampled_from(FIELDS), value=json_value)
def test_values_of_wrong_types_are_refused_by_name(locked: str, path: str, field: str, value: Any) -> None:
    wrapped = [{"role": "user", "content": value}] if field in ("messages", "input") else value
    reply = httpx.post(
        f"{locked}{path}",
        content=json.dumps({**CHATS[path], field: wrapped}),
        headers={"x-api-key": KEYS[1], "content-type": "application/json"},
        timeout=60,
    )
    assert reply.status_code in (200, 400, 404), reply.text
    if reply.status_code != 200:
        assert is_error_of(path, reply.json())


HEADS = {
    "nothing": b"",
    "a method": b"POST",
    "a path": b"POST /v1/messages HTTP/1.1\r\n",
    "some headers": b"POST /v1/messages HTTP/1.1\r\nhost: localhost\r\nx-api-key: a",
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_headers_that_come_slowly_are_not_waited_for(llm: LLM, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedConnection, "header_seconds", 0.4)
    with serving(llm) as address:
        where = ("127.0.0.1", int(address.rsplit(":", 1)[1]))
        slow = [socket.create_connection(where, timeout=20) for _ in range(20)]
        began = time.monotonic()
        for connection in slow:
            connection.sendall(head)
        assert httpx.get(f"{address}/health").status_code == 200
        for connection in slow:
            with connection:
                assert connection.recv(4096) == b""
        assert time.monotonic() - began < 10


def test_headers_that_come_drop_by_drop_are_not_waited_for(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedConnection, "header_seconds", 0.4)
    with serving(llm) as address, httpx.Client(base_url=address) as client:
        where = ("127.0.0.1", int(address.rsplit(":", 1)[1]))
        with socket.create_connection(where, timeout=20) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")  # the connection is kept open after this
            assert b"200 OK" in slow.recv(4096)
            assert is_cut_off(slow)
        assert client.get("/health").status_code == 200


def is_cut_off(connection: socket.socket) -> bool:
    """Send a byte at a time; return whether the connection is closed meanwhile."""
    for _ in range(400):
        try:
            connection.sendall(b"G")
        except OSError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("path", [*CHATS, "/v1/documents"])
def test_bodies_that_come_drop_by_drop_are_not_waited_for(llm: LLM, path: str) -> None:
    with serving(llm, ServerSettings(body_timeout=0.4)) as address:
        where = ("127.0.0.1", int(address.rsplit(":", 1)[1]))
        with socket.create_connection(where, timeout=20) as slow:
            head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            slow.sendall(f"{head}content-length: 1000\r\n\r\n{{".encode())
            slow.settimeout(0.01)
            text = b""
            ends = time.monotonic() + 10
            while b"\r\n\r\n" not in text or not text.endswith(b"}"):
                assert time.monotonic() < ends
                try:
                    text += slow.recv(4096)
                except TimeoutError:
                    slow.sendall(b" ")
            assert b" 408 " in text
            assert is_error_of(path, json.loads(text.partition(b"\r\n\r\n")[2]))
