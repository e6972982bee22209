"""Train a model's gates (`kvcache.gate`) on its own attention: which tokens of a text do questions about it attend to?

Each text is read into a full cache, and then asked some questions with their answers. The target of a token is the most
attention that any of their tokens pays it, in any query head of the group, as a logarithm. The weights are those of a
ridge regression, which needs one pass over the texts and keeps sums alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from zsmerge_llm.attention.interface import measure_rotations
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import InputError
from zsmerge_llm.kvcache.gate import Gate, features, num_features
from zsmerge_llm.kvcache.rope import Rotation
from zsmerge_llm.kvcache.slots import LayerSpec

SINKS, NEWEST = 4, 16
"""First and last tokens of a text, which are attended to whatever is asked."""
SMALLEST_ATTENTION = 1e-5
"""Is added to an attention before its logarithm is taken."""
RIDGE = 1e-3
"""Regularization, in units of the variance of a feature."""
TOKENS_PER_FEATURE = 20
"""The least tokens that weights are worth being trained on, for each feature."""


@dataclass(frozen=True)
class GateText:
    """A text to train on: its ids, and those of questions about it with their answers."""

    ids: list[int]
    questions: list[list[int]]


class RidgeSums:
    """The sums of a ridge regression for each of H heads, in float64: of features [H, F], a target [H], a constant."""

    def __init__(self, heads: int, num_features: int) -> None:
        self._sums = torch.zeros(heads, num_features + 2, num_features + 2, dtype=torch.float64)

    def add(self, inputs: Tensor, target: Tensor) -> None:
        """Add n samples: inputs [H, n, F], target [H, n]."""
        rows = torch.cat([inputs, target[..., None], torch.ones_like(target)[..., None]], dim=-1).double().cpu()
        self._sums += rows.mT @ rows

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return weights [H, F] and biases [H], float32."""
        count = self._sums[:, -1:, -1:]
        mean = self._sums[:, :-1, -1] / count[..., 0]
        covariance = self._sums[:, :-1, :-1] / count - mean[..., None] * mean[:, None]
        # A feature that does not vary gets no weight.
        deviation = covariance[:, :-1, :-1].diagonal(dim1=1, dim2=2).clamp(min=1e-12).sqrt()
        scaled = covariance[:, :-1, :-1] / deviation[..., None] / deviation[:, None]
        system = scaled + RIDGE * torch.eye(scaled.shape[-1], dtype=torch.float64)
        weight = torch.linalg.solve(system, covariance[:, :-1, -1] / deviation) / deviation
        bias = mean[:, -1] - (weight * mean[:, :-1]).sum(-1)
        return weight.float(), bias.float()


@torch.inference_mode()
def train_gates(
    engine: Engine, texts: Iterable[GateText], progress: Callable[[int], object] = lambda done: None
) -> list[Gate | None]:
    """Return a gate for each attention layer, None for those with a sliding window.

    progress: is called with how many texts have been read.

    Raises:
        InputError: the texts have too few tokens, or no questions.
    """
    pairs = rotated_pairs(engine)
    sums = [_sums(spec, own) for spec, own in zip(engine.specs, pairs, strict=True)]
    tokens = 0
    for number, text in enumerate(texts, start=1):
        if text.questions and len(text.ids) > SINKS + NEWEST:
            _add(engine, text, pairs, sums)
            tokens += len(text.ids) - SINKS - NEWEST
        progress(number)
    sizes = [num_features(spec.value_dim, own.shape[1]) for spec, own in zip(engine.specs, pairs, strict=True)]
    if tokens < (needed := TOKENS_PER_FEATURE * max(sizes, default=0)):
        raise InputError(f"A gate needs {needed:,} tokens of texts to train on, not {tokens:,}: give more text.")
    return [
        None if own is None else Gate(*(part.to(spec.device) for part in (*own.solve(), dimensions)))
        for own, spec, dimensions in zip(sums, engine.specs, pairs, strict=True)
    ]


def rotated_pairs(engine: Engine) -> list[Tensor]:
    """Return for each attention layer which dimensions of a key are rotated together: int64 [2, P]."""
    last = 1000 if engine.context_window is None else engine.context_window - 1
    rotations = measure_rotations(engine.model, sorted({1, min(7, last), last // 3}))
    none = Rotation(torch.empty(0))
    return [
        torch.stack((rotation or none).pairs(torch.arange(spec.key_dim)))
        for spec, rotation in zip(engine.specs, rotations, strict=True)
    ]


def _sums(spec: LayerSpec, pairs: Tensor) -> RidgeSums | None:
    return None if spec.window is not None else RidgeSums(spec.kv_heads, num_features(spec.value_dim, pairs.shape[1]))


def _add(engine: Engine, text: GateText, pairs: Sequence[Tensor], sums: Sequence[RidgeSums | None]) -> None:
    """Read a text, ask its questions, and add its tokens to the sums of each layer."""
    cache = engine.new_cache(CacheConfig.full())
    engine.read(cache, text.ids)
    asked = (engine.query_attention(cache, question) for question in text.questions)
    targets = iter(reduce(lambda most, more: list(map(torch.maximum, most, more)), asked))
    chosen = slice(SINKS, len(text.ids) - NEWEST)
    for layer, own, dimensions in zip(cache.layers, sums, pairs, strict=True):
        if own is not None:
            inputs = features(layer.keys[0, :, chosen], layer.values[0, :, chosen], dimensions.to(layer.keys.device))
            own.add(inputs, next(targets)[:, chosen].add(SMALLEST_ATTENTION).log())
