"""Replicas as processes of this machine: started, watched, started again, and ended with the router."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from socket import create_server
from threading import Thread
from typing import Any

from zsmerge_llm.errors import LoadError, ZSMergeError
from zsmerge_llm.server.replicas.pool import Replica
from zsmerge_llm.server.settings import ServerSettings

log = logging.getLogger(__name__)

KILL_SECONDS = 20
"""After so long a process that was told to stop is killed."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between two starts of a replica that does not come up: doubled each time."""
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class ReplicaSettings:
    """What one replica serves.

    Attributes:
        model, llm: the first argument of `LLM`, and the others by their names.
    """

    model: str
    llm: dict[str, Any] = field(default_factory=dict)
    server: ServerSettings = field(default_factory=ServerSettings)


class ReplicaProcesses:
    """Processes with a server each, on ports of the loopback address that the system chooses.

    Attributes:
        replicas: what the router knows of them.
    """

    def __init__(self, settings: Sequence[ReplicaSettings]) -> None:
        self.replicas = [Replica(number) for number in range(len(settings))]
        self._settings = settings
        self._processes: list[BaseProcess | None] = [None] * len(settings)

    def start(self) -> None:
        """Start all, and wait until they listen.

        Raises:
            ZSMergeError: what kept a model from loading. Then none runs.
        """
        try:
            starting = [self._spawn(replica) for replica in self.replicas]
            for replica, connection in zip(self.replicas, starting, strict=True):
                replica.listen(_address(connection))
        except BaseException:
            self.stop()
            raise

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Start those again that end meanwhile; at the end stop all."""
        watching = [asyncio.create_task(self._watch(replica)) for replica in self.replicas]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """Let all processes save what is open, and end."""
        processes = [process for process in self._processes if process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(KILL_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()

    def _spawn(self, replica: Replica) -> Connection:
        """Start a replica's process, and return where it will tell its port."""
        context = multiprocessing.get_context("spawn")  # a fork would share locks with threads that it does not have
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(self._settings[replica.number], theirs))
        process.start()
        theirs.close()
        self._processes[replica.number] = process
        return ours

    async def _watch(self, replica: Replica) -> None:
        """Start a replica again whenever its process has ended or does not answer."""
        pause = FIRST_PAUSE
        while True:
            process = self._processes[replica.number]
            assert process is not None
            if process.is_alive() and not replica.is_lost:
                await asyncio.sleep(POLL_SECONDS)
                continue
            process.kill()
            replica.end()
            log.warning("Replica %d has ended (exit code %s): it is started again", replica.number, process.exitcode)
            try:
                replica.restarts += 1
                replica.listen(await asyncio.to_thread(_address, self._spawn(replica)))
                pause = FIRST_PAUSE
            except (ZSMergeError, OSError) as error:
                log.error("Replica %d does not start: %s", replica.number, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)


def _address(connection: Connection) -> str:
    """Return where a replica listens, once it does. Raises ZSMergeError: what kept it from that."""
    with connection:
        try:
            told = connection.recv()
        except EOFError:
            raise LoadError("A replica has ended before it could serve: its output says why.") from None
    if isinstance(told, ZSMergeError):
        raise told
    return f"http://127.0.0.1:{told}"


def _serve(settings: ReplicaSettings, router: Connection) -> None:
    """Serve a model on a free loopback port, and tell it. The process ends with the one that began it."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C is for the router, which lets answers end first
    Thread(target=_end_with_parent, daemon=True).start()
    try:
        from zsmerge_llm import LLM
        from zsmerge_llm.server.app import create_app
        from zsmerge_llm.server.running import run_server

        llm = LLM(settings.model, **settings.llm)
        llm.warm_up()
    except ZSMergeError as error:
        router.send(error)
        return
    with llm, create_server(("127.0.0.1", 0), backlog=2048) as listener:
        router.send(listener.getsockname()[1])
        router.close()
        run_server(create_app(llm, settings.server), listener)


def _end_with_parent() -> None:
    """End this process, as if it were told to, once the one that began it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
