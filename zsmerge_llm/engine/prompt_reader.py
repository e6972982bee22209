"""Read a prompt into a cache chunk by chunk, and choose what of it decides what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from threading import Event

from torch import Tensor

from zsmerge_llm.engine.device_thread import DeviceThread, Kind
from zsmerge_llm.engine.memory_errors import name_memory_errors
from zsmerge_llm.engine.model_runner import ModelRunner, Probe
from zsmerge_llm.engine.scheduling import check_cancelled
from zsmerge_llm.engine.static_reader import StaticReader
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.policies import policy_of
from zsmerge_llm.kvcache.slots import LayerSpec
from zsmerge_llm.types import Progress


@dataclass(frozen=True)
class Reading:
    """How a prompt is read. chunk: tokens of a pass. The others: see `Engine.read`."""

    chunk: int
    probe: Probe | None
    multi_turn: bool
    pinned_tail: int
    priority: int


class PromptReader:
    """Reads prompts of any length. Between two chunks other requests may have their turn."""

    def __init__(self, runner: ModelRunner, specs: tuple[LayerSpec, ...], device: DeviceThread) -> None:
        self._runner, self._device = runner, device
        self._static = StaticReader(runner, specs) if runner.backend.static_sizes is not None else None

    def read(
        self, cache: Cache, tokens: Tensor, how: Reading, cancel: Event | None, progress: Progress | None
    ) -> Tensor:
        """Read ids [T] into a one-row cache: float32 logits [vocab] after the last.

        Raises:
            Cancelled: `cancel` was set. DeviceMemoryError: no memory for a chunk.
        """
        # The first `unpinned` tokens may be evicted while the text is read.
        done, unpinned = 0, 0 if len(tokens) <= cache.config.num_recent else len(tokens) - how.pinned_tail
        try:
            for chunk in tokens.split(how.chunk):
                check_cancelled(cancel)
                done += len(chunk)
                run = partial(self._read_chunk, cache, chunk, how, pinned=max(0, done - unpinned))
                logits = self._device.call(run, Kind.CHUNK, priority=how.priority, cancel=cancel, tokens=len(chunk))
                if progress is not None:
                    progress(done, len(tokens))
        finally:
            if self._static is not None:
                self._device.call(partial(self._static.release, cache))
        return logits

    def _read_chunk(self, cache: Cache, chunk: Tensor, how: Reading, pinned: int) -> Tensor:
        """Read one chunk, ids [n]: float32 logits [vocab] after the last. A full one in fixed memory, if possible."""
        probe = None if cache.fits(len(chunk)) else how.probe
        smaller = f"use chunk={max(1, how.chunk // 2)} or fewer slots"
        with name_memory_errors(f"reading a chunk of {len(chunk)} tokens", smaller):
            if self._static is not None:
                if not pinned and len(chunk) == how.chunk and self._static.takes(cache, len(chunk), probe):
                    return self._static.run(cache, chunk, probe, how.multi_turn)[0, -1].float()
                self._static.release(cache)
            logits = self._runner.run(cache, chunk[None], probe=probe, pinned_recent=pinned, multi_turn=how.multi_turn)
            return logits[0, -1].float()


def prompt_probe(cache: Cache, question: Tensor | None, multi_turn: bool, num_new: int) -> Probe | None:
    """Return the probe for a prompt of `num_new` tokens, as far as the cache's policy uses one and has no gate."""
    config = cache.config
    if config.slots is None or question is None or not (policy := policy_of(config)).uses_probe:
        return None
    if any(layer.spec.gate is not None for layer in cache.layers):
        return None
    # In a chat, whole passages for a short turn's question would cost what earlier turns said (docs/research/eviction).
    whole_passages = config.passage_share > 0 and (not multi_turn or num_new > config.slots)
    return Probe(question, voting=policy.votes and whole_passages)
