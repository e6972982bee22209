"""A local LLM backend with a KV cache of constant size (ZSMerge, arXiv 2503.10714) that lives on between turns.

Public names load on first use: importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zsmerge_llm.config import CacheConfig, SamplingParams
    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.engine.scheduling import SchedulingConfig
    from zsmerge_llm.inspection.html import write_html
    from zsmerge_llm.inspection.memory_map import MemoryMap, memory_map
    from zsmerge_llm.kvcache.cache import Cache
    from zsmerge_llm.language.grammar import Grammar
    from zsmerge_llm.language.output_types import OutputType
    from zsmerge_llm.llm import LLM
    from zsmerge_llm.sessions.session import Session
    from zsmerge_llm.sessions.store import Store
    from zsmerge_llm.types import Chunk, Message, Result, TokenLogprob, ToolCallDelta, Usage

__version__ = "0.1.0"

_HOMES = {
    "Cache": "kvcache.cache",
    "CacheConfig": "config",
    "SamplingParams": "config",
    "SchedulingConfig": "engine.scheduling",
    "Engine": "engine.engine",
    "Grammar": "language.grammar",
    "OutputType": "language.output_types",
    "LLM": "llm",
    "MemoryMap": "inspection.memory_map",
    "memory_map": "inspection.memory_map",
    "write_html": "inspection.html",
    "Session": "sessions.session",
    "Store": "sessions.store",
    "Chunk": "types",
    "Message": "types",
    "Result": "types",
    "TokenLogprob": "types",
    "ToolCallDelta": "types",
    "Usage": "types",
}

__all__ = [
    "LLM",
    "Cache",
    "CacheConfig",
    "Chunk",
    "Engine",
    "Grammar",
    "MemoryMap",
    "Message",
    "OutputType",
    "Result",
    "SamplingParams",
    "SchedulingConfig",
    "Session",
    "Store",
    "TokenLogprob",
    "ToolCallDelta",
    "Usage",
    "memory_map",
    "write_html",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"zsmerge_llm.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'zsmerge_llm' has no attribute {name!r}")
