"""Token ids in, token ids out: prefill of any length in chunks, and decoding. Knows no text and no session.

Memory during prefill is a function of budget and chunk size, never of length. Threads may share an engine: all forward
passes run in a thread of its own (`device_thread`).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import Event
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zsmerge_llm.attention.backend import AttentionBackend
from zsmerge_llm.attention.interface import ModelLayers, prepare_model
from zsmerge_llm.attention.model_state import HeldModel
from zsmerge_llm.attention.positions import context_window
from zsmerge_llm.config import MAX_SIZE, CacheConfig, SamplingParams, check_integer
from zsmerge_llm.cpu.backend import CPUBackend
from zsmerge_llm.engine import decode_loop
from zsmerge_llm.engine.device_thread import DeviceThread, Kind
from zsmerge_llm.engine.model_runner import STEP_TOKENS, ModelRunner
from zsmerge_llm.engine.position_remapping import PositionRemapper
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.engine.prompt_reader import PromptReader, Reading, prompt_probe
from zsmerge_llm.engine.sampler import Sampler
from zsmerge_llm.engine.scheduler import DecodeScheduler
from zsmerge_llm.engine.scheduling import Cancelled, RequestLimit, SchedulingConfig, check_cancelled
from zsmerge_llm.engine.sequence import DecodeSequence
from zsmerge_llm.engine.static_decoder import make_decoder
from zsmerge_llm.engine.static_scheduler import StaticScheduler, is_capturable
from zsmerge_llm.errors import InputError
from zsmerge_llm.gpu.backend import GPUBackend
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.grammar import Constraint
from zsmerge_llm.models.gate_files import with_gates
from zsmerge_llm.types import Progress

__all__ = ["Cancelled", "Engine"]

Ids = Sequence[int] | Tensor
LOGPROB_ROWS = 64
"""Rows of logits that are turned to float32 at once: float32 [n, vocab] is large."""


class Engine:
    """A model on the compressed cache.

    Args:
        model: a decoder of transformers. It can only be called through this engine until `close`, or until nothing
            references the engine any more; then it is as it was.
        cache: configuration of the caches that `new_cache` makes.
        chunk: tokens read in one forward pass. Peak memory grows with it. "auto": what suits the device and its memory.
        compile: whether decode steps run through compiled layers and kernels: at once (True), never (False), or, with
            "auto", in the background; once that is done on a machine, from the first token.
        backend: computes attention; None: the one for the model's device.
        scheduling: how requests share the device.

    Attributes:
        layers: what each layer needs of a cache. specs: of those that attend. requests: counts calls, for a limit.

    Raises:
        UnsupportedModelError: an architecture or feature the cache cannot carry.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: CacheConfig | None = None,
        chunk: int | Literal["auto"] = "auto",
        compile: bool | Literal["auto"] = "auto",
        backend: AttentionBackend | None = None,
        scheduling: SchedulingConfig | None = None,
    ) -> None:
        if chunk != "auto":
            check_integer("chunk", chunk, 1, MAX_SIZE)
        self.model = model
        self.config = cache or CacheConfig()
        how = scheduling or SchedulingConfig()
        self.requests = RequestLimit(how.max_requests)
        self._held = HeldModel(self, model)
        try:
            attention, recurrent = prepare_model(model.eval())
            self.layers = ModelLayers(with_gates(model, attention), recurrent)
            self.specs = self.layers.attention
            self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
            self.stop_ids = _stop_ids(model)
            kind = CPUBackend if CPUBackend.serves(model) else GPUBackend
            own = (model, len(self.specs), compile == "auto", MAX_DRAFT_TOKENS)
            self.backend: AttentionBackend = backend or kind(*own)
            self._held.backends.append(self.backend)
            self.chunk = self.backend.default_chunk(self.specs) if chunk == "auto" else chunk
            self.runner = ModelRunner(model, self.backend, PositionRemapper(model, self.specs, self.context_window))
            self._device = _device_thread(self.backend, how, self.chunk)
            self._reader = PromptReader(self.runner, self.specs, self._device)
            self._scheduler = DecodeScheduler(self.runner, self._device, how.batch_invariant)
            self._static_scheduler = _static_scheduler(self.runner, self._device, self.layers, self.vocab_size, how)
            if compile is True:
                self.backend.start()
                self.read(self.new_cache(), [0])
        except BaseException:
            self._held.release()
            raise

    def close(self) -> None:
        """Give the model back as it was, once no other engine has it; later passes raise InputError."""
        self._device.call(partial(setattr, self.runner, "closed", True))
        self._held.release()

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.runner.device

    @property
    def max_decode_batch(self) -> int | None:
        """The most conversations that one decode step should take; None where more are always better."""
        return self.backend.max_decode_rows

    @property
    def context_window(self) -> int | None:
        """The number of positions the model was trained on, where its config says so."""
        return context_window(self.model.config)

    @property
    def exact_limit(self) -> int | None:
        """Tokens after which answers get worse; None where there is no such number: a compressed cache goes on."""
        return self.context_window if self.config.slots is None else None

    def warm_up(self) -> None:
        """Load what a prompt or an answer would load, and capture the decode step of one conversation."""
        self.backend.warm_up()
        if self.backend.static_sizes is not None:
            cache = self.new_cache()
            self.read(cache, [0])
            for _ in self.decode(cache, [SamplingParams(max_tokens=2, ignore_eos=True)], [[0]]):
                pass

    def new_cache(self, config: CacheConfig | None = None, rows: int = 1) -> Cache:
        """Make an empty cache for `rows` conversations, by default of the engine's configuration."""
        return Cache(config or self.config, self.specs, rows, self.layers.recurrent)

    # -- prefill -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def read(
        self,
        cache: Cache,
        ids: Ids,
        *,
        probe: Ids | None = None,
        multi_turn: bool = False,
        pinned_tail: int = 0,
        cancel: Event | None = None,
        progress: Progress | None = None,
        priority: int = 0,
    ) -> Tensor:
        """Read `ids` into a one-row cache; float32 logits [vocab] after the last of them.

        Args:
            probe: tokens that decide, by the attention they would pay if they came next, what is kept whenever the
                cache has to compress (only policies that use a probe). They are not read into the cache.
            multi_turn: whether the conversation has been answered before, so that a share of the slots is kept for its
                history (`CacheConfig.history_share`). Not for a text that comes with its question.
            pinned_tail: how many of the last `ids` are held whole while they are read; all are, where they fit into the
                share of the newest tokens (`CacheConfig.recent_share`).
            cancel: stops after the current chunk.
            progress: called with (tokens read, tokens to read) after each chunk.
            priority: where several requests wait for the device, the lowest number goes first.

        Raises:
            InputError: no ids, ids outside the vocabulary, or a cache of several rows or without free slots.
            Cancelled: `cancel` was set.
        """
        tokens = _checked_ids(self.vocab_size, ids)
        question = _checked_ids(self.vocab_size, probe) if probe is not None and len(probe) else None
        _check_one_row(cache)
        chosen = prompt_probe(cache, question, multi_turn, len(tokens))
        how = Reading(self.chunk, chosen, multi_turn, pinned_tail, priority)
        return self._reader.read(cache, tokens, how, cancel, progress)

    @torch.inference_mode()
    def read_batch(self, cache: Cache, rows: Sequence[Ids], *, cancel: Event | None = None) -> Tensor:
        """Read one list of ids into each row of `cache`; float32 logits [B, vocab] after the last of each.

        The rows are padded on the right for the pass; padding is never attended, scored or held.

        Raises:
            InputError: as `read`, or another number of rows than the cache has.
            Cancelled: `cancel` was set.
        """
        tokens = [_checked_ids(self.vocab_size, row) for row in rows]
        _check_rows(cache, len(tokens))
        for padded, valid in _padded_chunks(tokens, self.chunk):
            check_cancelled(cancel)
            self._device.call(partial(self.runner.run, cache, padded, valid), Kind.CHUNK, cancel=cancel)
        assert cache.logits is not None
        return cache.logits.float()

    @torch.inference_mode()
    def query_attention(self, cache: Cache, ids: Ids) -> list[Tensor]:
        """Return what tokens that came next in a one-row cache would attend to, without reading them.

        Returns:
            For each full-attention layer, in order, float32 [H, C]: the maximum over the tokens for each slot.

        Raises:
            InputError: as `read`.
        """
        _check_one_row(cache)
        tokens = _checked_ids(self.vocab_size, ids)
        return self._device.call(partial(self.runner.query_attention, cache, tokens), Kind.CHUNK)

    @torch.inference_mode()
    def logprobs(self, cache: Cache, ids: Ids, *, cancel: Event | None = None) -> Tensor:
        """Return float32 [T]: log p(ids[t] | everything in the cache, ids[:t]). Reads `ids` into the one-row cache.

        Nothing predicts the first token of an empty cache: its entry is 0. Raises as `read`.
        """
        _check_one_row(cache)
        parts = []
        for chunk in _checked_ids(self.vocab_size, ids).to(self.device).split(self.chunk):
            check_cancelled(cancel)
            parts.append(
                self._device.call(partial(_chunk_logprobs, self.runner, cache, chunk), Kind.CHUNK, cancel=cancel)
            )
        return torch.cat(parts)

    def token_embeddings(self, ids: Ids) -> Tensor:
        """Return the model's input embeddings of tokens: float32 [n, D] in host memory. Raises as `read`."""
        return self._device.call(partial(self.runner.token_embeddings, _checked_ids(self.vocab_size, ids)))

    # -- decoding ----------------------------------------------------------------------------------------------------

    def stream(
        self,
        cache: Cache,
        ids: Ids,
        sampling: SamplingParams | None = None,
        *,
        probe: Ids | None = None,
        cancel: Event | None = None,
        progress: Progress | None = None,
    ) -> Iterator[int]:
        """Read `ids`, then yield new token ids until the end token (not yielded), `max_tokens` or `cancel`.

        Every yielded token but the last is in the cache when the stream ends. Stop strings are the caller's business.

        Raises:
            InputError: as `read`. Cancelled: `cancel` was set.
        """
        params, tokens = sampling or SamplingParams(), _checked_ids(self.vocab_size, ids)
        self.read(cache, tokens, probe=probe, cancel=cancel, progress=progress)
        for (token,) in self.decode(cache, [params], [tokens.tolist()], cancel=cancel):
            assert token is not None
            yield token

    def decode(
        self,
        cache: Cache,
        sampling: Sequence[SamplingParams],
        prompts: Sequence[Sequence[int]],
        *,
        constraints: Sequence[Constraint | None] = (),
        cancel: Event | None = None,
        priority: int = 0,
    ) -> Iterator[list[int | None]]:
        """Go on from what the cache has read: yields one list of new ids a step, None for rows that have ended.

        A row ends with the end token, which is not yielded, with `max_tokens`, or where its constraint allows no more.
        All but the last token are in the cache then; of a row that a constraint ended, and of a stream that is closed
        early, several may be missing. Tokens that a constraint forces are yielded one by one.

        Args:
            sampling: one for each row.
            prompts: the ids that a repetition penalty counts as said, and drafts are found in, for each row.
            constraints: what each row may say, fresh ones made with its `max_tokens`; () for no row.
            priority: see `read`. Steps of different priorities share a pass all the same.

        Raises:
            InputError: the cache has read nothing, or the rows do not match. Cancelled: `cancel` was set.
        """
        limits = list(constraints) or [None] * len(sampling)
        if cache.logits is None or not len(sampling) == len(limits) == cache.rows:
            raise InputError("decode goes on from a cache that has read something, with one SamplingParams a row.")
        _check_room(cache)
        sequences = [
            DecodeSequence(Sampler(params, prompt, self.device), params, limit, self.stop_ids, prompt)
            for params, prompt, limit in zip(sampling, prompts, limits, strict=True)
        ]
        static = self._static_scheduler if is_capturable(cache) else None
        decoding = (static or self._scheduler).join(cache, sequences, priority)
        yield from decode_loop.decode(decoding, sequences, cancel)


def _padded_chunks(rows: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield chunks of rows of ids, padded to one length, and which ids are none of the padding; None: all."""
    for parts in itertools.zip_longest(*(row.split(size) for row in rows), fillvalue=rows[0][:0]):
        longest = max(len(part) for part in parts)
        valid = torch.tensor([[at < len(part) for at in range(longest)] for part in parts])
        padded = torch.stack([torch.nn.functional.pad(part, (0, longest - len(part))) for part in parts])
        yield padded, None if valid.all() else valid


def _chunk_logprobs(runner: ModelRunner, cache: Cache, chunk: Tensor) -> Tensor:
    """Read ids [n]: float32 [n], the log-probability of each."""
    before = cache.logits
    logits = runner.run(cache, chunk[None], all_logits=True)[0]
    rows = torch.cat([logits[:1] if before is None else before, logits[:-1]])
    targets = zip(rows.split(LOGPROB_ROWS), chunk.split(LOGPROB_ROWS), strict=True)
    picked = [part.float().log_softmax(-1).gather(-1, target[:, None])[:, 0] for part, target in targets]
    if before is None:
        picked[0][0] = 0.0
    return torch.cat(picked)


def _checked_ids(vocab_size: int, ids: Ids) -> Tensor:
    """Return token ids as a checked CPU tensor int64 [T]."""
    tokens = torch.as_tensor(ids, dtype=torch.long).cpu()
    if tokens.dim() != 1 or not len(tokens):
        raise InputError("Give at least one token id, as a flat list or a tensor of shape [T].")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InputError(f"Token ids must lie between 0 and {vocab_size - 1}: is this another model's tokenizer?")
    return tokens


def _running(backend: AttentionBackend) -> Callable[[int], AbstractContextManager[None]]:
    """Return what jobs run within.

    It does not keep the backend alive: the device thread, which ends last, would free the model's memory, and that
    aborts the process where the interpreter ends meanwhile.
    """
    reference = weakref.ref(backend)

    def running(threads: int) -> AbstractContextManager[None]:
        known = reference()
        return nullcontext() if known is None else known.running(threads)

    return running


def _device_thread(backend: AttentionBackend, scheduling: SchedulingConfig, chunk: int) -> DeviceThread:
    """Make the thread that runs all passes."""
    return DeviceThread(scheduling.reading_share, _running(backend), backend.release_threads, max_tokens=chunk)


def _static_scheduler(
    runner: ModelRunner,
    device: DeviceThread,
    layers: ModelLayers,
    vocab_size: int,
    scheduling: SchedulingConfig,
) -> StaticScheduler | None:
    """Return what decodes in fixed memory, where the backend does. To be batch invariant, all steps have one shape."""
    sizes = runner.backend.static_sizes
    if sizes is None:
        return None
    sizes, max_tokens = (sizes[-1:], 1) if scheduling.batch_invariant else (sizes, STEP_TOKENS)
    return StaticScheduler(partial(make_decoder, runner, layers, vocab_size), device, sizes, max_tokens)


def _stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return the model's end tokens."""
    settings = model.generation_config
    end = settings.eos_token_id if settings is not None and settings.eos_token_id is not None else None
    for config in (model.config.get_text_config(), model.config):
        end = getattr(config, "eos_token_id", None) if end is None else end
    return frozenset([end] if isinstance(end, int) else end or [])


def _check_one_row(cache: Cache) -> None:
    if cache.rows != 1:
        raise InputError(f"This cache holds {cache.rows} rows: use read_batch and decode, or cache.row(i).")
    _check_room(cache)


def _check_rows(cache: Cache, prompts: int) -> None:
    if prompts != cache.rows:
        raise InputError(f"{prompts} prompts for a cache of {cache.rows} rows: give one prompt a row.")
    _check_room(cache)


def _check_room(cache: Cache) -> None:
    if cache.is_trimmed:
        raise InputError("This cache is kept by a session, without free slots: read into cache.clone().")
