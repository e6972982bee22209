"""How long an event loop is held."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def ticking() -> AsyncIterator[list[float]]:
    """The gaps between the ticks of a task that wants to run every two milliseconds."""
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            gaps.append(time.perf_counter() - before)

    task = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    yield gaps
    task.cancel()
