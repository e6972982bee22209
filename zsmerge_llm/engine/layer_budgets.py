"""Measure how many slots each layer deserves: more where the model retrieves, found by letting it repeat a text.

A few layers of a model do most of the copying from far away (retrieval heads, arXiv 2404.15574), and there a guess at
which tokens will be needed is least sure. The others get by on less. It takes one short text and no question, once for
each model's weights (docs/research/layer-budgets).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from zsmerge_llm.attention.passes import PASSAGE_TOKENS
from zsmerge_llm.config import CacheConfig, apportion
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.layer_cache import LayerCache
from zsmerge_llm.models.atomic_write import write_atomically
from zsmerge_llm.models.hub import StatusCallback
from zsmerge_llm.paths import cache_folder, check_folder, private_folder

TEXT_TOKENS = 768
"""Tokens of the calibration text; from an eighth of it on, a third is repeated."""
STEPS = 20
"""Budgets are allocated in twentieths of the text."""
LOOKAHEAD = 6
"""Twentieths looked ahead for, so that a gain behind a flat beginning is seen."""
TOTALS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
"""Shares of a text that a mean layer holds, rising: budgets are averaged over them, for one alone hangs on rounding."""
MIN_STEPS = 2
"""Twentieths that every layer gets."""
MASS_EXPONENT = 0.5
"""0 would take all layers for equally important, 1 counts each by the attention it spends on the text."""
SINKS = 4
"""First tokens, which every layer keeps and attends to whatever is asked."""
FORMAT = 2
PROMPT_STRENGTH = 0.25
"""How much of the measured unevenness goes into the budget of a prompt that comes with its question."""


@dataclass(frozen=True)
class Calibration:
    """The ids that `measure_retrieval` runs: a text, a request to repeat it, and a probe without a question."""

    text: list[int]
    repeat_request: list[int]
    generic_probe: list[int]


class LayerBudgets:
    """The budgets of a model's full-attention layers, measured when they are first needed.

    Args:
        calibration: makes the ids to measure with; called only then.
        path: where they are kept for the next process; None keeps them for this one only.
        report_status: is called with a line of text before the model runs.
    """

    def __init__(
        self,
        engine: Engine,
        calibration: Callable[[], Calibration],
        path: Path | None = None,
        report_status: StatusCallback | None = None,
    ) -> None:
        self._engine = engine
        self._calibration = calibration
        self._path = path
        self._report_status = report_status or (lambda step: None)
        self._lock = Lock()
        self._weights: tuple[float, ...] | None = None

    @property
    def weights(self) -> tuple[float, ...]:
        """A weight for each full-attention layer, mean 1 (`CacheConfig.layer_budgets`). Empty without such layers."""
        with self._lock:
            if self._weights is None:
                layers = sum(spec.window is None for spec in self._engine.specs)
                self._weights = _load(self._path, layers) or self._measure(layers)
            return self._weights

    def prompt_config(self, num_tokens: int, num_prefix: int = 0) -> CacheConfig:
        """Return the configuration of a conversation whose first prompt has so many tokens.

        Less uneven than a document's: where the question is known the guess is better, and a small model whose other
        layers have little left repeats itself. No layer gets less than one passage needs, as far as there is so much.

        num_prefix: how many first tokens are the system prompt and the tools, which are pinned.
        """
        config = self._engine.config.with_pinned_prefix(num_prefix)
        weights = self._weights_for(config, num_tokens)
        if config.slots is None or not weights:
            return config
        milder = [1 + PROMPT_STRENGTH * (weight - 1) for weight in weights]
        least = min(config.num_protected + PASSAGE_TOKENS, config.slots)
        sizes = apportion(config.slots * len(milder), milder, least)
        return config.replace(layer_budgets=tuple(size / config.slots for size in sizes))

    def document_config(self, num_tokens: int) -> CacheConfig:
        """Return the configuration of a document of so many tokens whose questions are not known yet."""
        config = self._engine.config.query_agnostic()
        weights = self._weights_for(config, num_tokens)
        return config.replace(layer_budgets=weights) if weights else config

    def _weights_for(self, config: CacheConfig, num_tokens: int) -> tuple[float, ...]:
        """Return the weights for a text that does not fit; empty for one that does, or by the user's choice."""
        if not config.uses_question or config.layer_budgets is not None:
            return ()
        return self.weights if config.slots is not None and num_tokens > config.slots else ()

    def _measure(self, layers: int) -> tuple[float, ...]:
        window = self._engine.context_window
        if not layers or (window is not None and window < 2 * TEXT_TOKENS):  # no room for the text and its repetition
            return (1.0,) * layers
        self._report_status("Measuring which layers retrieve (once for each model)")
        weights = tuple(allocate(measure_retrieval(self._engine, self._calibration())))
        if self._path is not None:
            _save(self._path, weights)
        return weights


def budgets_path(weights_digest: str) -> Path:
    """Return where the budgets of a model with this digest of its weights are kept on this machine."""
    return cache_folder() / "profiles" / f"{weights_digest}.json"


@torch.inference_mode()
def measure_retrieval(engine: Engine, calibration: Calibration) -> Tensor:
    """Return `curve` of each full-attention layer for a text that the model repeats a part of: [layers, STEPS + 1]."""
    text, generic = calibration.text[:TEXT_TOKENS], calibration.generic_probe
    start = len(text) // 8
    repetition = calibration.repeat_request + text[start : start + len(text) // 3]
    window = max(len(repetition), len(generic))
    # Slots for everything: nothing is evicted, and every query of the repetition is recorded.
    cache = engine.new_cache(CacheConfig(slots=len(text) + window + 128, observation_window=window))
    engine.read(cache, text)
    probed = cache.clone()
    engine.read(probed, generic)
    engine.read(cache, repetition)
    return torch.stack(
        [
            curve(_attention(guess, len(text), len(generic)), _attention(need, len(text), len(repetition)))
            for guess, need in zip(probed.layers, cache.layers, strict=True)
            if need.spec.window is None
        ]
    )


def curve(guessed: Tensor, needed: Tensor) -> Tensor:
    """Return the needed attention that a layer finds in the best-ranked share of a text, from none of it to all.

    Attention is squared before it is summed, so that sharp attention counts.

    Args:
        guessed, needed: float32 [H, G, n, T], attention of the queries that rank the tokens, and of those that need
            them.

    Returns:
        float32 [STEPS + 1].
    """
    ranking = guessed.amax((1, 2))  # [H, T]
    ranking[:, :SINKS] = float("inf")
    mass = needed.square().sum((1, 2))
    mass[:, :SINKS] = 0
    grown = mass.gather(1, ranking.argsort(-1, descending=True)).cumsum(-1).sum(0)
    at = (torch.arange(1, STEPS + 1) * len(grown) / STEPS).round().long() - 1
    return torch.cat([torch.zeros(1), grown.cpu()[at]])


def allocate(curves: Tensor) -> list[float]:
    """Allocate slots to layers greedily: each twentieth goes where it finds the most attention per twentieth.

    Args:
        curves: [layers, STEPS + 1], from `curve`. Where they hold no finite attention, all layers get the same.

    Returns:
        Weights of the layers with mean 1: the mean of the weights that this gives at each of `TOTALS`.
    """
    layers = len(curves)
    if not bool(curves.isfinite().all()) or not bool((curves[:, -1] > 0).all()):
        return [1.0] * layers
    gain = (curves * curves[:, -1:] ** (MASS_EXPONENT - 1)).tolist()
    taken, found = [MIN_STEPS] * layers, []
    for total in TOTALS:
        for _ in range(round(total * layers * STEPS) - sum(taken)):
            taken[best_marginal_gain(gain, taken)] += 1
        mean = sum(taken) / layers
        found.append([each / mean for each in taken])
    return [sum(weights) / len(found) for weights in zip(*found, strict=True)]


def best_marginal_gain(gain: list[list[float]], taken: list[int]) -> int:
    """Return the layer to which the next twentieth is worth the most, looking up to `LOOKAHEAD`."""
    offers = [
        ((gain[layer][taken[layer] + more] - gain[layer][taken[layer]]) / more, layer)
        for layer in range(len(gain))
        for more in range(1, min(LOOKAHEAD, STEPS - taken[layer]) + 1)
    ]
    return max(offers)[1]


def _attention(layer: LayerCache, tokens: int, queries: int) -> Tensor:
    """Return the attention of a layer's newest queries to its first tokens, among these alone: float32 [H, G, n, T]."""
    keys, newest = layer.keys[:1, :, :tokens].float(), layer.newest_queries(0, queries)[None].float()
    no_bias = torch.zeros(tokens, device=keys.device)
    return equations.grouped_weights(newest, keys, no_bias, layer.spec.scale, layer.spec.softcap, None)[0]


def _load(path: Path | None, layers: int) -> tuple[float, ...] | None:
    """Return what an earlier process measured; None if there is nothing that can be used."""
    try:
        if path is not None:
            check_folder(path.parent)
        kept = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        weights = CacheConfig(layer_budgets=kept["shares"]).layer_budgets if kept["format"] == FORMAT else None
    except (OSError, ValueError, LookupError, TypeError, ConfigError):
        return None
    return weights if weights is not None and len(weights) == layers else None


def _save(path: Path, weights: tuple[float, ...]) -> None:
    """Keep the weights, atomically; where that is not possible, the next process measures again."""
    with suppress(OSError, ConfigError):
        private_folder(path.parent)
        write_atomically(path, json.dumps({"format": FORMAT, "shares": weights}).encode(), durable=False)
