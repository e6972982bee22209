"""How much memory a device has, and how much of it is free. On the host a container's limit counts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zsmerge_llm.models.device import accelerator_memory, is_host

if TYPE_CHECKING:
    import torch

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
UNLIMITED = 1 << 60
"""Control groups of version 1 write a number near 2**63 where there is no limit."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device. swap: what the host can move to disk, part of neither `total` nor `available`."""

    total: int
    available: int
    swap: int = 0


def device_memory(device: torch.device) -> DeviceMemory | None:
    """Return the memory of a device; None where it cannot be told."""
    if is_host(device):
        return host_memory()
    found = accelerator_memory(device)
    return None if found is None else DeviceMemory(total=found[1], available=found[0])


def host_memory() -> DeviceMemory | None:
    """Return the host's memory, by /proc and the control group of this process, else by psutil where it is installed.

    What the kernel holds of files counts as available: it gives that back.
    """
    if not MEMINFO.is_file():
        return _by_psutil()
    lines = (line.split() for line in MEMINFO.read_text(encoding="ascii").splitlines())
    sizes = {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if len(words) > 1}
    total, available = sizes["MemTotal"], sizes.get("MemAvailable", sizes["MemFree"])
    limit, used = _cgroup()
    if limit is not None and limit < total:
        total, available = limit, min(available, max(0, limit - used))
    return DeviceMemory(total, available, sizes.get("SwapTotal", 0))


def _cgroup() -> tuple[int | None, int]:
    """Return the limit of this process's control group, None for none, and what is used of it but for file pages."""
    for limit_name, used_name, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _number(CGROUP / limit_name)
        if limit is None or limit >= UNLIMITED:
            continue
        used, stat = _number(CGROUP / used_name) or 0, (CGROUP / used_name).parent / "memory.stat"
        try:
            counts = dict(line.split() for line in stat.read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            counts = {}
        return limit, used - int(counts.get(cached, 0))
    return None, 0


def _number(path: Path) -> int | None:
    """Return the number in a file; None where there is no file, or no number ("max")."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _by_psutil() -> DeviceMemory | None:
    try:
        import psutil
    except ImportError:
        return None
    memory = psutil.virtual_memory()
    return DeviceMemory(memory.total, memory.available, psutil.swap_memory().total)
