"""An ASGI application on a free port of this machine, in a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from zsmerge_llm.server.connections import TimedConnection


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Serve an application; yield the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1, http=TimedConnection)
        server = uvicorn.Server(config)
        port = free.getsockname()[1]
        free.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [free]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(20)
