"""Logits to the next token of one sequence.

Filters are transformers' own, in the order of `generate`: repetition penalty, temperature, top_k, top_p, min_p.
Nothing here waits for the device: logits that hold NaN or +inf, or only -inf (usually float16 overflow), give -1 in
place of a token, and `accept(-1)` raises. Pass every token to `accept` before it goes to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsmerge_llm.config import SamplingParams
from zsmerge_llm.errors import ZSMergeError


class Sampler:
    """Sample the tokens of one sequence; greedy at temperature 0, reproducible where `params.seed` is set.

    Args:
        params: temperature, filters, repetition penalty and seed.
        prompt_ids: ids that the repetition penalty counts as seen; not read where there is no penalty.
        device: where the logits are.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int], device: torch.device | str) -> None:
        self.penalty = params.repetition_penalty
        self.greedy = params.temperature == 0
        self._seen_ids = list(prompt_ids) if self.penalty != 1 else []
        self._seen: Tensor | None = None  # bool[vocab]: its cost does not depend on the number of tokens so far
        self._filters: list[Any] = [] if self.greedy else _filters(params)
        self._generator = torch.Generator(device=device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next token, int64 [], for logits float32 [vocab], on their device; -1 if they are not finite."""
        peak = logits.max()  # NaN wherever one logit is NaN
        scores = logits if self.penalty == 1 else self._penalized(logits)
        token = scores.argmax() if self.greedy else self._sample(scores)
        return torch.where(peak.isfinite(), token, -1)

    def accept(self, token: int) -> None:
        """Record the token that was chosen, for the repetition penalty.

        Raises:
            ZSMergeError: `token` is -1: the logits it was sampled from were not finite.
        """
        if token < 0:
            raise ZSMergeError(
                "The model's logits are not finite (NaN or infinity), so there is no next token. Its numbers overflow: "
                "load it with dtype='float32' or 'bfloat16', and without quantization if that does not help."
            )
        if self.penalty == 1:
            return
        if self._seen is None:
            self._seen_ids.append(token)
        else:
            self._seen[token] = True

    def _penalized(self, logits: Tensor) -> Tensor:
        """Apply transformers' RepetitionPenaltyLogitsProcessor in O(vocab) instead of O(tokens so far)."""
        if self._seen is None:
            self._seen = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
            known = torch.tensor(self._seen_ids, dtype=torch.long)
            self._seen[known[known < logits.shape[0]].to(logits.device)] = True
        lowered = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
        return torch.where(self._seen, lowered, logits)

    def _sample(self, scores: Tensor) -> Tensor:
        """Sample from softmax(scores) by the Gumbel-max trick.

        With e ~ Exp(1), -log e has the Gumbel distribution, so argmax(scores - log e) is distributed as
        softmax(scores). `torch.multinomial` would check its input on the host, which waits for the device.
        """
        row = (scores - scores.max())[None]  # no filter depends on the shift; a tiny temperature cannot overflow now
        for apply in self._filters:
            row = apply(None, row)
        noise = torch.empty_like(row).exponential_(generator=self._generator)
        return (row - noise.clamp_min_(torch.finfo(row.dtype).tiny).log_())[0].argmax()


def _filters(params: SamplingParams) -> list[Any]:
    """Return the transformers filters that `params` turns on; each maps (ids, float32 [1, vocab]) to the latter."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    wanted = [
        (TemperatureLogitsWarper, float(params.temperature), params.temperature != 1),
        (TopKLogitsWarper, params.top_k, params.top_k > 0),
        (TopPLogitsWarper, float(params.top_p), params.top_p < 1),
        (MinPLogitsWarper, float(params.min_p), params.min_p > 0),
    ]
    return [kind(value) for kind, value, on in wanted if on]
