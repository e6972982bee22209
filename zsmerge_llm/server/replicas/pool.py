"""The replicas as the router knows them: where they are, and which of them answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import httpx

from zsmerge_llm.server.replicas.routing import replica_order

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
ANSWER_SECONDS = 10.0
"""How long a replica may take to say that it is well. Python may be held for a moment while a model works."""
MOST_FAILURES = 3
"""Checks in a row that a replica may miss before it counts as dead."""


@dataclass
class Replica:
    """One server behind the router.

    Attributes:
        number: from 0. address: such as "http://127.0.0.1:8001"; None while there is none.
        answers: whether requests go there. failures: checks in a row that it has missed.
        restarts: how often it was started again.
    """

    number: int
    address: str | None = None
    answers: bool = False
    failures: int = 0
    restarts: int = 0

    def listen(self, address: str) -> None:
        """Record where it is, from now on."""
        self.address, self.answers, self.failures = address, True, 0

    @property
    def is_lost(self) -> bool:
        """Whether it has missed so many checks that it counts as dead."""
        return self.failures >= MOST_FAILURES

    def end(self) -> None:
        """Record that its process is gone."""
        self.address, self.answers = None, False


class ReplicaPool:
    """All replicas, and a check of each once a second.

    client: asks them.
    """

    def __init__(self, replicas: Sequence[Replica], client: httpx.AsyncClient) -> None:
        self.replicas = replicas
        self.client = client

    def ranked(self, key: str) -> list[Replica]:
        """Return the replicas that answer, the one that a conversation belongs to first."""
        ranked = (self.replicas[number] for number in replica_order(key, len(self.replicas)))
        return [replica for replica in ranked if replica.answers]

    @property
    def answering(self) -> list[Replica]:
        """The replicas that answer."""
        return [replica for replica in self.replicas if replica.answers]

    async def watch(self) -> None:
        """Check all replicas, for ever."""
        while True:
            await asyncio.gather(*(self._check(replica) for replica in self.replicas))
            await asyncio.sleep(CHECK_SECONDS)

    async def _check(self, replica: Replica) -> None:
        address = replica.address
        if address is None:
            return
        is_well = False
        with suppress(httpx.HTTPError):
            is_well = (await self.client.get(f"{address}/health", timeout=ANSWER_SECONDS)).status_code == 200
        if replica.address != address:  # another one by now
            return
        replica.failures = 0 if is_well else replica.failures + 1
        if replica.answers and replica.is_lost:
            log.warning("Replica %d does not answer", replica.number)
        if is_well or replica.is_lost:
            replica.answers = is_well
