"""Capture work on fixed memory as CUDA graphs, which repeat it without Python or launches in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP_RUNS = 2
"""Runs before a capture: libraries choose their kernels and allocate workspaces then, which a capture must not do."""


class GraphCapture:
    """Captures work as CUDA graphs, all in one memory pool: they run one after another."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats `run`, a graph. `warm_up` does the same work without a trace.

        Raises whatever a capture raises: host reads, copies between devices, no memory.
        """
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                warm_up()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy conversations to the host meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        self._pool = graph.pool()
        return graph.replay
