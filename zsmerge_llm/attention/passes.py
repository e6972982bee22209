"""Forward passes over a cache: the object that travels through the model to every attention layer.

A pass appends its tokens to each layer, attends, observes and compresses. Its kinds differ in when a layer takes the
tokens in: at once (`ForwardPass`), once all layers have voted (`VotingPass`), never (`QueryPass`), or as far as a draft
was right (`SpeculativePass`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from zsmerge_llm.attention.backend import AttentionBackend, AttentionOps
from zsmerge_llm.attention.call import AttentionCall, AttentionHandler, RecurrentCall
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.attention.recurrent import MixerCache
from zsmerge_llm.kvcache import equations, eviction
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.layer_cache import KVView, LayerCache
from zsmerge_llm.kvcache.policies import policy_of
from zsmerge_llm.kvcache.slots import AttentionInputs

PASSAGE_TOKENS = 129
"""Tokens around a voted one that are kept with it (docs/research/eviction)."""


@dataclass
class ForwardPass(AttentionHandler):
    """One forward pass over `cache`: the tokens that enter it and, behind them, a probe's, which only attend.

    pinned_recent, multi_turn: see `AttentionInputs`.
    """

    cache: Cache
    layout: PassLayout
    backend: AttentionBackend
    pinned_recent: int = 0
    multi_turn: bool = False

    def attend(self, call: AttentionCall) -> Tensor:
        """Append, attend, observe, compress: [B, Hq, T, D]."""
        layer = self.cache.layers[call.layer]
        ops = self.backend.ops(layer, call, self.layout)
        inputs = self._inputs(call, ops)
        view, output = ops.attend(layer, call, inputs, self.layout)
        self._update(view, inputs)
        return output

    def mix(self, call: RecurrentCall) -> Tensor:
        """Take the new tokens into a recurrent layer's state: [B, T, D]. Padding and a probe leave no trace in it."""
        state, new = self.cache.states[call.index], self.layout.num_new
        counts, total = self.layout.num_new_tokens, call.hidden.shape[1]
        if total == new and counts == [new] * len(counts):
            return call.run(call.hidden, MixerCache(state))
        output = torch.zeros_like(call.hidden)
        for count in sorted(set(counts) - {0}):
            rows = [row for row, each in enumerate(counts) if each == count]
            part = state.select_rows(rows)
            output[rows, :count] = call.run(call.hidden[rows, :count], MixerCache(part))
            state.put_rows(rows, part)
        if total > new:
            output[:, new:] = call.run(call.hidden[:, new:], MixerCache(state.clone()))
        return output

    def after_attention(self, call: AttentionCall) -> None:
        """Do what `attend` does behind attention, where the tokens stand in their slots already (a packaged step)."""
        layer = self.cache.layers[call.layer]
        view = layer.view(max(layer.num_filled) + self.layout.num_new)
        self._update(view, self._inputs(call, self.backend.ops(layer, call, self.layout)))

    def _update(self, view: KVView, inputs: AttentionInputs) -> None:
        eviction.update(view, inputs)

    def finish(self) -> None:
        """Do what is left once all layers have run. Here, nothing."""

    def _inputs(self, call: AttentionCall, ops: AttentionOps) -> AttentionInputs:
        new, marks = self.layout.num_new, self.layout.on(call.key.device)
        queries, keys, values = call.query, call.key, call.value
        probe_queries = probe_positions = None
        if queries.shape[2] > new:
            probe_queries, probe_positions = queries[:, :, new:], marks["probe_positions"]
            queries, keys, values = (each[:, :, :new] for each in (queries, keys, values))
        return AttentionInputs(
            queries=queries,
            keys=keys,
            values=values,
            positions=marks["new_positions"],
            valid=marks["valid"],
            query_positions=marks["query_positions"],
            counts=marks["counts"],
            num_new_tokens=self.layout.num_new_tokens,
            seen=marks["seen"],
            ops=ops,
            probe_queries=probe_queries,
            probe_positions=probe_positions,
            sinks=call.sinks,
            pinned_recent=self.pinned_recent,
            multi_turn=self.multi_turn,
        )


@dataclass
class _Ballot:
    """A layer that waits for the votes of the others: its tokens, and its scores as they were updated."""

    layer: LayerCache
    inputs: AttentionInputs
    score: Tensor
    cumulative_attention: Tensor


@dataclass
class VotingPass(ForwardPass):
    """A pass of one row with a question behind it: no layer compresses before all have voted for passages.

    A layer alone knows what it attends to itself, and few layers find an answer; what they find is then kept by all,
    with the tokens around it. Until then the pass holds its tokens' keys and values for all layers.

    votes: float32 [seen], for each token the attention of the layers' heads. A layer counts by the square of its slots:
    its budget follows how much of what is needed it finds (docs/research/layer-budgets), and the square measured best
    (docs/research/eviction). num_votes: its length, where that must not depend on the text's.
    """

    num_votes: int | None = None
    votes: Tensor = field(init=False)
    waiting: list[_Ballot] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = int(self.layout.seen[0]) if self.num_votes is None else self.num_votes
        self.votes = torch.zeros(size, device=self.cache.layers[0].spec.device)

    def _update(self, view: KVView, inputs: AttentionInputs) -> None:
        config = view.config
        if config.slots is None or not policy_of(config).votes or not any(view.layer.rows_due(inputs)):
            eviction.update(view, inputs)
            return
        eviction.observe(view, inputs)
        vote = policy_of(config).vote(view, inputs) * config.slots**2
        token = view.position.clamp(min=0).flatten().to(self.votes.device)
        self.votes.index_add_(0, token, vote.flatten().to(self.votes.device))
        ballot = _Ballot(view.layer, inputs.without_queries(), view.score, view.cumulative_attention)
        self.waiting.append(ballot)

    def finish(self) -> None:
        """Compress every layer by the votes of all."""
        length = None if self.num_votes is None else self.layout.seen[0]
        votes = equations.smooth_votes(self.votes, PASSAGE_TOKENS, length)
        for ballot in self.waiting:
            # Appended again: copies for all layers at once would be as large as the cache.
            view = ballot.layer.append(ballot.inputs)
            view.score.copy_(ballot.score)
            view.cumulative_attention.copy_(ballot.cumulative_attention)
            eviction.compress_if_full(view, ballot.inputs, votes)
        self.waiting.clear()


@dataclass
class QueryPass(ForwardPass):
    """A pass of one row whose tokens only attend: nothing enters the cache.

    attention: for each full-attention layer, in order, float32 [H, C]: the maximum over the tokens for each slot.
    """

    attention: list[Tensor] = field(default_factory=list)

    def mix(self, call: RecurrentCall) -> Tensor:
        """Run the tokens behind a recurrent layer's state, which stays as it is."""
        return call.run(call.hidden, MixerCache(self.cache.states[call.index].clone()))

    def _update(self, view: KVView, inputs: AttentionInputs) -> None:
        if view.spec.window is not None:
            return
        assert inputs.probe_queries is not None
        assert inputs.probe_positions is not None
        bias = equations.slot_bias(view.multiplicity, view.config.alpha)
        _, most = inputs.ops.attention_mass(
            inputs.probe_queries, inputs.probe_positions, view.keys, bias, view.position, view.spec, inputs.sinks
        )
        self.attention.append(most[0])


@dataclass
class SpeculativePass(ForwardPass):
    """A pass over tokens of which only a beginning may be right: no layer takes them in before `keep`.

    One row, in a cache that they fit into without compressing.
    """

    pending: list[tuple[KVView, AttentionInputs]] = field(default_factory=list)
    mixed: list[RecurrentCall] = field(default_factory=list)

    def mix(self, call: RecurrentCall) -> Tensor:
        """Run the tokens behind a recurrent layer's state, which takes none of them in before `keep`."""
        self.mixed.append(call)
        return call.run(call.hidden, MixerCache(self.cache.states[call.index].clone()))

    def _update(self, view: KVView, inputs: AttentionInputs) -> None:
        self.pending.append((view, inputs))

    def keep(self, count: int) -> None:
        """Take in the first `count` tokens and forget the others."""
        self.layout.seen = self.layout.seen - (self.layout.num_new - count)
        for view, inputs in self.pending:
            eviction.update_first([count], view, inputs)
        for call in self.mixed:  # a state cannot forget: the layer's input is run again as far as it was right
            call.run(call.hidden[:, :count], MixerCache(self.cache.states[call.index]))
        self.pending.clear()
        self.mixed.clear()
