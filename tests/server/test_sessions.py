"""What the server keeps: conversations and documents, by user, and what of them can be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from zsmerge_llm import LLM

ASK = [{"role": "user", "content": "Name a tree."}]
MARIGOLD = Path(__file__).parents[2] / "zsmerge_llm" / "data" / "marigold.txt"
Users = tuple[httpx.Client, httpx.Client]


def chat(client: httpx.Client, messages: list[dict[str, Any]] = ASK, **fields: Any) -> dict[str, Any]:
    reply = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages, **fields})
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def listed(client: httpx.Client, what: str = "sessions") -> set[str]:
    return {each["id"] for each in client.get(f"/v1/{what}").json()["data"]}


def test_a_session_has_the_id_that_the_client_gives_it(http: httpx.Client) -> None:
    assert chat(http, session_id="one")["session_id"] == "one"
    reply = http.post(
        "/v1/chat/completions",
        json={"model": "tiny", "messages": [{"role": "user", "content": "Name a bay."}]},
        headers={"X-Session-Id": "two"},
    )
    assert reply.json()["session_id"] == "two"
    keyed = chat(http, [{"role": "user", "content": "Name a sea."}], prompt_cache_key="three")
    assert keyed["session_id"] == "three"
    assert {"one", "two", "three"} <= listed(http)


def test_an_id_never_mixes_two_conversations(http: httpx.Client) -> None:
    chat(http, session_id="same")
    other = chat(http, [{"role": "user", "content": "Something else entirely."}], session_id="same")
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


SIDE_REQUESTS = (
    "### Task:\nGenerate a concise, 3-5 word title with an emoji summarizing the chat history.\n### Output:\nJSON\n",
    "### Task:\nGenerate 1-3 broad tags categorizing the main themes of the chat history.\n### Output:\nJSON\n",
    "### Task:\nSuggest 3-5 relevant follow-up questions, from the user's point of view.\n### Output:\nJSON\n",
)
"""What chat pages such as Open WebUI ask beside a conversation, with all of it as text."""


@pytest.mark.parametrize("header", [{}, {"X-Session-Id": "page"}])
def test_side_requests_of_a_chat_page_do_not_disturb_its_conversation(
    http: httpx.Client, header: dict[str, str]
) -> None:
    def ask(messages: list[dict[str, Any]]) -> dict[str, Any]:
        body = {"model": "tiny", "messages": messages, "max_tokens": 6}
        answer: dict[str, Any] = http.post("/v1/chat/completions", json=body, headers=header).json()
        return answer

    messages: list[dict[str, Any]] = []
    for turn in range(4):
        messages.append({"role": "user", "content": f"Name a tree of {turn} letters. {header}"})
        answer = ask(messages)
        assert answer["usage"]["zsmerge"]["reuse"] == ("continued" if turn else "new")
        messages.append(answer["choices"][0]["message"])
        history = "\n".join(f"{each['role'].upper()}: {each['content']}" for each in messages)
        for task in SIDE_REQUESTS:
            ask([{"role": "user", "content": f"{task}### Chat History:\n<chat_history>\n{history}\n</chat_history>"}])


def test_a_session_is_inspected_forked_saved_loaded_and_deleted(http: httpx.Client) -> None:
    answer = chat(http, session_id="first")
    cache = http.get("/v1/sessions/first").json()["cache"]
    assert cache["read_tokens"] == cache["verbatim_tokens"] > 0
    assert cache["dropped_tokens"] == 0
    assert "<html" in http.get("/v1/sessions/first/map").text

    assert http.post("/v1/sessions/first/fork", json={"id": "second"}).status_code == 201
    assert http.post("/v1/sessions/first/fork", json={"id": "second"}).status_code == 409
    data = http.get("/v1/sessions/first/file").content
    assert http.delete("/v1/sessions/first").json()["deleted"]
    assert http.get("/v1/sessions/first").status_code == 404
    assert http.post("/v1/sessions?id=third", content=data).status_code == 201
    messages = [*ASK, answer["choices"][0]["message"], {"role": "user", "content": "And a river?"}]
    for name in ("second", "third"):
        assert chat(http, messages, session_id=name)["usage"]["zsmerge"]["reuse"] in ("continued", "restored")


def test_a_file_that_is_no_session_is_refused(http: httpx.Client) -> None:
    for data in (b"", b"no session", bytes(1000)):
        reply = http.post("/v1/sessions?id=fourth", content=data)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "session_corrupt")
    assert "fourth" not in listed(http)


def test_a_document_is_read_once_and_asked_about(http: httpx.Client) -> None:
    text = MARIGOLD.read_text(encoding="utf-8")
    read = http.post("/v1/documents", json={"text": text}).json()
    again = http.post("/v1/documents/file", files={"file": ("marigold.txt", text.encode())}).json()
    assert read["id"] == again["id"]
    assert read["id"] in listed(http, "documents") - listed(http)

    for question in ("Who is the captain?", "Who is the cat?"):
        answer = chat(http, [{"role": "user", "content": question}], document_id=read["id"])
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == read["tokens"]
        messages = [{"role": "user", "content": question}, answer["choices"][0]["message"], *ASK]
        after = chat(http, messages, document_id=read["id"])
        assert after["usage"]["zsmerge"]["reuse"] == "continued"
        assert after["session_id"] == answer["session_id"]
    assert http.delete(f"/v1/documents/{read['id']}").status_code == 200


def test_the_text_of_a_pdf_is_read(http: httpx.Client) -> None:
    reply = http.post("/v1/documents/file", files={"file": ("light.pdf", pdf("The keeper of the light is Ann."))})
    assert reply.status_code == 201, reply.text


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty"), (b"\xff\xfe\x00", "neither text"), (b"%PDF-1.4 broken", "PDF"), (b"   ", "")],
)
def test_a_file_without_text_is_refused(http: httpx.Client, data: bytes, reason: str) -> None:
    reply = http.post("/v1/documents/file", files={"file": ("it", data)})
    assert reply.status_code == 400
    assert reason in reply.json()["error"]["message"]


def test_users_see_and_continue_their_own_alone(users: Users) -> None:
    ann, bob = users
    answer = chat(ann, session_id="talk")
    document = ann.post("/v1/documents", json={"text": "The keeper is Ann. " * 20}).json()["id"]
    messages = [*ASK, answer["choices"][0]["message"], {"role": "user", "content": "And a river?"}]

    assert chat(bob, messages, session_id="talk")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert chat(ann, messages, session_id="talk")["usage"]["zsmerge"]["reuse"] == "continued"
    assert document not in listed(bob, "documents")
    body = {"model": "tiny", "messages": ASK, "max_tokens": 3, "document_id": document}
    assert bob.post("/v1/messages", json=body).status_code == 404
    for path in (f"/v1/documents/{document}", "/v1/sessions/other"):
        assert bob.get(path).status_code == bob.delete(path).status_code == 404
    assert document in listed(ann, "documents")
    unnamed = chat(ann, [{"role": "user", "content": "Name a cape."}])["session_id"]
    assert unnamed in listed(ann) - listed(bob)


def test_a_response_belongs_to_the_user_whose_it_is(users: Users) -> None:
    ann, bob = users
    first = ann.post("/v1/responses", json={"model": "tiny", "input": "Name a tree."}).json()
    for client, status in ((ann, 200), (bob, 404)):
        body = {"model": "tiny", "input": "Another.", "previous_response_id": first["id"]}
        assert client.post("/v1/responses", json=body).status_code == status


def test_the_state_of_the_server_is_shown(http: httpx.Client, llm: LLM) -> None:
    chat(http)
    assert http.get("/health").json() == {"status": "ok", "loaded": True}
    figures = http.get("/metrics").text
    assert 'zsmerge_requests_total{outcome="length"}' in figures
    assert f'zsmerge_sessions{{tier="host"}} {sum(info.tier == "host" for info in llm.store)}.0' in figures
    assert "zsmerge_queue 0.0" in figures


def pdf(text: str) -> bytes:
    """Return a PDF of one line."""
    content = f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 400 200] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
    ]
    out, offsets = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    return out + start + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(out))
