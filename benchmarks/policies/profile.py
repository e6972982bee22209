"""How many slots each layer deserves: more where the model looks things up, found by letting it recite a text.

A few layers of a model do most of the copying from far away (retrieval heads), and there the generic ranking of tokens
is least sure who will be needed. The other layers get by on a tenth. Needs no question and one short pass a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from quality_ask import Asking
from torch import Tensor

from zsmerge_llm import policy
from zsmerge_llm.attention import Call, forward
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine import Engine

STEPS = 20
"""Budgets are shared out in twentieths of the text."""
AHEAD = 6


@dataclass
class Reciting(Asking):
    """Keeps the queries of each layer: [Hq, T, D]."""

    queries: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, call: Call) -> Tensor:
        self.queries[call.layer] = call.query[0]
        return super().attend(call)


@torch.inference_mode()
def recall_curves(engine: Engine, text: list[int], probe: list[int], recite: list[int]) -> Tensor:
    """float32 [layers, STEPS + 1]: attention (squared, so that sharp attention counts) that reciting pays to the share
    of the text that the probe ranks highest; all layers together make 1 at the last column.

    recite: ids that ask for the text, followed by a part of it.
    """
    cache = engine.new_cache(CacheConfig.full())
    engine.chunk = len(text)
    engine.read(cache, text)
    block = torch.tensor([0] * len(probe) + [1] * len(recite))
    order = torch.cat([torch.arange(len(probe)), torch.arange(len(recite))])
    own = torch.zeros(len(block), len(block))
    own.masked_fill_((block[:, None] != block) | (order[:, None] < order), policy.NEVER)
    position = (len(text) + order)[None]
    carrier = Reciting(cache, position, own)
    forward(engine.model, carrier, input_ids=torch.tensor([probe + recite]), position_ids=position, logits_to_keep=1)
    rows = []
    for index, layer in enumerate(cache.layers):
        paid = _paid(carrier.queries[index], layer.keys[0, :, : len(text)])
        ranking = paid[:, :, : len(probe)].amax((1, 2))  # [H, T]
        ranking[:, :4] = float("inf")
        paid[..., :4] = 0
        mass = paid[:, :, len(probe) :].square().sum((1, 2))
        grown = mass.gather(1, ranking.argsort(-1, descending=True)).cumsum(-1).sum(0)
        at = (torch.arange(1, STEPS + 1) * len(text) / STEPS).round().long() - 1
        rows.append(torch.cat([torch.zeros(1), grown[at]]))
    curves = torch.stack(rows)
    return curves / curves[:, -1].sum()


def share_out(curves: Tensor, total: float = 0.25, least: int = 2, power: float = 0.5) -> list[float]:
    """Weights of the layers with mean 1: greedily, each twentieth goes where it saves the most attention.

    power: 0 would take all layers for equally important, 1 counts each by the attention it pays.
    """
    layers = len(curves)
    gain = curves * curves[:, -1:] ** (power - 1)
    taken = [least] * layers
    for _ in range(round(total * layers * STEPS) - sum(taken)):
        offers = [
            ((gain[layer, taken[layer] + more] - gain[layer, taken[layer]]).item() / more, layer)
            for layer in range(layers)
            for more in range(1, min(AHEAD, STEPS - taken[layer]) + 1)
        ]
        taken[max(offers)[1]] += 1
    mean = sum(taken) / layers
    return [each / mean for each in taken]


def weighted(weights: Sequence[float]) -> Callable[[int, int], list[int]]:
    """Slots of each layer from the mean, by `weights`; the total stays."""

    def budgets(slots: int, layers: int) -> list[int]:
        ends = [round(slots * sum(weights[: layer + 1])) for layer in range(layers)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    return budgets


def _paid(queries: Tensor, keys: Tensor) -> Tensor:
    """float32 [H, G, n, T] of queries [Hq, n, D] and keys [H, T, D]."""
    heads, tokens, dim = keys.shape
    grouped = queries.float().view(heads, -1, queries.shape[1], dim)
    return policy.weights(grouped[None], keys.float()[None], torch.zeros(tokens), dim**-0.5)[0]
