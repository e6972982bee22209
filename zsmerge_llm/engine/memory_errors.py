"""Turn a device's memory errors into ours, with what would fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import DeviceMemoryError
from zsmerge_llm.kvcache.slots import LayerSpec


@contextmanager
def name_memory_errors(what: str, remedy: str) -> Iterator[None]:
    """Raise DeviceMemoryError in place of torch's own. what: the work that failed. remedy: what would fit."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0] if str(error) else "out of memory"
        raise DeviceMemoryError(f"The device has no memory left for {what}: {remedy}. ({first})") from error


def decoding_remedy(config: CacheConfig, specs: Sequence[LayerSpec], rows: int) -> str:
    """Return what would fit instead of so many conversations of a configuration that decode at once."""
    slots = config.slots
    if slots is None:
        return "use a compressed cache (CacheConfig(slots=...)), whose size does not grow"
    each = sum(
        slots * spec.kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize
        for spec in specs
        if spec.window is None
    )
    fewer = f"decode {rows // 2} at once instead of {rows}, or " if rows > 1 else ""
    return f"{fewer}use CacheConfig(slots={slots // 2}), which takes {each // 2 / 1e6:.0f} MB a conversation less"
