"""Reading for ever with a model that knows only so many positions: when tokens get new places, and which.

Tokens stand at their positions until the window nears its end. Then comes an *epoch*: the newest tokens keep their
distances and move down together, the beginning of the text stays where it is, and what lies between is squeezed towards
it, in order. Epochs happen between passes and to one row at a time. The exact cache has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from zsmerge_llm.attention.interface import rotations
from zsmerge_llm.errors import ContextLimitError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.rope import Rotation
from zsmerge_llm.kvcache.view import LayerSpec


@dataclass(frozen=True)
class RemapLayout:
    """How an epoch divides the window.

    limit: share of the window that places may take. head, near, middle: shares of the limit for the text's beginning,
    which never moves, for the newest tokens, whose distances stay exact, and at least for what lies between.
    squeeze: what becomes of the middle. segments: linear parts that it may consist of; older ones become one.
    """

    limit: float = 0.9
    head: float = 0.0625
    near: float = 0.25
    middle: float = 0.125
    squeeze: float = 0.5
    segments: int = 16


class PositionRemapper:
    """Keeps the places of all caches of one model within its window.

    Args:
        specs: of the model's layers. window: positions that it was trained on; None: not known, nothing ever moves.
    """

    def __init__(
        self, model: PreTrainedModel, specs: Sequence[LayerSpec], window: int | None, shape: RemapLayout | None = None
    ) -> None:
        self.window = window
        self.shape = shape or RemapLayout()
        self._model = model
        self._sliding = max((spec.window for spec in specs if spec.window), default=0)
        self._rotations: list[Rotation | None] | None = None

    @property
    def limit(self) -> int:
        """Places are below this wherever something was merged or dropped."""
        return int((self.window or 0) * self.shape.limit)

    def room(self, cache: Cache, new: int, ahead: int) -> int:
        """How many of `new` tokens one pass may read, with `ahead` tokens of a probe behind them.

        Raises:
            ContextLimitError: an epoch is near and a long probe, or many sinks, leave it no room.
        """
        if self.window is None or cache.slots is None:
            return new
        room = self.limit - self._near(cache) - self._head(cache) - self._share(self.shape.middle) - ahead
        if room > 0:
            return room
        if max(self._end(cache, row, new + ahead) for row in range(cache.rows)) <= self.limit:
            return new
        raise ContextLimitError(
            f"A probe of {ahead} tokens and {cache.config.sink} sinks leave no room to read in the {self.window} "
            "positions that the model was trained on: use a shorter probe or fewer sinks."
        )

    def ensure_positions(self, cache: Cache, coming: Sequence[int], ahead: int) -> None:
        """Before a pass: an epoch for every row whose last token would stand beyond the limit.

        Runs the model the first time. While nothing of a row is lost, it has the whole window.

        Args:
            coming: tokens that each row will read, at most `room`; ahead: tokens of the probe behind them.

        Raises:
            ContextLimitError: the window ends, and the model's positions cannot be mapped. Nothing has changed then.
        """
        if self.window is None or cache.exact_capacity is None:
            return
        ends = [self._end(cache, row, new + ahead) if new else 0 for row, new in enumerate(coming)]
        kept = [length + new <= cache.exact_capacity for length, new in zip(cache.lengths, coming, strict=True)]
        due = [row for row, end in enumerate(ends) if end > (self.window if kept[row] else self.limit)]
        known = self._known() if due else None
        if known is None:
            if max(ends) > self.window:
                raise ContextLimitError(self._refusal())
            return
        for row in due:
            self._remap(cache, row, coming[row] + ahead, known)

    def _remap(self, cache: Cache, row: int, reach: int, known: list[Rotation]) -> None:
        """New places for one row, so that `reach` more tokens stand below the limit."""
        near, head, old = self._near(cache), self._head(cache), cache.position_maps[row]
        start = cache.lengths[row] - near
        squeezed = head + (float(old.of(torch.tensor(start))) - head) * self.shape.squeeze
        to = max(head + 1, int(min(squeezed, self.limit - near - reach)))
        cache.move(row, old.squeezed(head, start, to, self.shape.segments), known)

    def _end(self, cache: Cache, row: int, reach: int) -> int:
        """The place behind the last of `reach` more tokens."""
        return cache.lengths[row] + reach - cache.position_maps[row].offset

    def _share(self, share: float) -> int:
        return int(self.limit * share)

    def _head(self, cache: Cache) -> int:
        return max(cache.config.sink, self._share(self.shape.head))

    def _near(self, cache: Cache) -> int:
        """Newest tokens whose distances stay exact: a quarter of the window, or more where something asks for more.

        At most half of it: a recent or sliding window beyond that is squeezed like the rest.
        """
        wanted = max(cache.config.recent, cache.config.observation_window, self._sliding, self._share(self.shape.near))
        return min(wanted, self.limit // 2)

    def _known(self) -> list[Rotation] | None:
        """How each layer's keys carry their place; None if that is not known of all layers."""
        if self._rotations is None:
            last = self.limit - 1
            self._rotations = rotations(self._model, sorted({1, min(7, last), last // 3, last}))
        known = [rotation for rotation in self._rotations if rotation is not None]
        return known if len(known) == len(self._rotations) else None

    def _refusal(self) -> str:
        config = self._model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        nested = [given for given in parameters.values() if isinstance(given, dict)] or [parameters]
        kinds = sorted({str(given["rope_type"]) for given in nested if given and "rope_type" in given})
        what = f"rotary positions of type {', '.join(kinds)}" if kinds else "no rotary positions"
        return (
            f"{type(self._model).__name__} has {what}, which cannot be mapped anew: it reads no further than the "
            f"{self.window} positions that it was trained on. Shorten the conversation or begin a new one, or use a "
            "model with plain, linear, llama3 or YaRN rotary positions."
        )
