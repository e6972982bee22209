"""How many slots each layer deserves: more where the model looks things up, found by letting it recite a text.

A few layers of a model do most of the copying from far away (retrieval heads), and there a guess at who will be needed
is least sure. The others get by on less. It takes no question and one short text, once for each model's weights.
"""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from zsmerge_llm.attention import interface as attention
from zsmerge_llm.config import CacheConfig, apportion
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ConfigError
from zsmerge_llm.kvcache import policy
from zsmerge_llm.kvcache.layer_cache import LayerCache
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.models.atomic_write import write_atomically
from zsmerge_llm.models.hub import StatusCallback, cache_folder
from zsmerge_llm.retrieval.query_probe import GENERIC_QUESTION, chat_probe

PASSAGE = 768
"""Tokens of the text that is read; from an eighth of it on, a third is recited."""
STEPS = 20
"""Budgets are shared out in twentieths of the text."""
AHEAD = 6
"""Twentieths looked ahead for, so that a gain behind a flat beginning is seen."""
TOTALS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
"""Shares of a text that a mean layer holds, rising: budgets are averaged over them, for one alone hangs on rounding."""
SINKS = 4
"""First tokens, which every layer keeps and which attention goes to whatever is asked."""
FORMAT = 2
KNOWN = 0.25
"""How much of the profile goes into the budget of a prompt that comes with its question."""


class LayerBudgets:
    """The shares of a model's full-attention layers, found when they are first needed.

    Args:
        path: where they are kept for the next process; None keeps them for this one only.
        say: is told when the model is about to recite.
    """

    def __init__(
        self, engine: Engine, template: ChatTemplate, path: Path | None = None, say: StatusCallback | None = None
    ) -> None:
        self._engine = engine
        self._template = template
        self._path = path
        self._say = say or (lambda step: None)
        self._lock = Lock()
        self._shares: tuple[float, ...] | None = None

    @property
    def layer_budgets(self) -> tuple[float, ...]:
        """A weight for each full-attention layer, mean 1: for `CacheConfig.layer_budgets`. Empty if there is no such layer."""
        with self._lock:
            if self._shares is None:
                layers = sum(spec.window is None for spec in self._engine.specs)
                self._shares = _load(self._path, layers) or self._found(layers)
            return self._shares

    def config(self, tokens: int, guide: int = 0) -> CacheConfig:
        """The budget of a conversation whose first prompt has so many tokens, of which `guide` say what it is about.

        Less uneven than a document's: where the question is known the guess is better, and a small model whose other
        layers have little left talks in circles. No layer gets less than one passage needs, as far as there is so much.
        """
        config = self._engine.config.with_pinned_prefix(guide)
        shares = self._shares_for(config, tokens)
        if config.slots is None or not shares:
            return config
        milder = [1 + KNOWN * (share - 1) for share in shares]
        least = min(config.sink + config.recent + attention.PASSAGE, config.slots)
        sizes = apportion(config.slots * len(milder), milder, least)
        return config.replace(layer_budgets=tuple(size / config.slots for size in sizes))

    def document_config(self, tokens: int) -> CacheConfig:
        """The budget of a document of so many tokens whose questions are not known yet."""
        config = self._engine.config.query_agnostic()
        shares = self._shares_for(config, tokens)
        return config.replace(layer_budgets=shares) if shares else config

    def _shares_for(self, config: CacheConfig, tokens: int) -> tuple[float, ...]:
        """Of a text that does not fit, some layers need more. Empty for one that does, or by the user's choice."""
        guessed = config.policy == "observation_window" and config.layer_budgets is None
        return self.layer_budgets if guessed and config.slots is not None and tokens > config.slots else ()

    def _found(self, layers: int) -> tuple[float, ...]:
        window = self._engine.window
        if not layers or (window is not None and window < 2 * PASSAGE):  # no room to read and recite
            return (1.0,) * layers
        self._say("Finding out which layers look things up (once for each model)")
        shares = tuple(allocate(measure_retrieval(self._engine, self._template)))
        if self._path is not None:
            _save(self._path, shares)
        return shares


def profile_path(weights: str) -> Path:
    """Where the profile of a model with this digest of its weights is kept on this machine."""
    return cache_folder() / "profiles" / f"{weights}.json"


@torch.inference_mode()
def measure_retrieval(engine: Engine, template: ChatTemplate) -> Tensor:
    """`curves` of a passage of the demo's text, of which the model recites a part behind it."""
    data = files("zsmerge_llm").joinpath("data")
    text = template.encode(data.joinpath("marigold.txt").read_text(encoding="utf-8"))[:PASSAGE]
    start, asking = len(text) // 8, template.encode("\n\nRepeat the text above.") + chat_probe(template, "")
    recital = asking + text[start : start + len(text) // 3]
    generic = chat_probe(template, GENERIC_QUESTION)
    most = max(len(recital), len(generic))
    cache = engine.new_cache(CacheConfig(slots=len(text) + most + 128, observation_window=most))  # nothing is lost
    engine.read(cache, text)
    asked = cache.clone()
    engine.read(asked, generic)
    engine.read(cache, recital)
    return torch.stack(
        [
            curve(_paid(guessing, len(text), len(generic)), _paid(reciting, len(text), len(recital)))
            for guessing, reciting in zip(asked.layers, cache.layers, strict=True)
            if reciting.spec.window is None
        ]
    )


def curve(guessed: Tensor, needed: Tensor) -> Tensor:
    """float32 [STEPS + 1]: what a layer finds in the share of a text that a guess ranks highest, from none to all.

    Counted is the attention needed, squared, so that sharp attention counts.

    Args:
        guessed, needed: float32 [H, G, n, T], attention of the queries that rank the tokens, and of those that look.
    """
    ranking = guessed.amax((1, 2))  # [H, T]
    ranking[:, :SINKS] = float("inf")
    mass = needed.square().sum((1, 2))
    mass[:, :SINKS] = 0
    grown = mass.gather(1, ranking.argsort(-1, descending=True)).cumsum(-1).sum(0)
    at = (torch.arange(1, STEPS + 1) * len(grown) / STEPS).round().long() - 1
    return torch.cat([torch.zeros(1), grown.cpu()[at]])


def allocate(curves: Tensor, least: int = 2, power: float = 0.5) -> list[float]:
    """Weights of the layers with mean 1: greedily, each twentieth goes where it saves the most attention.

    The mean of the weights that this gives at each of `TOTALS`.

    Args:
        curves: [layers, STEPS + 1], from `curve`. Where they hold no finite attention, all layers get the same.
        least: twentieths that every layer gets.
        power: 0 would take all layers for equally important, 1 counts each by the attention it pays.
    """
    layers = len(curves)
    if not bool(curves.isfinite().all()) or not bool((curves[:, -1] > 0).all()):
        return [1.0] * layers
    gain = (curves * curves[:, -1:] ** (power - 1)).tolist()
    taken, found = [least] * layers, []
    for total in TOTALS:
        for _ in range(round(total * layers * STEPS) - sum(taken)):
            taken[best_marginal_gain(gain, taken)] += 1
        mean = sum(taken) / layers
        found.append([each / mean for each in taken])
    return [sum(weights) / len(found) for weights in zip(*found, strict=True)]


def best_marginal_gain(gain: list[list[float]], taken: list[int]) -> int:
    """The layer to which the next twentieth is worth the most, looking up to `AHEAD`."""
    offers = [
        ((gain[layer][taken[layer] + more] - gain[layer][taken[layer]]) / more, layer)
        for layer in range(len(gain))
        for more in range(1, min(AHEAD, STEPS - taken[layer]) + 1)
    ]
    return max(offers)[1]


def _paid(layer: LayerCache, tokens: int, queries: int) -> Tensor:
    """float32 [H, G, n, T]: what the layer's newest queries pay to the first tokens it holds, among these alone."""
    keys, asking = layer.keys[0, :, :tokens].float(), layer.queries[0, :, -queries:].float()
    grouped = asking.view(len(keys), -1, queries, keys.shape[-1])
    scaling = keys.shape[-1] ** -0.5 if layer.spec.scaling is None else layer.spec.scaling
    nothing = torch.zeros(tokens, device=keys.device)
    return policy.weights(grouped[None], keys[None], nothing, scaling, layer.spec.softcap)[0]


def _load(path: Path | None, layers: int) -> tuple[float, ...] | None:
    """What an earlier process found; None if there is nothing that can be used."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        shares = CacheConfig(layer_budgets=kept["shares"]).layer_budgets if kept["format"] == FORMAT else None
    except (OSError, ValueError, LookupError, TypeError, ConfigError):
        return None
    return shares if shares is not None and len(shares) == layers else None


def _save(path: Path, shares: tuple[float, ...]) -> None:
    """Keep them, atomically; where that is not possible, the next process finds them again."""
    with suppress(OSError):
        write_atomically(path, json.dumps({"format": FORMAT, "shares": shares}).encode(), durable=False)
