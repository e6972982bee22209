"""Keep RoPE positions within the window that a model was trained on, however long the text gets.

Tokens have their text positions until the window nears its end. Then a row is *remapped*: the newest tokens keep their
distances and move down together, the beginning of the text stays where it is, and what lies between is squeezed towards
it, in order. Rows are remapped between passes and one at a time; the exact cache never is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from zsmerge_llm.attention.interface import measure_rotations
from zsmerge_llm.attention.positions import ends_at_window
from zsmerge_llm.errors import ContextLimitError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.rope import Rotation
from zsmerge_llm.kvcache.slots import LayerSpec


@dataclass(frozen=True)
class RemapLayout:
    """How remapping divides the window (values: docs/research/sessions).

    limit: share of the window that positions may take. head, near, middle: shares of the limit for the text's
    beginning, which never moves, for the newest tokens, whose distances stay exact, and at least for what lies between.
    squeeze: the factor by which the middle shrinks. segments: linear parts it may consist of; older ones become one.
    """

    limit: float = 0.6
    head: float = 0.0625
    near: float = 0.25
    middle: float = 0.125
    squeeze: float = 0.5
    segments: int = 16


class PositionRemapper:
    """Keeps the positions of all caches of one model within its window.

    Args:
        specs: of the model's layers. window: positions that it was trained on; None: not known, nothing is remapped.
    """

    def __init__(
        self, model: PreTrainedModel, specs: Sequence[LayerSpec], window: int | None, layout: RemapLayout | None = None
    ) -> None:
        self.window = window
        self.layout = layout or RemapLayout()
        self._model = model
        self._sliding = max((spec.window for spec in specs if spec.window), default=0)
        self._rotations: list[Rotation | None] | None = None
        self._ends_at_window = ends_at_window(model)

    @property
    def limit(self) -> int:
        """Positions are below this wherever something was merged or dropped."""
        return int((self.window or 0) * self.layout.limit)

    def max_pass_tokens(self, cache: Cache, new: int, num_probe: int) -> int:
        """Return how many of `new` tokens one pass may read, with `num_probe` tokens of a probe behind them.

        After a remapping the window holds, below the limit: the head, a middle of at least its share, and the newest
        tokens. What is left of the limit is for new tokens and the probe:

            limit = head + middle + near + new + probe

        With a long probe nothing may be left. That is no error while the pass still ends below the limit, for then
        nothing has to be remapped.

        Raises:
            ContextLimitError: a remapping is due, and a long probe or many sinks leave it no room.
        """
        if self.window is None or cache.slots is None:
            room = (self.window or 0) - max(self._end(cache, row, 0) for row in range(cache.rows))
            return room if room > 0 and self._exceeds(cache, [new] * cache.rows) else new
        room = self.limit - self._near(cache) - self._head(cache) - self._tokens(self.layout.middle) - num_probe
        if room > 0:
            return room
        if max(self._end(cache, row, new + num_probe) for row in range(cache.rows)) <= self.limit:
            return new
        raise ContextLimitError(
            f"A probe of {num_probe} tokens and {cache.config.sink} sinks leave no room to read in the {self.window} "
            "positions that the model was trained on: use a shorter probe or fewer sinks."
        )

    def ensure_positions(self, cache: Cache, num_new_tokens: Sequence[int], num_probe: int) -> None:
        """Remap, before a pass, every row whose last token would be beyond the limit.

        Runs the model the first time. While nothing of a row has been evicted, it has the whole window.

        Args:
            num_new_tokens: that each row will read, at most `max_pass_tokens`. num_probe: tokens behind them.

        Raises:
            ContextLimitError: the window ends, and the model's positions cannot be remapped. Nothing has changed then.
        """
        if self._exceeds(cache, num_new_tokens):
            raise ContextLimitError(
                f"{type(self._model).__name__} has {self._ends_at_window}: with an exact cache it reads no further "
                f"than {self.window} positions. Shorten the conversation or begin a new one."
            )
        due = self._rows_due(cache, num_new_tokens, num_probe)
        rotations = self._known_rotations() if due else None
        if rotations is None:
            if any(self._end(cache, row, num_new_tokens[row] + num_probe) > (self.window or 0) for row in due):
                raise ContextLimitError(self._refusal())
            return
        for row in due:
            self._remap(cache, row, num_new_tokens[row] + num_probe, rotations)

    def is_due(self, cache: Cache, num_new_tokens: Sequence[int], num_probe: int) -> bool:
        """Return whether `ensure_positions` would remap a row, or raise."""
        return self._exceeds(cache, num_new_tokens) or bool(self._rows_due(cache, num_new_tokens, num_probe))

    def _exceeds(self, cache: Cache, num_new_tokens: Sequence[int]) -> bool:
        """Return whether an exact cache would have positions that its model has not."""
        if self.window is None or self._ends_at_window is None or cache.exact_capacity is not None:
            return False
        return any(new and self._end(cache, row, new) > self.window for row, new in enumerate(num_new_tokens))

    def _rows_due(self, cache: Cache, num_new_tokens: Sequence[int], num_probe: int) -> list[int]:
        """Return the rows whose last token would be beyond the limit: the window, while nothing has been evicted."""
        if self.window is None or cache.exact_capacity is None:
            return []
        due = []
        for row, (old, new) in enumerate(zip(cache.lengths, num_new_tokens, strict=True)):
            limit = self.window if old + new <= cache.exact_capacity else self.limit
            if new and self._end(cache, row, new + num_probe) > limit:
                due.append(row)
        return due

    def _remap(self, cache: Cache, row: int, ahead: int, rotations: list[Rotation]) -> None:
        """Give one row new positions, so that `ahead` more tokens end below the limit."""
        near, head, old = self._near(cache), self._head(cache), cache.position_maps[row]
        start = cache.lengths[row] - near
        squeezed = head + (float(old.rope_positions(torch.tensor(start))) - head) * self.layout.squeeze
        to = max(head + 1, int(min(squeezed, self.limit - near - ahead)))
        cache.remap(row, old.squeezed(head, start, to, self.layout.segments), rotations)

    def _end(self, cache: Cache, row: int, ahead: int) -> int:
        """Return the position behind the last of `ahead` more tokens."""
        return cache.lengths[row] + ahead - cache.position_maps[row].offset

    def _tokens(self, share: float) -> int:
        return int(self.limit * share)

    def _head(self, cache: Cache) -> int:
        """Return how many first tokens never move: their share, or all sinks."""
        return max(cache.config.sink, self._tokens(self.layout.head))

    def _near(self, cache: Cache) -> int:
        """Return how many newest tokens keep exact distances: their share, or more where something needs more.

        At most half of the limit: a recent or sliding window beyond that is squeezed like the rest.
        """
        config = cache.config
        wanted = max(config.recent, config.observation_window, self._sliding, self._tokens(self.layout.near))
        return min(wanted, self.limit // 2)

    def _known_rotations(self) -> list[Rotation] | None:
        """Return how each layer rotates its keys; None if that is not known of all layers."""
        if self._rotations is None:
            last = self.limit - 1
            self._rotations = measure_rotations(self._model, sorted({1, min(7, last), last // 3, last}))
        known = [rotation for rotation in self._rotations if rotation is not None]
        return known if len(known) == len(self._rotations) else None

    def _refusal(self) -> str:
        config = self._model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        nested = [given for given in parameters.values() if isinstance(given, dict)] or [parameters]
        kinds = sorted({str(given["rope_type"]) for given in nested if given and "rope_type" in given})
        what = f"rotary positions of type {', '.join(kinds)}" if kinds else "no rotary positions"
        return (
            f"{type(self._model).__name__} has {what}, which cannot be remapped: it reads no further than the "
            f"{self.window} positions that it was trained on. Shorten the conversation or begin a new one, or use a "
            "model with plain, linear, llama3 or YaRN rotary positions."
        )
