"""Figures for Prometheus. Each server has a registry of its own."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from zsmerge_llm.types import Chunk, Usage

if TYPE_CHECKING:
    from zsmerge_llm.llm import LLM

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = ("prompt", "cached", "completion", "retrieved")


class Metrics:
    """Counts requests and tokens, and shows what the model's sessions hold.

    llm: whose.
    """

    def __init__(self, llm: LLM) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("zsmerge_requests", "Answers, by how they ended", ["outcome"], registry=self.registry)
        self._tokens = Counter("zsmerge_tokens", "Tokens of answers, by kind", ["kind"], registry=self.registry)
        self._dropped = Counter(
            "zsmerge_dropped_tokens", "Tokens that caches held no longer after answers", registry=self.registry
        )
        self._first = Histogram(
            "zsmerge_first_token_seconds", "Until the first piece", buckets=SECONDS, registry=self.registry
        )
        self._whole = Histogram(
            "zsmerge_request_seconds", "Until the last one", buckets=SECONDS, registry=self.registry
        )
        self._rate = Histogram(
            "zsmerge_decode_tokens_per_second",
            "Of one answer",
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500),
            registry=self.registry,
        )
        self.registry.register(_Sessions(llm))

    def text(self) -> bytes:
        """Return all figures as Prometheus reads them."""
        return generate_latest(self.registry)

    def record(self, usage: Usage, outcome: str, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(outcome).inc()
        self._whole.observe(seconds)
        for kind in TOKENS:
            self._tokens.labels(kind).inc(getattr(usage, f"{kind}_tokens"))
        self._dropped.inc(usage.dropped_tokens)
        if usage.decode_seconds > 0:
            self._rate.observe(usage.completion_tokens / usage.decode_seconds)

    def fail(self) -> None:
        """Count a request that was refused, failed, or left by its client."""
        self._requests.labels("failed").inc()

    async def watch(self, chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
        """Yield the chunks of an answer, and count it."""
        started, pieces, complete = time.monotonic(), 0, False
        try:
            async for chunk in chunks:
                pieces += 1
                if pieces == 1:
                    self._first.observe(time.monotonic() - started)
                if chunk.usage is not None:
                    complete = True
                    self.record(chunk.usage, str(chunk.finish_reason), time.monotonic() - started)
                yield chunk
        finally:
            if not complete:
                self.fail()
            await chunks.aclose()


class _Sessions:
    """What is held now."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges."""
        if not self._llm.loaded:
            return
        infos = list(self._llm.store)
        by_tier = GaugeMetricFamily("zsmerge_sessions", "Sessions, by where they are", labels=["tier"])
        sizes = GaugeMetricFamily("zsmerge_session_bytes", "Bytes of sessions, by where they are", labels=["tier"])
        number, nbytes = Tally(info.tier for info in infos), Tally[str]()
        for info in infos:
            nbytes[info.tier] += info.nbytes
        for tier in ("device", "host", "disk"):
            by_tier.add_metric([tier], number[tier])
            sizes.add_metric([tier], nbytes[tier])
        yield by_tier
        yield sizes
        running = self._llm.engine.requests.num_running
        yield GaugeMetricFamily("zsmerge_queue", "Requests that wait or are answered", value=running)
