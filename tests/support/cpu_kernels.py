"""Load the C++ kernels of an engine on the CPU without compiling its decode steps."""

from __future__ import annotations

from typing import Any

from zsmerge_llm import Engine


def load_kernels(engine: Engine, *, prefill: bool = False) -> None:
    backend: Any = engine.backend  # a CPUBackend
    backend._load_decode()
    if prefill:
        backend._load_prefill()
