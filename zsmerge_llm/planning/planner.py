"""Plan the memory of a model and its conversations before anything is loaded.

No weight is read: the model is built without data, its cache by the engine's own code, and the peak of a pass follows
from shapes (`workspace`). What does not fit comes with the largest that does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zsmerge_llm.attention.backend import CHUNK_TOKENS
from zsmerge_llm.config import CacheConfig, parse_bytes
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.gpu.backend import CHUNKS
from zsmerge_llm.models.description import ModelDescription, describe
from zsmerge_llm.models.device import is_host, packed_bits, planned_placement, quantizations_on, validate_settings
from zsmerge_llm.models.device_memory import device_memory
from zsmerge_llm.models.footprint import meta_model, weight_nbytes
from zsmerge_llm.models.hub import StatusCallback
from zsmerge_llm.planning.decode_step import Compile, StepChoice, planned_step
from zsmerge_llm.planning.idle_conversations import STATIC_COPIES, TURN_COPIES, idle_nbytes, pending_nbytes
from zsmerge_llm.planning.shape import ModelShape, shape_of
from zsmerge_llm.planning.sizes import format_bytes, format_table
from zsmerge_llm.planning.workspace import workspace_nbytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MiB = 2**20
HOST_RUNTIME, DEVICE_RUNTIME = 10 * MiB, 512 * MiB
"""Bytes of the model's and the engine's objects on the host (measured; pages of shared libraries do not count, which
the kernel may drop); of a GPU's context (not measured)."""
TOKENIZER_FACTOR, TOKEN_NBYTES = 13, 1024
"""Bytes of a loaded tokenizer for a byte of its file, and for a token where there is no file (measured)."""
MOST = 2**20
"""Slots and sessions that a search for the largest stops at."""
_WORK_MATRIX = {"int8": 2**23, "int4": 3 * 2**18}
"""Most weights of a packed matrix that the CPU dequantizes at once (`cpu.quantized_linear`)."""


@dataclass(frozen=True)
class Plan:
    """What a model and its conversations take of a device's memory, in bytes.

    Attributes:
        slots: of the cache; None for the exact cache, which counts as full to the context window.
        weights: by kind: a dtype's or a quantization's name.
        weights_mapped: whether weights stay in their file, so that the system may drop and read them again.
        runtime_nbytes: tokenizer, code and compiler on the host, or a GPU's context.
        cache_nbytes: of one conversation, with the logits after its last token.
        states_nbytes: recurrent states, a part of `cache_nbytes`.
        turn_nbytes: copies of a conversation while its turn is answered; on a GPU also states behind pending tokens.
        workspace_nbytes: peak of a forward pass above weights and caches.
        available_nbytes: None where the device does not tell.
        on_host: whether the device is the host, where idle conversations take what `session_memory` grants.
        context_window: positions that the model was trained on, where its config says so.
        full_cache_nbytes: keys and values of an exact cache at the context window.
        decode_step, reason: how decode steps will run, and why.
        remedy: what fits instead; None where this does, or where it is not known.
    """

    model: str
    device: str
    dtype: str
    quantization: str | None
    slots: int | None
    chunk: int
    sessions: int
    weights: dict[str, int]
    weights_mapped: bool
    runtime_nbytes: int
    cache_nbytes: int
    states_nbytes: int
    turn_nbytes: int
    workspace_nbytes: int
    available_nbytes: int | None
    on_host: bool
    context_window: int | None
    full_cache_nbytes: int | None
    decode_step: str
    reason: str
    remedy: str | None = None

    @property
    def weights_nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.weights.values())

    @property
    def sessions_nbytes(self) -> int:
        """Bytes of all conversations between their turns."""
        return self.sessions * self.cache_nbytes

    @property
    def total_nbytes(self) -> int:
        """Bytes of everything at the peak, while one conversation is answered."""
        return (
            self.weights_nbytes + self.runtime_nbytes + self.sessions_nbytes + self.turn_nbytes + self.workspace_nbytes
        )

    @property
    def headroom_nbytes(self) -> int | None:
        """Bytes that stay free at the peak; negative where it does not fit, None where the device does not tell."""
        return None if self.available_nbytes is None else self.available_nbytes - self.total_nbytes

    @property
    def resident_sessions(self) -> int | None:
        """Idle conversations that stay on the device by default, before any goes to host memory; None on the host."""
        if self.on_host or self.available_nbytes is None:
            return None
        free = self.available_nbytes - self.weights_nbytes - self.runtime_nbytes
        return idle_nbytes(free, self.workspace_nbytes, self.cache_nbytes, self.states_nbytes) // self.cache_nbytes

    @property
    def fits(self) -> bool:
        """Whether it fits, as far as is known."""
        return self.headroom_nbytes is None or self.headroom_nbytes >= 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, sums included."""
        sums = ("weights_nbytes", "sessions_nbytes", "total_nbytes", "headroom_nbytes", "resident_sessions", "fits")
        return {**asdict(self), **{name: getattr(self, name) for name in sums}}

    def __str__(self) -> str:
        kinds = ", ".join(f"{name} {format_bytes(size)}" for name, size in self.weights.items() if size >= MiB)
        slots = "exact, at the context window" if self.slots is None else f"{self.slots:,} slots"
        unknown = "unknown"
        available = unknown if self.available_nbytes is None else format_bytes(self.available_nbytes)
        headroom = unknown if self.headroom_nbytes is None else format_bytes(self.headroom_nbytes)
        rows = [
            ("weights", format_bytes(self.weights_nbytes), kinds + ", mapped from the file" * self.weights_mapped),
            ("runtime", format_bytes(self.runtime_nbytes), "tokenizer, code, context of the device"),
            ("cache", format_bytes(self.cache_nbytes), f"per conversation: {slots}"),
            ("sessions", format_bytes(self.sessions_nbytes), f"{self.sessions:,} conversations"),
            ("turn", format_bytes(self.turn_nbytes), "copies while one conversation is answered"),
            ("workspace", format_bytes(self.workspace_nbytes), f"peak of a pass of {self.chunk:,} tokens"),
            ("total", format_bytes(self.total_nbytes), ""),
            ("available", available, f"on {self.device}"),
            ("headroom", headroom, "" if self.fits else "does not fit"),
            ("decode step", self.decode_step, self.reason),
        ]
        if self.resident_sessions is not None:
            rows.insert(
                -1, ("resident", f"{self.resident_sessions:,}", f"idle conversations that stay on {self.device}")
            )
        quantization = "" if self.quantization is None else f", {self.quantization}"
        return f"{self.model} on {self.device} in {self.dtype}{quantization}\n{format_table(rows)}"


def plan(
    model: str | Path | PreTrainedModel = "smollm2",
    *,
    cache: CacheConfig | None = None,
    sessions: int = 1,
    chunk: int | Literal["auto"] = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    device_map: Any = None,
    quantization: str | None = None,
    compile: Compile = "auto",
    memory: int | str | None = None,
    cache_dir: Path | str | None = None,
    progress: StatusCallback | None = None,
) -> Plan:
    """Plan a model and its conversations on one device. No weight is read; of a Hub model only the config is fetched.

    Args:
        model, cache, chunk, dtype, device, device_map, quantization, compile: as for `LLM`.
        sessions: conversations that are to be in memory at once.
        memory: bytes that are available, or text such as "16GiB", in place of what is free here. A device that this
            machine lacks can then be planned for.

    Raises:
        ConfigError: a setting that cannot work. LoadError: no such model, or none that the cache can carry.
    """
    validate_settings(dtype, device, device_map, quantization)
    sizes: tuple[int, ...] = (CHUNK_TOKENS,) if chunk == "auto" else (chunk,)
    if sizes[0] < 1 or sessions < 1:
        raise ConfigError(f"chunk and sessions must be at least 1, not {chunk} and {sessions}.")
    target, weight_dtype = planned_placement(device, dtype, elsewhere=memory is not None)
    packed_bits(quantization, target, device_map)
    if quantization not in (None, "nf4", *quantizations_on(target)):
        raise ConfigError(
            f"quantization={quantization!r} does not run on {target}: use one of its own, or another device."
        )
    available = None if memory is None else parse_bytes(memory)
    if available is None and (found := device_memory(target)) is not None:
        available = found.available
    description = describe(model, cache_dir, progress)
    planner = _Planner(description, target, weight_dtype, device_map, compile)
    if chunk == "auto" and not planner.on_host:
        sizes = CHUNKS
    for size in sizes:  # the first that fits, else the last
        made = planner.plan(cache or CacheConfig(), sessions, size, quantization, available)
        if made.fits:
            break
    return made if made.fits else replace(made, remedy=planner.remedy(made, cache or CacheConfig()))


class _Planner:
    """Plans of one model on one device."""

    def __init__(
        self, description: ModelDescription, device: torch.device, dtype: torch.dtype, device_map: Any, compile: Compile
    ) -> None:
        self.description = description
        self.device = device
        self.dtype = dtype
        self.on_host = is_host(device)
        self.model = meta_model(description.config, dtype)
        self.weights = {each: self._weights(each) for each in (None, "int8", "fp8", "int4", "nf4")}
        self._step: Callable[[str | None], StepChoice] = lambda quantization: planned_step(
            self.model, device, device_map, quantization, compile
        )
        self.shape: ModelShape = shape_of(self.model)

    def plan(
        self, cache: CacheConfig, sessions: int, chunk: int, quantization: str | None, available: int | None
    ) -> Plan:
        """Return the plan of these settings, without a remedy."""
        step, cache_nbytes = self._step(quantization), self.shape.conversation_nbytes(cache)
        in_fixed_memory = 0 if self.on_host else STATIC_COPIES * cache_nbytes
        pending = 0 if self.on_host else pending_nbytes(self.shape.states_nbytes, rows=1)
        name, files = str(self.dtype).removeprefix("torch."), self.description.stored
        stored = None if files is None else list(files.nbytes)
        return Plan(
            model=self.description.name,
            device=str(self.device),
            dtype=name,
            quantization=quantization,
            slots=cache.slots,
            chunk=chunk,
            sessions=sessions,
            weights=self.weights[quantization],
            weights_mapped=self.on_host and quantization is None and stored == [name],
            runtime_nbytes=self._runtime(),
            cache_nbytes=cache_nbytes,
            states_nbytes=self.shape.states_nbytes,
            turn_nbytes=TURN_COPIES * cache_nbytes + in_fixed_memory + pending,
            workspace_nbytes=workspace_nbytes(
                self.shape,
                cache,
                chunk,
                on_host=self.on_host,
                dequantized=dequantized_weights(self.shape, quantization, self.on_host),
            ),
            available_nbytes=available,
            on_host=self.on_host,
            context_window=self.shape.window,
            full_cache_nbytes=None if self.shape.window is None else self.shape.full_cache_nbytes(self.shape.window),
            decode_step=step.step,
            reason=step.reason,
        )

    def remedy(self, made: Plan, cache: CacheConfig) -> str:
        """Return what fits instead: fewer slots, fewer sessions, or a quantization; else what to do."""
        available, found = made.available_nbytes, []

        def variant(cache: CacheConfig, sessions: int, quantization: str | None) -> Plan:
            return self.plan(cache, sessions, made.chunk, quantization, available)

        if made.slots is not None:
            least = cache.num_protected + cache.residual + 1
            slots = _largest(
                least, made.slots, lambda n: variant(cache.replace(slots=n), made.sessions, made.quantization).fits
            )
            if slots is not None:
                found.append(f"slots={slots:,} for {made.sessions:,} sessions")
        sessions = _largest(1, made.sessions, lambda n: variant(cache, n, made.quantization).fits)
        if sessions is not None:
            found.append(f"{sessions:,} sessions of these slots")
        for other in quantizations_on(self.device):
            if made.quantization is None and variant(cache, made.sessions, other).fits:
                found.append(f"quantization={other!r}")
        needed = f"{made.model} needs {format_bytes(made.total_nbytes)}, {format_bytes(available or 0)} is available. "
        if not found:
            return needed + "No number of slots or sessions fits: use a smaller model or more memory."
        return f"{needed}What fits: {'; or '.join(found)}."

    def _weights(self, quantization: str | None) -> dict[str, int]:
        """Return the bytes of the weights by kind; those of a folder that is quantized already are what it holds."""
        stored = self.description.stored
        if stored is not None and getattr(self.description.config, "quantization_config", None) is not None:
            return dict(stored.nbytes)
        return weight_nbytes(self.model, self.dtype, quantization, packed=self.on_host)

    def _runtime(self) -> int:
        if not self.on_host:
            return DEVICE_RUNTIME
        size = self.description.tokenizer_nbytes
        tokenizer = TOKEN_NBYTES * self.shape.vocab if size is None else TOKENIZER_FACTOR * size
        return HOST_RUNTIME + tokenizer


def dequantized_weights(shape: ModelShape, quantization: str | None, on_host: bool) -> int:
    """Return how many weights of a quantized matrix a pass of many tokens dequantizes at once."""
    if quantization is None:
        return 0
    return min(shape.largest_matrix, _WORK_MATRIX.get(quantization, MOST**2) if on_host else MOST**2)


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest number from `low` to `high` that fits, None where none does: less always fits too."""
    if high < low or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
