"""What an `LLM` takes of its device's memory and how it decodes, in figures and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.models.device import is_host
from zsmerge_llm.models.device_memory import device_memory
from zsmerge_llm.models.footprint import weight_nbytes
from zsmerge_llm.planning.decode_step import Compile, running_step
from zsmerge_llm.planning.idle_conversations import idle_nbytes
from zsmerge_llm.planning.planner import dequantized_weights, plan
from zsmerge_llm.planning.shape import ModelShape, shape_of
from zsmerge_llm.planning.sizes import format_bytes, format_table
from zsmerge_llm.planning.workspace import workspace_nbytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from zsmerge_llm.engine.engine import Engine
    from zsmerge_llm.sessions.store import Store

PLANNED = ("dtype", "device", "device_map", "quantization", "progress")
"""Settings of loading that a plan heeds."""


@dataclass(frozen=True)
class Explanation:
    """What an `LLM` takes of memory, in bytes, and how it decodes.

    Attributes:
        loaded: whether the figures are of the loaded model; else they are planned.
        cache_nbytes: of one conversation, with the logits after its last token.
        context_window: positions that the model was trained on, where its config says so.
        full_cache_nbytes: keys and values of an exact cache at the context window.
        workspace_nbytes: peak of a forward pass above weights and caches.
        conversations_in_memory, conversations_on_disk, conversations_nbytes: of the store; None before loading.
        headroom_nbytes: what is free: before loading beside everything planned for one conversation, afterwards beside
            the workspace; None where the device does not tell.
        decode_step: "captured", "compiled" or "eager". reason: why.
        threads: of a pass, now. threads_reason: why not more. None before loading, and where the backend has no say.
    """

    model: str
    dtype: str
    quantization: str | None
    device: str
    loaded: bool
    weights_nbytes: int
    slots: int | None
    cache_nbytes: int
    context_window: int | None
    full_cache_nbytes: int | None
    workspace_nbytes: int
    conversations_in_memory: int | None
    conversations_on_disk: int | None
    conversations_nbytes: int | None
    headroom_nbytes: int | None
    decode_step: str
    reason: str
    threads: int | None = None
    threads_reason: str | None = None

    def __str__(self) -> str:
        slots = "exact: it grows" if self.slots is None else f"{self.slots:,} slots"
        rows = [
            ("weights", format_bytes(self.weights_nbytes), self.quantization or self.dtype),
            ("cache", format_bytes(self.cache_nbytes), f"per conversation: {slots}"),
        ]
        if self.full_cache_nbytes is not None:
            window = f"an exact cache at the context window of {self.context_window:,} tokens"
            rows.append(("full cache", format_bytes(self.full_cache_nbytes), window))
        rows.append(("workspace", format_bytes(self.workspace_nbytes), "peak of a pass above weights and caches"))
        if self.conversations_nbytes is not None:
            count = f"{self.conversations_in_memory:,} in memory, {self.conversations_on_disk:,} on disk only"
            rows.append(("conversations", format_bytes(self.conversations_nbytes), count))
        headroom = "unknown" if self.headroom_nbytes is None else format_bytes(self.headroom_nbytes)
        rows += [("headroom", headroom, f"on {self.device}"), ("decode step", self.decode_step, self.reason)]
        if self.threads is not None:
            rows.append(("threads", f"{self.threads:,}", self.threads_reason or ""))
        quantization = "" if self.quantization is None else f", {self.quantization}"
        state = "loaded" if self.loaded else "not loaded yet"
        return f"{self.model} on {self.device} in {self.dtype}{quantization}, {state}\n{format_table(rows)}"


def free_for_idle(engine: Engine, quantization: str | None) -> int:
    """Return the bytes that idle conversations may take on the devices of a loaded model; 0 where they do not tell."""
    devices = engine.layers.devices
    memory = {device: device_memory(device) for device in set(devices)}
    # Each device holds a part of every cache, and the fullest one decides.
    available = min(
        int(found.available * len(devices) / devices.count(device)) if found is not None else 0
        for device, found in memory.items()
    )
    shape = shape_of(engine.model, engine.layers)
    workspace, cache_nbytes = _workspace(engine, shape, quantization), shape.conversation_nbytes(engine.config)
    return idle_nbytes(available, workspace, cache_nbytes, shape.states_nbytes)


def _workspace(engine: Engine, shape: ModelShape, quantization: str | None) -> int:
    """Return the peak of a loaded model's forward pass above weights and caches."""
    on_host = is_host(engine.device)
    dequantized = dequantized_weights(shape, quantization, on_host)
    return workspace_nbytes(shape, engine.config, engine.chunk, on_host=on_host, dequantized=dequantized)


def explain_loaded(name: str, engine: Engine, store: Store, quantization: str | None, compile: Compile) -> Explanation:
    """Explain a loaded model: by its engine and its store."""
    cache, target = engine.config, engine.device
    shape = shape_of(engine.model, engine.layers)
    workspace = _workspace(engine, shape, quantization)
    memory, step = device_memory(target), running_step(engine.backend, compile)
    threads, threads_reason = engine.backend.thread_choice() or (None, None)
    sessions = list(store)
    in_memory = sum(info.in_memory for info in sessions)
    return Explanation(
        model=name,
        dtype=str(shape.dtype).removeprefix("torch."),
        quantization=quantization,
        device=str(target),
        loaded=True,
        weights_nbytes=sum(weight_nbytes(engine.model, shape.dtype).values()),
        slots=cache.slots,
        cache_nbytes=shape.conversation_nbytes(cache),
        context_window=shape.window,
        full_cache_nbytes=None if shape.window is None else shape.full_cache_nbytes(shape.window),
        workspace_nbytes=workspace,
        conversations_in_memory=in_memory,
        conversations_on_disk=len(sessions) - in_memory,
        conversations_nbytes=store.nbytes + store.device_nbytes,
        headroom_nbytes=None if memory is None else memory.available - workspace,
        decode_step=step.step,
        reason=step.reason,
        threads=threads,
        threads_reason=threads_reason,
    )


def explain_planned(
    model: str | Path | PreTrainedModel,
    loading: Mapping[str, Any],
    cache: CacheConfig,
    chunk: int | Literal["auto"],
    compile: Compile,
) -> Explanation:
    """Explain a model that is not loaded, by a plan for one conversation.

    Args:
        loading: the settings that go to the loader. The others are as for `LLM`.

    Raises:
        LoadError: as `plan`.
    """
    settings: dict[str, Any] = {each: loading[each] for each in PLANNED}
    if not isinstance(model, (str, Path)):
        settings |= {"dtype": model.dtype, "device": model.device}
    made = plan(model, cache=cache, chunk=chunk, compile=compile, **settings)
    return Explanation(
        model=made.model,
        dtype=made.dtype,
        quantization=made.quantization,
        device=made.device,
        loaded=False,
        weights_nbytes=made.weights_nbytes,
        slots=made.slots,
        cache_nbytes=made.cache_nbytes,
        context_window=made.context_window,
        full_cache_nbytes=made.full_cache_nbytes,
        workspace_nbytes=made.workspace_nbytes,
        conversations_in_memory=None,
        conversations_on_disk=None,
        conversations_nbytes=None,
        headroom_nbytes=made.headroom_nbytes,
        decode_step=made.decode_step,
        reason=made.reason,
    )
