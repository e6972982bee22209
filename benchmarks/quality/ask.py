"""Ask many questions of one cache in one forward pass, without changing it, and score the gold answers.

Each question sees the cache and itself, never another question: its tokens take the positions behind what was read. The
scores are those of reading question and answer into a clone of the cache, where nothing is compressed meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zsmerge_llm.attention.call import AttentionCall, AttentionHandler, dense_attention
from zsmerge_llm.attention.interface import forward
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.cache import Cache

MAX_TOKENS = 512
"""Tokens of questions and answers asked in one pass."""


@dataclass(frozen=True)
class Score:
    """nll: mean negative log-likelihood per token of the gold answer. exact: whether greedy decoding gives it.

    score, f1: how right an answer is (`answers.answer`), None where none was given. generated: its text.
    """

    nll: float
    exact: bool
    tokens: int
    score: float | None = None
    f1: float | None = None
    generated: str | None = None


@dataclass
class QuestionPass(AttentionHandler):
    """Questions as blocks of one row.

    position: [1, T]. own: [T, T], 0 within a block up to the token itself, else -inf.
    """

    cache: Cache
    position: Tensor
    own: Tensor

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend to the layer's slots and to the own block."""
        layer = self.cache.layers[call.layer]
        view, new = layer.view(), call.query.shape[2]
        keys = torch.cat([view.keys, call.key], dim=2)
        values = torch.cat([view.values, call.value], dim=2)
        held = equations.slot_bias(view.multiplicity, layer.config.alpha)[:, :, None, :].expand(-1, -1, new, -1)
        bias = torch.cat([held, self.own[None, None].expand(1, held.shape[1], -1, -1)], dim=-1)
        if layer.spec.window is not None:
            position = torch.cat([view.position[:, 0], self.position], dim=1)
            bias = bias + equations.window_bias(self.position, position, layer.spec.window)[:, None]
        group = call.query.shape[1] // call.key.shape[1]
        return dense_attention(call, keys, values, bias.to(call.query.dtype).repeat_interleave(group, dim=1))


@torch.inference_mode()
def ask(engine: Engine, cache: Cache, asked: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
    """Score (question ids, gold answer ids) pairs against a one-row cache.

    The cache stays as it is, but for its RoPE positions where the trained window is about to end.
    """
    engine.runner.remapper.ensure_positions(cache, [max((len(q) + len(a) for q, a in asked), default=0)], 0)
    scores: list[Score] = []
    batch: list[tuple[list[int], list[int]]] = []
    for pair in asked:
        if batch and sum(len(q) + len(a) for q, a in [*batch, pair]) > MAX_TOKENS:
            scores += _ask_in_one_pass(engine, cache, batch)
            batch = []
        batch.append(pair)
    return scores + _ask_in_one_pass(engine, cache, batch) if batch else scores


def _ask_in_one_pass(engine: Engine, cache: Cache, asked: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
    ids = [token for question, answer in asked for token in (*question, *answer)]
    lengths = [len(question) + len(answer) for question, answer in asked]
    block = torch.repeat_interleave(torch.arange(len(asked)), torch.tensor(lengths))
    order = torch.cat([torch.arange(length) for length in lengths])
    sees = (block[:, None] == block) & (order[:, None] >= order)
    own = torch.zeros(len(ids), len(ids)).masked_fill(~sees, equations.NEVER)
    predicting: list[int] = []
    gold: list[int] = []
    start = 0
    for question, answer in asked:
        first = start + len(question) - 1  # the token before the answer predicts its first one
        predicting += range(first, first + len(answer))
        gold += answer
        start += len(question) + len(answer)
    position = (cache.lengths[0] + order)[None]
    rope_position = position - cache.position_maps[0].offset  # beyond the trained window it differs from the text's
    logits = forward(
        engine.model,
        QuestionPass(cache, position.to(engine.device), own.to(engine.device)),
        input_ids=torch.tensor([ids], device=engine.device),
        position_ids=rope_position.to(engine.device),
        logits_to_keep=torch.tensor(predicting, device=engine.device),
    )[0].float()
    targets = torch.tensor(gold, device=logits.device)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    hits = logits.argmax(-1) == targets
    sizes = [len(answer) for _, answer in asked]
    parts = zip(losses.split(sizes), hits.split(sizes), sizes, strict=True)
    return [Score(loss.mean().item(), bool(hit.all()), size) for loss, hit, size in parts]
