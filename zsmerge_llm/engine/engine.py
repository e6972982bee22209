"""Token ids in, token ids out: reading of any length in chunks, and the decode loop. Knows no text and no session.

Memory while reading is a function of budget and chunk size, never of length. Threads may share an engine: their
forward passes take turns, first come first served.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Event
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zsmerge_llm.attention.interface import ForwardPass, QueryPass, SpeculativePass, VotingPass, forward, prepare
from zsmerge_llm.config import CacheConfig, SamplingParams
from zsmerge_llm.cpu import native as kernels
from zsmerge_llm.cpu.compiled_layers import CompiledLayers
from zsmerge_llm.engine.fair_lock import FairLock
from zsmerge_llm.engine.position_remapping import PositionRemapper
from zsmerge_llm.engine.sampler import Sampler
from zsmerge_llm.engine.scheduler import DecodeScheduler, ScheduledRow
from zsmerge_llm.engine.sequence import DecodeSequence
from zsmerge_llm.errors import ConfigError, InputError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.grammar import Constraint
from zsmerge_llm.types import Progress

Ids = Sequence[int] | Tensor
FUSE_AFTER = 512
"""Tokens decoded before the layers are compiled of their own accord: that takes about as long."""


@dataclass(frozen=True)
class Probe:
    """Token ids [m] that only look. voting: whether all layers decide together which passages are kept."""

    tokens: Tensor
    voting: bool


class Cancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """The caller's event was set. Everything read or generated before stays in the cache."""


class Engine:
    """A model on the compressed cache.

    Args:
        model: a decoder of transformers; from now on it can only be called through this engine.
        cache: configuration of the caches that `new_cache` makes.
        chunk: tokens read in one forward pass. Peak memory grows with it.
        compile: whether decode steps run through compiled layers (`fusion`): at once, never, or, with "auto", once so
            many tokens have been decoded that it pays.

    Raises:
        UnsupportedModelError: an architecture or feature the cache cannot carry.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: CacheConfig | None = None,
        chunk: int = 512,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        if chunk < 1:
            raise ConfigError(f"chunk must be at least 1 token, not {chunk}.")
        self.model = model.eval()
        self.config = cache or CacheConfig()
        self.chunk = chunk
        self.specs = prepare(model)
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.stop_ids = _stop_ids(model)
        self.remapper = PositionRemapper(model, self.specs, self.window)
        self.fusion = CompiledLayers(model, len(self.specs), after=FUSE_AFTER if compile == "auto" else None)
        self._turn = FairLock()
        self._together = DecodeScheduler(self._forward, self._turn)
        if compile is True:
            self.fusion.start()
            self.read(self.new_cache(), [0])

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    @property
    def max_decode_batch(self) -> int | None:
        """Conversations that one decode step should take at most; None where more are always better."""
        return kernels.MAX_ROWS if self.device.type == "cpu" else None

    @property
    def window(self) -> int | None:
        """The number of positions the model was trained on, where its config says so."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or None

    @property
    def exact_limit(self) -> int | None:
        """Tokens after which answers get worse; None where there is no such number: a compressed cache goes on."""
        return self.window if self.config.slots is None else None

    def new_cache(self, config: CacheConfig | None = None, rows: int = 1) -> Cache:
        """An empty cache for `rows` conversations."""
        return Cache(config or self.config, self.specs, rows)

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
    ) -> Tensor:
        """Read `ids` into a one-row cache; float32 logits [vocab] after the last of them.

        Args:
            probe: tokens that decide, by the attention they would pay if they came next, what is kept whenever the
                cache has to compress ("window" scoring). They are not read into the cache.
            reserving: whether a conversation goes on, so that the reserve (`CacheConfig.reserve`) is kept for what it
                has looked at so far. Not for a text that comes with its question: that decides alone.
            pinned_tail: how many of the last `ids` are held whole while they are read; all are, where they fit into the share
                of the newest tokens (`CacheConfig.latest`).
            cancel: stops after the current chunk.
            progress: called with (tokens read, tokens to read) after each chunk.

        Raises:
            InputError: no ids, ids outside the vocabulary, or a cache of several rows.
            Cancelled: `cancel` was set.
        """
        tokens = self._ids(ids)
        asking = self._probe(cache, probe, multi_turn, len(tokens))
        _one_row(cache)
        done, passing = 0, 0 if len(tokens) <= cache.config.num_recent else len(tokens) - pinned_tail
        for chunk in tokens.split(self.chunk):
            _check(cancel)
            done += len(chunk)
            looking = None if cache.fits(len(chunk)) else asking
            with self._turn:
                held_whole = max(0, done - passing)
                logits = self._forward(
                    cache, chunk[None], probe=looking, pinned_recent=held_whole, multi_turn=multi_turn
                )
            if progress is not None:
                progress(done, len(tokens))
        return logits[0, -1].float()

    @torch.inference_mode()
    def look(self, cache: Cache, ids: Ids) -> list[Tensor]:
        """What tokens that came next in a one-row cache would look at, without reading them.

        Returns:
            For each full-attention layer, in their order, float32 [H, C]: the most that any of them pays each slot.

        Raises:
            InputError: as `read`.
        """
        _one_row(cache)
        tokens = self._ids(ids)
        with self._turn:
            self.remapper.ensure_positions(cache, [0], len(tokens))
            seen = torch.tensor(cache.lengths)
            position = seen[:, None] + torch.arange(len(tokens))
            step = QueryPass(cache, 0, position, None, [0], seen, reads=self.fusion.reads)
            self._run(step, tokens[None], torch.tensor([len(tokens) - 1]))
        return step.most

    @torch.inference_mode()
    def read_batch(self, cache: Cache, rows: Sequence[Ids], *, cancel: Event | None = None) -> Tensor:
        """Read one list of ids into each row of `cache`; float32 logits [B, vocab] after the last of each.

        The rows are padded on the right for the pass; padding is never attended, scored or held.

        Raises:
            InputError: as `read`, or another number of rows than the cache has.
            Cancelled: `cancel` was set.
        """
        tokens = [self._ids(row) for row in rows]
        if len(tokens) != cache.rows:
            raise InputError(f"{len(tokens)} prompts for a cache of {cache.rows} rows: give one prompt a row.")
        empty = tokens[0][:0]
        for parts in itertools.zip_longest(*(row.split(self.chunk) for row in tokens), fillvalue=empty):
            _check(cancel)
            size = max(len(part) for part in parts)
            valid = torch.tensor([[at < len(part) for at in range(size)] for part in parts])
            padded = torch.stack([torch.nn.functional.pad(part, (0, size - len(part))) for part in parts])
            with self._turn:
                self._forward(cache, padded, None if valid.all() else valid)
        assert cache.logits is not None
        return cache.logits.float()

    @torch.inference_mode()
    def logprobs(self, cache: Cache, ids: Ids, *, cancel: Event | None = None) -> Tensor:
        """float32 [T]: log p(ids[t] | everything in the cache, ids[:t]). Reads `ids` into the one-row cache.

        Nothing predicts the first token of an empty cache: its entry is 0. Raises as `read`.
        """
        _one_row(cache)
        tokens, parts = self._ids(ids).to(self.device), []
        for start in range(0, len(tokens), self.chunk):
            _check(cancel)
            chunk = tokens[start : start + self.chunk]
            before = cache.logits
            with self._turn:
                logits = self._forward(cache, chunk[None], keep=0)[0]
            rows = torch.cat([logits[:1] if before is None else before, logits[:-1]])
            picked = [
                part.float()
                .log_softmax(-1)
                .gather(-1, goal[:, None])[:, 0]  # 64 at a time: float32 [n, vocab] is large
                for part, goal in zip(rows.split(64), chunk.split(64), strict=True)
            ]
            if before is None:
                picked[0][0] = 0.0
            parts += picked
        return torch.cat(parts)

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

        Every yielded token but the last is in the cache when the stream ends; stop strings are the caller's business.

        Raises:
            InputError: as `read`. Cancelled: `cancel` was set.
        """
        params, tokens = sampling or SamplingParams(), self._ids(ids)
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
    ) -> Iterator[list[int | None]]:
        """Go on from what the cache has read: yields one list of new ids a step, None for rows that have ended.

        A row ends with the end token, which is not yielded, with `max_tokens`, or where its constraint allows no more.
        All but the last token are in the cache then; of a row that a constraint ended, and of a stream that is closed
        early, several may be missing. Tokens that a constraint forces are yielded one by one and read in one pass, if
        there is one row only; several rows read one token each a pass.

        Args:
            sampling: one for each row.
            prompts: the ids that a repetition penalty counts as said, for each row.
            constraints: what each row may say, pinned_recent ones made with its `max_tokens`; () for no row.

        Raises:
            InputError: the cache has read nothing, or the rows do not match. Cancelled: `cancel` was set.
        """
        limits = list(constraints) or [None] * len(sampling)
        if cache.logits is None or not len(sampling) == len(limits) == cache.rows:
            raise InputError("decode goes on from a cache that has read something, with one SamplingParams a row.")
        rows = [
            DecodeSequence(Sampler(params, prompt, self.device), params, limit, self.stop_ids, prompt)
            for params, prompt, limit in zip(sampling, prompts, limits, strict=True)
        ]
        with self._together.row(cache) if len(rows) == 1 else nullcontext() as alone:
            while True:
                _check(cancel)
                logits = cache.logits.float()
                drawn = torch.stack([row.draw(scores) for row, scores in zip(rows, logits, strict=True)]).tolist()
                chosen = [row.take(token) if row.going else None for row, token in zip(rows, drawn, strict=True)]
                if all(token is None for token in chosen):
                    return
                yield chosen
                ids = [[0 if token is None else token] for token in chosen]
                for token in rows[0].forced() if alone is not None else ():
                    _check(cancel)
                    ids[0].append(token)
                    yield [token]
                if not any(row.going for row in rows):
                    return
                if alone is not None:
                    if guess := self._guess(alone, rows[0], len(ids[0])):
                        for token in self._try(cache, rows[0], ids[0], guess):
                            yield [token]
                        if not rows[0].going:
                            return
                    else:
                        self._together.step(alone, ids[0])
                else:
                    going = torch.tensor([[row.going] for row in rows])
                    with self._turn:
                        self._forward(cache, torch.tensor(ids), None if going.all() else going)

    def _guess(self, row: ScheduledRow, speaker: DecodeSequence, ahead: int) -> list[int]:
        """What may follow, where it costs no other row its turn and everything fits without compressing."""
        guess = speaker.guess() if self._together.alone(row) else []
        if not guess:
            return []
        new = ahead + len(guess)
        fits = all(layer.fits(new) for layer in row.cache.layers) and new <= self.remapper.room(row.cache, new, 0)
        return guess if fits else []

    def _try(self, cache: Cache, speaker: DecodeSequence, ids: list[int], guess: list[int]) -> Iterator[int]:
        """Read `ids` and a guess behind them: of the guess stays, and is yielded, what the row says itself."""
        with self._turn, torch.inference_mode():
            self.remapper.ensure_positions(cache, [len(ids) + len(guess)], 0)
            tokens = torch.tensor([[*ids, *guess]])
            new = tokens.shape[1]
            seen = torch.tensor(cache.lengths)
            draft = SpeculativePass(
                cache, new, seen[:, None] + torch.arange(new), None, [new], seen + new, self.fusion.kernels
            )
            logits = self._run(draft, tokens, torch.arange(new))[0]
            own = torch.stack([speaker.draw(scores) for scores in logits[len(ids) - 1 : -1].float()]).tolist()
        kept = len(ids)
        try:
            for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(guess, own, strict=True)):
                kept += 1
                speaker.take(token)
                yield token
                if not speaker.going:
                    return
        finally:
            with torch.inference_mode():
                draft.keep(kept)
                cache.lengths = draft.seen.tolist()
                cache.logits = logits[kept - 1 : kept].clone()

    @torch.inference_mode()
    def _forward(
        self,
        cache: Cache,
        ids: Tensor,
        valid: Tensor | None = None,
        *,
        probe: Probe | None = None,
        keep: int | None = None,
        pinned_recent: int = 0,
        multi_turn: bool = False,
    ) -> Tensor:
        """One forward pass of ids [B, n] (and a probe behind them): logits [B, 1, vocab] after each row's last token.

        keep=0 gives them after all tokens instead: [B, n, vocab]. `cache.logits` is brought up to date.
        """
        batch, new = ids.shape
        ahead = 0 if probe is None else len(probe.tokens)
        room = self.remapper.room(cache, new, ahead)
        if new > room:
            return self._in_parts(
                cache, ids, valid, room, probe=probe, keep=keep, pinned_recent=pinned_recent, multi_turn=multi_turn
            )
        lengths = torch.tensor(cache.lengths)
        counts = torch.full((batch,), new) if valid is None else valid.sum(-1)
        self.remapper.ensure_positions(cache, counts.tolist(), ahead)
        if probe is not None:
            ids = torch.cat([ids, probe.tokens[None].to(ids.device)], dim=1)
        position = lengths[:, None] + torch.arange(ids.shape[1])
        if valid is not None:
            position = torch.minimum(position, (lengths + counts - 1).clamp(min=0)[:, None])
        ends = (counts - 1).clamp(min=0)
        wanted = ends.unique() if keep is None else torch.arange(new)  # transformers keeps the same places of all rows
        kind = VotingPass if probe is not None and probe.voting else ForwardPass
        seen, (few, many) = lengths + counts, (self.fusion.kernels, self.fusion.reads)
        step = kind(cache, new, position, valid, counts.tolist(), seen, few, many, pinned_recent, multi_turn)
        logits = self._run(step, ids, wanted)
        step.finish()
        cache.lengths = step.seen.tolist()
        last = logits[torch.arange(batch), torch.searchsorted(wanted, ends)]
        if cache.logits is not None:
            last = torch.where((counts > 0).to(last.device)[:, None], last, cache.logits)
        cache.logits = last
        return last[:, None] if keep is None else logits

    def _run(self, step: ForwardPass, ids: Tensor, wanted: Tensor) -> Tensor:
        """The model over ids [B, T]: logits [B, K, vocab] behind the K tokens at `wanted`."""
        self.fusion.count(ids.numel())
        offset = torch.tensor([places.offset for places in step.cache.position_maps])
        return forward(
            self.model,
            step,
            input_ids=ids.to(self.device),
            position_ids=(step.position - offset[:, None]).to(self.device),
            logits_to_keep=wanted.to(self.device),
        )

    def _in_parts(self, cache: Cache, ids: Tensor, valid: Tensor | None, size: int, **how: Any) -> Tensor:
        """`_forward` in passes of at most `size` tokens, where the model's window is small."""
        masks = [None] * -(-ids.shape[1] // size) if valid is None else valid.split(size, dim=1)
        logits = [
            self._forward(cache, part, mask, **how) for part, mask in zip(ids.split(size, dim=1), masks, strict=True)
        ]
        return torch.cat(logits, dim=1) if how["keep"] == 0 else logits[-1]

    def _probe(self, cache: Cache, asked: Ids | None, multi_turn: bool, new: int) -> Probe | None:
        """What looks ahead when `cache` compresses to take in `new` tokens, as far as its rule heeds it."""
        config = cache.config
        if config.slots is None or config.policy != "observation_window" or asked is None or not len(asked):
            return None
        # In a chat whole passages for a short turn's question would cost what earlier turns said (benchmarks/LOG.md).
        voting = config.passage_share > 0 and (not multi_turn or new > config.slots)
        return Probe(self._ids(asked), voting)

    def _ids(self, ids: Ids) -> Tensor:
        """Token ids as a checked CPU tensor int64 [T]."""
        tokens = torch.as_tensor(ids, dtype=torch.long).cpu()
        if tokens.dim() != 1 or not len(tokens):
            raise InputError("Give at least one token id, as a flat list or a tensor of shape [T].")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise InputError(
                f"Token ids must lie between 0 and {self.vocab_size - 1}: is this another model's tokenizer?"
            )
        return tokens


def _stop_ids(model: PreTrainedModel) -> frozenset[int]:
    """The model's end tokens."""
    settings = model.generation_config
    end = settings.eos_token_id if settings is not None and settings.eos_token_id is not None else None
    end = model.config.get_text_config().eos_token_id if end is None else end
    return frozenset([end] if isinstance(end, int) else end or [])


def _one_row(cache: Cache) -> None:
    if cache.rows != 1:
        raise InputError(f"This cache holds {cache.rows} rows: use read_batch and decode, or cache.row(i).")


def _check(cancel: Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled
