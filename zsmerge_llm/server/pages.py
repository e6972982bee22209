"""The page at `/`: a chat. It loads nothing from elsewhere, and runs nothing that is written in a conversation."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter()

TYPES = {"chat.html": "text/html", "chat.js": "text/javascript", "chat.css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Browsers load nothing from elsewhere, and run no script that is within the page."""


@router.get("/", include_in_schema=False)
def page() -> Response:
    """Return the page."""
    return _asset("chat.html")


@router.get("/assets/{name}", include_in_schema=False)
def asset(name: str) -> Response:
    """Return its script or style."""
    return _asset(name) if name in TYPES else Response(status_code=404)


def _asset(name: str) -> Response:
    content = files("zsmerge_llm").joinpath("server").joinpath("assets").joinpath(name).read_bytes()
    headers = {"content-security-policy": POLICY, "cache-control": "no-cache"}
    return Response(content, media_type=f"{TYPES[name]}; charset=utf-8", headers=headers)
