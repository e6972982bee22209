"""A backend that decodes in fixed memory on a CPU, as a GPU does, but runs each step instead of repeating a graph."""

from __future__ import annotations

from collections.abc import Callable

from zsmerge_llm.attention.backend import TorchBackend


class StaticBackend(TorchBackend):
    """PyTorch's attention, steps in fixed memory. captured: how many pieces of work were made repeatable."""

    static_sizes = (1, 2, 4)

    def __init__(self) -> None:
        super().__init__()
        self.captured = 0

    def capture(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        """Return `run` itself, after warming up as a capture does."""
        self.captured += 1
        warm_up()
        warm_up()
        return run
