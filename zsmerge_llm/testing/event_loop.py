"""Measure whether code blocks an event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

TICK_SECONDS = 0.002


@asynccontextmanager
async def event_loop_gaps() -> AsyncIterator[list[float]]:
    """Yield a list that collects the seconds between two turns of a task that sleeps for 2 ms each time.

    ```python
    async with event_loop_gaps() as gaps:
        await chat.ainvoke("Hello")
    assert max(gaps) < 0.05
    ```
    """
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(TICK_SECONDS)
            gaps.append(time.perf_counter() - before)

    task = asyncio.create_task(tick())
    await asyncio.sleep(5 * TICK_SECONDS)
    yield gaps
    task.cancel()
