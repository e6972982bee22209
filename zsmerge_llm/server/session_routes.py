"""The routes of what is kept, and of the server's own state."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, UploadFile
from starlette.responses import HTMLResponse, Response

from zsmerge_llm.server import sessions
from zsmerge_llm.server.answers import Asking
from zsmerge_llm.server.delivery import json_reply, run
from zsmerge_llm.server.errors import invalid
from zsmerge_llm.server.files import text_of_file
from zsmerge_llm.server.metrics import Metrics
from zsmerge_llm.server.requests import Body

router = APIRouter()


class ForkBody(Body):
    """Under which id a session is copied."""

    id: str


class DocumentBody(Body):
    """A document as JSON."""

    text: str
    id: str | None = None


@router.get("/v1/sessions")
def list_sessions(asking: Asking) -> Response:
    """List a user's conversations."""
    return json_reply({"object": "list", "data": sessions.list_sessions(asking, documents=False)})


@router.post("/v1/sessions")
async def load_session(request: Request, asking: Asking, name: Annotated[str, Query(alias="id")]) -> Response:
    """Keep a conversation that was saved as a file, which is the body."""
    data = await request.body()
    return json_reply(await run(request, lambda cancel: sessions.load(asking, data, name)), 201)


@router.get("/v1/sessions/{name}")
def inspect_session(name: str, asking: Asking) -> Response:
    """Tell what a conversation's cache holds."""
    return json_reply(sessions.inspect(asking, name))


@router.get("/v1/sessions/{name}/map")
def draw_session(name: str, asking: Asking) -> Response:
    """Show which tokens a conversation's cache holds, as a page."""
    return HTMLResponse(sessions.draw(asking, name))


@router.get("/v1/sessions/{name}/file")
def save_session(name: str, asking: Asking) -> Response:
    """Return a conversation as a file."""
    return Response(
        sessions.save(asking, name),
        media_type="application/octet-stream",
        headers={"content-disposition": 'attachment; filename="session.zsmerge"'},
    )


@router.post("/v1/sessions/{name}/fork")
def fork_session(name: str, body: ForkBody, asking: Asking) -> Response:
    """Copy a conversation under another id."""
    return json_reply(sessions.fork(asking, name, body.id), 201)


@router.delete("/v1/sessions/{name}")
@router.delete("/v1/documents/{name}")
def delete_session(name: str, asking: Asking) -> Response:
    """Delete a conversation or a document."""
    sessions.delete(asking, name)
    return json_reply({"id": name, "deleted": True})


@router.get("/v1/documents")
def list_documents(asking: Asking) -> Response:
    """List a user's documents."""
    return json_reply({"object": "list", "data": sessions.list_sessions(asking, documents=True)})


@router.get("/v1/documents/{name}")
def inspect_document(name: str, asking: Asking) -> Response:
    """Tell what a document's cache holds."""
    return json_reply(sessions.inspect(asking, name))


@router.post("/v1/documents")
async def read_document(request: Request, body: DocumentBody, asking: Asking) -> Response:
    """Read a document, given as JSON."""
    work = lambda cancel: sessions.read_document(asking, body.text, body.id, cancel)  # noqa: E731
    return json_reply(await run(request, work), 201)


@router.post("/v1/documents/file")
async def read_file(
    request: Request,
    file: UploadFile,
    asking: Asking,
    name: Annotated[str | None, Form(alias="id")] = None,
) -> Response:
    """Read a document, given as a file of a form: text in UTF-8, Markdown or PDF."""
    data, title = await file.read(), file.filename or "The file"
    if not data:
        raise invalid("The file is empty.", "file")
    work = lambda cancel: sessions.read_document(asking, text_of_file(data, title), name, cancel)  # noqa: E731
    return json_reply(await run(request, work), 201)


@router.get("/health")
async def health(request: Request) -> Response:
    """Say that the server answers."""
    return json_reply({"status": "ok", "loaded": request.app.state.llm.loaded})


@router.get("/metrics")
def figures(request: Request, asking: Asking) -> Response:
    """Return the figures for Prometheus."""
    metrics: Metrics = request.app.state.metrics
    return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
