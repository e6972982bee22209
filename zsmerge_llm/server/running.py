"""Run an ASGI application until the process is told to stop."""

from __future__ import annotations

from socket import socket
from typing import Any

import uvicorn

from zsmerge_llm.server.connections import TimedConnection

STOP_SECONDS = 10
"""How long answers may go on after the server was told to stop. Then they are cancelled; conversations stay whole."""


def run_server(app: Any, listener: socket) -> None:
    """Serve an application on a socket that listens, until Ctrl-C or SIGTERM."""
    options: dict[str, Any] = {"server_header": False, "timeout_graceful_shutdown": STOP_SECONDS}
    options["http"] = TimedConnection
    uvicorn.Server(uvicorn.Config(app, log_level="warning", **options)).run(sockets=[listener])
