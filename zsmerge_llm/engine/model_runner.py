"""Run one forward pass of the model over a cache: positions, padding, logits, and passes that the window makes smaller.

Passes run one after another, in the engine's device thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zsmerge_llm.attention.backend import AttentionBackend
from zsmerge_llm.attention.interface import forward
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.attention.offloading import input_device
from zsmerge_llm.attention.passes import ForwardPass, QueryPass, SpeculativePass, VotingPass
from zsmerge_llm.engine.position_remapping import PositionRemapper
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.errors import InputError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.models.lora import AdapterState

STEP_TOKENS = 1 + MAX_DRAFT_TOKENS
"""Tokens of a decode step with a draft."""


@dataclass(frozen=True)
class Probe:
    """The tokens of a question, ids [m], that decide what is kept. voting: whether all layers vote for passages."""

    tokens: Tensor
    voting: bool


class ModelRunner:
    """Runs a model over caches.

    Args:
        backend: computes attention.
        remapper: keeps positions within the model's window.

    Attributes:
        closed: whether the model was given back. Passes raise InputError from then on.
    """

    def __init__(self, model: PreTrainedModel, backend: AttentionBackend, remapper: PositionRemapper) -> None:
        self.model = model
        self.backend = backend
        self.remapper = remapper
        self.closed = False
        self._adapters = AdapterState(model)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return input_device(self.model)

    @torch.inference_mode()
    def run(
        self,
        cache: Cache,
        ids: Tensor,
        valid: Tensor | None = None,
        *,
        probe: Probe | None = None,
        all_logits: bool = False,
        pinned_recent: int = 0,
        multi_turn: bool = False,
    ) -> Tensor:
        """Read ids [B, n] into the cache: logits [B, 1, vocab] after each row's last token. Sets `cache.logits`.

        Args:
            valid: bool [B, n], False for padding on the right; None: no padding.
            probe: tokens behind the others, that only attend. all_logits: return those after every token, [B, n,
            vocab].
            pinned_recent, multi_turn: see `AttentionInputs`.
        """
        self.check_usable()
        batch, new = ids.shape
        num_probe = 0 if probe is None else len(probe.tokens)
        limit = self.remapper.max_pass_tokens(cache, new, num_probe)
        if new > limit:
            how = {"probe": probe, "all_logits": all_logits, "pinned_recent": pinned_recent, "multi_turn": multi_turn}
            return self._run_in_parts(cache, ids, valid, limit, **how)
        lengths = torch.tensor(cache.lengths)
        counts = torch.full((batch,), new) if valid is None else valid.sum(-1)
        self.remapper.ensure_positions(cache, counts.tolist(), num_probe)
        if probe is not None:
            ids = torch.cat([ids, probe.tokens[None].to(ids.device)], dim=1)
        positions = lengths[:, None] + torch.arange(ids.shape[1])
        if valid is not None:  # padding repeats the last position: it must not reach beyond the window
            positions = torch.minimum(positions, (lengths + counts - 1).clamp(min=0)[:, None])
        ends = (counts - 1).clamp(min=0)
        # transformers keeps the logits of the same tokens in all rows: those after any row's last token.
        wanted = torch.arange(new) if all_logits else ends.unique()
        kind = VotingPass if probe is not None and probe.voting else ForwardPass
        layout = PassLayout(new, positions, valid, counts.tolist(), lengths + counts)
        step = kind(cache, layout, self.backend, pinned_recent, multi_turn)
        logits = self._forward(step, ids, wanted)
        step.finish()
        cache.lengths = layout.seen.tolist()
        last = logits[torch.arange(batch), torch.searchsorted(wanted, ends)]
        if cache.logits is not None:  # a row without new tokens keeps its logits
            last = torch.where((counts > 0).to(last.device)[:, None], last, cache.logits)
        cache.logits = last
        return logits if all_logits else last[:, None]

    @torch.inference_mode()
    def query_attention(self, cache: Cache, ids: Tensor) -> list[Tensor]:
        """Run ids [m] behind a one-row cache without reading them: each full layer's attention, float32 [H, C]."""
        self.check_usable()
        self.remapper.ensure_positions(cache, [0], len(ids))
        seen = torch.tensor(cache.lengths)
        layout = PassLayout(0, seen[:, None] + torch.arange(len(ids)), None, [0], seen)
        step = QueryPass(cache, layout, self.backend)
        self._forward(step, ids[None], torch.tensor([len(ids) - 1]))
        return step.attention

    @torch.inference_mode()
    def token_embeddings(self, ids: Tensor) -> Tensor:
        """Return the input embeddings of ids [n]: float32 [n, D] in host memory."""
        self.check_usable()
        rows: Tensor = self.model.get_input_embeddings()(ids.to(self.device))
        return rows.float().cpu()

    @torch.inference_mode()
    def speculate(self, cache: Cache, ids: Sequence[int]) -> tuple[SpeculativePass, Tensor]:
        """Run ids behind a one-row cache without taking them in: the pass, and logits [n, vocab] after each of them.

        Fewer than `STEP_TOKENS` are padded: passes of one shape are compiled, and round alike.
        """
        self.check_usable()
        count = len(ids)
        ids = [*ids, *[ids[-1]] * (STEP_TOKENS - count)]
        self.remapper.ensure_positions(cache, [len(ids)], 0)
        seen = torch.tensor(cache.lengths)
        layout = PassLayout(len(ids), seen[:, None] + torch.arange(len(ids)), None, [len(ids)], seen + len(ids))
        step = SpeculativePass(cache, layout, self.backend)
        return step, self._forward(step, torch.tensor([ids]), torch.arange(count))[0]

    def max_draft(self, cache: Cache, num_pending: int) -> int:
        """Return how many tokens of a draft may be verified behind so many others: as many as a step takes, or none."""
        return STEP_TOKENS - num_pending if num_pending < STEP_TOKENS and self._fits_step(cache) else 0

    def read_step(self, cache: Cache, ids: Sequence[int]) -> None:
        """Read the tokens of a decode step into a one-row cache: as if one by one, but for rounding at most.

        Where the backend is `batch_invariant` there is no difference.
        """
        while ids:
            size = min(len(ids), STEP_TOKENS) if len(ids) > 1 and self._fits_step(cache) else 1
            if size > 1:
                self.keep(cache, *self.speculate(cache, ids[:size]), size)
            else:
                self.run(cache, torch.tensor([ids[:1]]))
            ids = ids[size:]

    def _fits_step(self, cache: Cache) -> bool:
        """Return whether a one-row cache takes a whole step without compressing any layer."""
        return cache.fits_all(STEP_TOKENS) and self.remapper.max_pass_tokens(cache, STEP_TOKENS, 0) >= STEP_TOKENS

    @torch.inference_mode()
    def keep(self, cache: Cache, step: SpeculativePass, logits: Tensor, count: int) -> None:
        """Take in the first `count` tokens of a speculative pass, whose logits are [n, vocab]."""
        step.keep(count)
        cache.lengths = step.layout.seen.tolist()
        cache.logits = logits[count - 1 : count].clone()

    def check_usable(self) -> None:
        """Raise InputError if the model was given back, or has other adapters than it had."""
        if self.closed:
            raise InputError("This engine is closed, and its model was given back: make another LLM or engine.")
        self._adapters.check()

    def _forward(self, step: ForwardPass, ids: Tensor, wanted: Tensor) -> Tensor:
        """Run the model over ids [B, T]: logits [B, K, vocab] after the K tokens at `wanted`."""
        self.backend.on_pass(ids.numel())
        offset = torch.tensor([positions.offset for positions in step.cache.position_maps])
        return forward(
            self.model,
            step,
            input_ids=ids.to(self.device),
            position_ids=(step.layout.positions - offset[:, None]).to(self.device),
            logits_to_keep=wanted.to(self.device),
        )

    def _run_in_parts(self, cache: Cache, ids: Tensor, valid: Tensor | None, size: int, **how: Any) -> Tensor:
        """`run` in passes of at most `size` tokens, where the model's window is small."""
        masks = [None] * -(-ids.shape[1] // size) if valid is None else valid.split(size, dim=1)
        logits = [self.run(cache, part, mask, **how) for part, mask in zip(ids.split(size, dim=1), masks, strict=True)]
        return torch.cat(logits, dim=1) if how["all_logits"] else logits[-1]
