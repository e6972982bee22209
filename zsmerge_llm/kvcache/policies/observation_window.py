"""The default policy: keep what the question attends to, what a chat has attended to so far, and the newest tokens.

A window of queries scores the slots (SnapKV, arXiv 2404.14469): those of the prompt's question, run behind each chunk
as a probe, or else the newest ones. All layers vote for passages before any of them evicts. Once a conversation goes
on, a share of the slots is ranked by the attention of all its turns, summed up (H2O, arXiv 2306.14048).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zsmerge_llm.config import OBSERVATION_WINDOW, QUERY_AGNOSTIC_FLOOR, CacheConfig
from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.policies.base import EvictionPolicy, RankingContext
from zsmerge_llm.kvcache.scoring import TensorScoring
from zsmerge_llm.kvcache.slots import AttentionInputs, ScoringOps


class ObservationWindow(EvictionPolicy):
    """Rank slots by the attention of a window of queries; see `CacheConfig` for its settings."""

    name = OBSERVATION_WINDOW
    records_queries = True
    uses_probe = True
    votes = True
    observes_every_pass = False
    capturable = True

    def observe(self, view: KVView, inputs: AttentionInputs) -> None:
        """Record the pass's queries, add the attention of a long pass to the history, and note that a chat goes on."""
        layer = view.layer
        inputs.ops.push_queries(layer.queries, layer.query_positions, inputs)
        if inputs.multi_turn:
            layer.multi_turn.fill_(True)
        if inputs.queries.shape[2] > view.config.history_min_queries:
            _accumulate(view, inputs.counts > view.config.history_min_queries, inputs.ops)

    def observe_between_turns(self, view: KVView, due: Tensor) -> None:
        """Note that the conversation has been answered, and add its newest queries' attention to the history."""
        view.layer.multi_turn |= due
        _accumulate(view, due, TensorScoring())

    def prepare(self, view: KVView, due: Tensor, inputs: AttentionInputs | None) -> None:
        """Score the slots by the model's gate, by the probe, or by the newest queries where there is neither."""
        if (gate := view.spec.gate) is None:
            _score_slots(view, due, inputs)
        else:
            _keep_best(view, due, gate.attention(view.keys, view.values))

    def vote(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        """Score the slots; return the maximum attention of the probe's queries to each, float32 [B, H, C].

        Sinks get no votes, for they are attended to whatever is asked, nor do recent tokens: the question may be among
        them.
        """
        attention = _score_slots(view, view.layer.due(inputs), inputs)
        newest = inputs.seen[:, None, None] - view.config.recent
        counts = (view.position >= view.config.sink) & (view.position < newest) & (view.multiplicity > 0)
        return attention * counts

    def rank(self, view: KVView, context: RankingContext) -> Tensor:
        """Rank by the question and the votes; in a chat a share of the slots by its history. float32 [B, H, C]."""
        alone = view.config.with_recent(min(context.pinned_recent, view.config.num_recent))
        single = _by_question(view, context, alone, alone.num_context)
        if not alone.history_share:
            return single
        chat = view.config.with_recent(view.config.num_recent)
        attended = equations.value_weighted_score(view.cumulative_attention, view.values, QUERY_AGNOSTIC_FLOOR)
        history = _protected(view, context, chat, attended)
        by_question = _by_question(view, context, chat, chat.num_question)
        both = equations.split_ranking(by_question, history, chat.num_protected + chat.num_question)
        # Until a conversation goes on, its question decides alone.
        return torch.where(context.multi_turn[:, None, None], both, single)


def _accumulate(view: KVView, rows: Tensor, ops: ScoringOps) -> None:
    """Add the attention of those recorded queries that are not part of the sum yet, in some rows, bool [B].

    H2O adds all queries: of every pass that is read the newest ones are enough (docs/research/eviction).
    """
    layer = view.layer
    if not view.config.history_share:
        return
    pending = (layer.query_positions > layer.accumulated_until[:, None]) & rows[:, None]
    positions = layer.query_positions.masked_fill(~pending, -1)
    mean, _ = _attention_mass(view, layer.queries, positions, None, ops)
    view.cumulative_attention.add_(mean * rows[:, None, None])
    newest = layer.query_positions.amax(1)
    layer.accumulated_until.copy_(torch.where(rows, newest, layer.accumulated_until))


def _score_slots(view: KVView, due: Tensor, inputs: AttentionInputs | None) -> Tensor:
    """Score the slots of rows that are due by the probe, or by the newest queries where there is none.

    Returns the maximum attention of any of these queries to each slot, float32 [B, H, C].
    """
    layer, ops, sinks = view.layer, TensorScoring() if inputs is None else inputs.ops, None
    queries, positions = layer.queries, layer.query_positions
    if inputs is not None and inputs.probe_queries is not None and inputs.probe_positions is not None:
        queries, positions, sinks = inputs.probe_queries, inputs.probe_positions, inputs.sinks
    mean, most = _attention_mass(view, queries, positions, sinks, ops)
    _keep_best(view, due, equations.max_pool(mean, view.config.pool_kernel))
    return most


def _keep_best(view: KVView, due: Tensor, now: Tensor) -> None:
    """Update the scores of rows that are due by what the slots score now: each keeps the best that it ever got."""
    best = torch.maximum(view.score * view.config.decay, now)
    view.score.copy_(torch.where(due[:, None, None], best, view.score))


def _attention_mass(
    view: KVView, queries: Tensor, positions: Tensor, sinks: Tensor | None, ops: ScoringOps
) -> tuple[Tensor, Tensor]:
    """Return mean and maximum attention of queries [B, Hq, m, D] at positions [B, m]: float32 [B, H, C]."""
    bias = equations.slot_bias(view.multiplicity, view.config.alpha)
    return ops.attention_mass(queries, positions, view.keys, bias, view.position, view.spec, sinks)


def _by_question(view: KVView, context: RankingContext, config: CacheConfig, num_slots: int) -> Tensor:
    """Rank by the question's attention; where layers have voted, passages take their share of `num_slots` first."""
    score = view.score
    if config.score_floor is not None:
        score = equations.value_weighted_score(view.score, view.values, config.score_floor)
    ranking = _protected(view, context, config, score)
    if context.votes is None:
        return ranking
    votes = context.votes.to(ranking.device)[view.position.clamp(min=0)]
    passages = _protected(view, context, config, votes)
    return equations.split_ranking(passages, ranking, config.num_protected + round(config.passage_share * num_slots))


def _protected(view: KVView, context: RankingContext, config: CacheConfig, score: Tensor) -> Tensor:
    """Rank by a score, with the sinks and recent tokens of `config` protected."""
    return equations.retention_rank(score, view.multiplicity, view.position, context.seen, config.sink, config.recent)
