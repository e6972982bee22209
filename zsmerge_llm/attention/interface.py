"""The seam with transformers: one attention function, registered as "zsmerge", that owns the compressed cache.

The engine calls the model with `use_cache=False` and one keyword, `zsmerge=ForwardPass(...)`, which travels through the
decoder layers to the function; no model is patched or subclassed. What a model's layers need is seen in a one-token
trace, not guessed from its config, and what the cache cannot carry is refused by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedModel

from zsmerge_llm.attention import adapters
from zsmerge_llm.cpu import native as kernels
from zsmerge_llm.errors import InputError, UnsupportedModelError
from zsmerge_llm.kvcache import policy
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.layer_cache import LayerCache
from zsmerge_llm.kvcache.rope import Rotation, fit
from zsmerge_llm.kvcache.view import AttentionInputs, KVView, LayerSpec

NAME = "zsmerge"
PASSAGE = 129
"""Tokens around one that is looked at that belong to it."""
HARMLESS = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position"}


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention call. query [B, Hq, T, D]; key, value [B, H, T, D]; sinks [Hq]."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class AttentionHandler(ABC):
    """What the model hands through to each attention layer."""

    @abstractmethod
    def attend(self, call: AttentionCall) -> Tensor:
        """What the layer makes of its call: [B, Hq, T, D]."""

    def get_seq_length(self) -> int:
        """For models that take this object for a cache of transformers (Falcon)."""
        return 0


def zsmerge_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    zsmerge: AttentionHandler | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every attention layer. Returns [B, T, Hq, D] and no weights.

    Raises:
        InputError: the model was called outside the engine.
        UnsupportedModelError: the layer asks for something the cache does not carry.
    """
    kind = type(module).__name__
    if zsmerge is None:
        raise InputError(
            "This model belongs to a zsmerge-llm engine. Use the engine, or call "
            'model.set_attn_implementation("sdpa") to use the model on its own again.'
        )
    unknown = [name for name, given in others.items() if isinstance(given, Tensor) and name not in HARMLESS]
    if unknown or attention_mask is not None:
        what = ", ".join(unknown) or "a mask of its own"
        raise UnsupportedModelError(f"{kind} passes {what} to its attention, which the compressed cache cannot carry.")
    if not getattr(module, "is_causal", True):
        raise UnsupportedModelError(f"{kind} attends in both directions; the compressed cache is for causal decoders.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(module.layer_idx, query, key, value, scale, sliding_window, softcap, s_aux)  # type: ignore[arg-type]
    return zsmerge.attend(call).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, zsmerge_attention)


@dataclass
class ForwardPass(AttentionHandler):
    """One forward pass over `cache`: the tokens to keep and, behind them, the probe's, which only look.

    position [B, T] covers all T = n + m tokens, valid [B, n] (False: padding; None: no padding) the n = `new` to keep;
    counts: how many of them are no padding, for each row; seen [B]: tokens each row has read, these included.
    kernels, reads: whether those of `kernels` for a few tokens, and for many, may serve. pinned_recent,
    reserving: see `AttentionInputs`.
    """

    cache: Cache
    new: int
    position: Tensor
    valid: Tensor | None
    counts: list[int]
    seen: Tensor
    kernels: bool = False
    reads: bool = False
    pinned_recent: int = 0
    multi_turn: bool = False
    small: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict)
    causal: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor:
        """Append, attend, observe, compress: [B, Hq, T, D]."""
        layer = self.cache.layers[call.layer]
        arrival = self._arrival(layer, call)
        if arrival.few:
            held, output = layer.attend(arrival, call.scaling)
            self._settle(layer, held, arrival)
            return output
        held = layer.append(arrival)
        keys, values = held.keys, held.values
        if call.query.shape[2] > self.new:
            keys = torch.cat([keys, call.key[:, :, self.new :]], dim=2)
            values = torch.cat([values, call.value[:, :, self.new :]], dim=2)
        if arrival.many:
            output = self._read(layer, held, call, keys, values)
        else:
            output = _attend(call, keys, values, self._bias(layer, held, call))
        self._settle(layer, held, arrival)
        return output

    def _read(self, layer: LayerCache, held: KVView, call: AttentionCall, keys: Tensor, values: Tensor) -> Tensor:
        """`_attend` in one kernel, which needs no mask."""
        window, bias, asking, position = layer.spec.window, None, None, None
        if window is not None or layer.config.residual:
            bias = self._slot_bias(layer, held, call)
        if window is not None:
            asking, position = self._places(held, call)
        return kernels.prefill_attention(
            call.query,
            keys,
            values,
            held.base,
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
            window=window,
            bias=bias,
            query_position=asking,
            slot_position=position,
        )

    def attended(self, call: AttentionCall) -> None:
        """What `attend` does behind attention, where the tokens stand in their slots already (`replay`)."""
        layer = self.cache.layers[call.layer]
        held = KVView(layer, max(layer.fills) + self.new, layer.fills, in_place=True)
        self._settle(layer, held, self._arrival(layer, call))

    def _settle(self, layer: LayerCache, held: KVView, arrival: AttentionInputs) -> None:
        layer.settle(held, arrival)

    def finish(self) -> None:
        """Called when all layers have run: what is left to be done then. Here, nothing."""

    def _arrival(self, layer: LayerCache, call: AttentionCall) -> AttentionInputs:
        new, small = self.new, self.marks(call.key.device)
        queries, keys, values = call.query, call.key, call.value
        probe, probe_position, few = None, None, False
        if queries.shape[2] > new:
            probe, probe_position = queries[:, :, new:], small["position"][:, new:]
            queries, keys, values = (each[:, :, :new] for each in (queries, keys, values))
        elif self.kernels and self.valid is None and layer.holds(new):
            few = kernels.can_decode(queries, keys, values)
        return AttentionInputs(
            queries=queries,
            keys=keys,
            values=values,
            position=small["kept"],
            valid=small["valid"],
            present=small["present"],
            asking=small["asking"],
            seen=small["seen"],
            probe=probe,
            probe_position=probe_position,
            counts=self.counts,
            sinks=call.sinks,
            few=few,
            many=self.reads and kernels.can_prefill(call.query, call.key, call.value),
            pinned_recent=self.pinned_recent,
            multi_turn=self.multi_turn,
        )

    def marks(self, device: torch.device) -> dict[str, Tensor]:
        """This step's small tensors on a layer's device, made once."""
        if device not in self.small:
            kept = self.position[:, : self.new].to(torch.int32)
            valid = kept >= 0 if self.valid is None else self.valid
            asking = kept.masked_fill(~valid, -1)
            made = {"kept": kept, "valid": valid, "present": valid.float(), "asking": asking}
            made |= {"position": self.position, "seen": self.seen}
            self.small[device] = {name: tensor.to(device) for name, tensor in made.items()}
        return self.small[device]

    def _bias(self, layer: LayerCache, held: KVView, call: AttentionCall) -> Tensor | None:
        """What is added to the logits, broadcastable to [B, Hq, T, C + m]; None where nothing is."""
        total, window = call.query.shape[2], layer.spec.window
        if window is None and layer.config.residual == 0:  # every slot in use holds just one token
            return None if total == 1 and layer.level else self._causal(layer, held, call)
        bias = self._slot_bias(layer, held, call)[:, :, None, :]
        if total > 1:
            bias = bias + self._causal(layer, held, call)
        if window is not None:
            bias = bias + policy.window_bias(*self._places(held, call), window)[:, None]
        group = call.query.shape[1] // call.key.shape[1]
        return bias.to(call.query.dtype).repeat_interleave(group, dim=1)

    def _slot_bias(self, layer: LayerCache, held: KVView, call: AttentionCall) -> Tensor:
        """float32 [B, H, C + m]: that of the slots, and 0 for the probe."""
        return F.pad(policy.slot_bias(held.count, layer.config.alpha), (0, call.query.shape[2] - self.new))

    def _places(self, held: KVView, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """int32 [B, T] and [B, C + m]: where the queries stand, and the keys of a layer with a window."""
        position = self.marks(call.key.device)["position"].to(torch.int32)
        return position, torch.cat([held.position[:, 0], position[:, self.new :]], dim=1)

    def _causal(self, layer: LayerCache, held: KVView, call: AttentionCall) -> Tensor:
        """[B, 1, T, C + m]; made once for all layers of the same fill. The probe stands behind all slots."""
        total, slots = call.query.shape[2], held.count.shape[2]
        fills, bases = (layer.fills[:1], held.base[:1]) if layer.level else (layer.fills, held.base)
        key = (tuple(fills), tuple(bases), slots, call.query.dtype, call.query.device)
        if key not in self.causal:
            filled, base = torch.tensor([fills, bases], device=call.query.device)
            probing = total - self.new
            own = policy.causal_bias(filled, base, self.new, slots, call.query.dtype)
            behind = torch.full_like(base, slots)
            after = policy.causal_bias(behind, behind, probing, slots + probing, call.query.dtype)
            self.causal[key] = torch.cat([F.pad(own, (0, probing), value=policy.NEVER), after], dim=1)[:, None]
        return self.causal[key]


@dataclass
class VotingPass(ForwardPass):
    """A pass with a question behind it, of one row: no layer compresses before all have said which passages matter.

    A layer alone knows what it looks at itself, and few layers find an answer; what they find is then kept by all, with
    what stands around it. Until then the pass holds its tokens' keys and values for all layers.

    votes: float32 [seen], for each token what the layers' heads pay it, a layer of more slots counting for more.
    """

    votes: Tensor = field(init=False)
    waiting: list[tuple[LayerCache, AttentionInputs, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.votes = torch.zeros(int(self.seen[0]), device=self.cache.layers[0].spec.device)

    def _settle(self, layer: LayerCache, held: KVView, arrival: AttentionInputs) -> None:
        if layer.config.policy != "observation_window" or not any(layer.fills_up(arrival)):
            layer.settle(held, arrival)
            return
        assert layer.config.slots is not None
        vote = layer.vote(held, arrival) * layer.config.slots**2
        place = held.position.clamp(min=0).flatten().to(self.votes.device)
        self.votes.index_add_(0, place, vote.flatten().to(self.votes.device))
        self.waiting.append((layer, arrival.unasked, held.score, held.accumulated))

    def finish(self) -> None:
        passages = policy.passages(self.votes, PASSAGE)
        for layer, arrival, score, accumulated in self.waiting:
            held = layer.append(arrival)  # again, because copies for all layers at once would be as large as the cache
            held.score.copy_(score)
            held.accumulated.copy_(accumulated)
            layer.close(held, arrival, passages)
        self.waiting.clear()


@dataclass
class QueryPass(ForwardPass):
    """A pass of tokens that only look, one row's: nothing is taken in.

    most: float32 [H, C] of each full-attention layer, in their order: the most that any of the tokens pays each slot.
    """

    most: list[Tensor] = field(default_factory=list)

    def _settle(self, layer: LayerCache, held: KVView, arrival: AttentionInputs) -> None:
        if layer.spec.window is None:
            self.most.append(layer.paid_most(held, arrival)[0])


@dataclass
class SpeculativePass(ForwardPass):
    """A pass over tokens of which only a beginning may stay: no layer takes them in before `keep`.

    One row, in a cache that they fit into without compressing.
    """

    pending: list[tuple[LayerCache, KVView, AttentionInputs]] = field(default_factory=list)

    def _settle(self, layer: LayerCache, held: KVView, arrival: AttentionInputs) -> None:
        self.pending.append((layer, held, arrival))

    def keep(self, count: int) -> None:
        """Take in the first `count` tokens and forget the others."""
        self.seen = self.seen - (self.new - count)
        for layer, held, arrival in self.pending:
            layer.settle_first(count, held, arrival)
        self.pending.clear()


def _attend(call: AttentionCall, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of call.query to keys and values [B, H, C, D], fused where the model allows: [B, Hq, T, D]."""
    group = call.query.shape[1] // keys.shape[1]
    if call.softcap is None and call.sinks is None:
        return F.scaled_dot_product_attention(
            call.query, keys, values, attn_mask=bias, scale=call.scaling, enable_gqa=group > 1
        )
    batch, heads, total, dim = call.query.shape
    grouped = call.query.view(batch, keys.shape[1], group, total, dim).float()
    spread = torch.zeros((), device=keys.device) if bias is None else bias.float()
    if spread.dim() == 4:  # [B, Hq, T, C] → [B, H, G, T, C]
        heads_of = (1, 1) if spread.shape[1] == 1 else (keys.shape[1], group)
        spread = spread.view(spread.shape[0], *heads_of, *spread.shape[2:])
    paid = policy.weights(grouped, keys.float(), spread, call.scaling, call.softcap, call.sinks)
    output = paid.to(values.dtype).view(batch, keys.shape[1], group * total, -1) @ values
    return output.view(batch, heads, total, -1)


@dataclass
class _Trace(AttentionHandler):
    """Sees what each layer asks for in a forward pass without a cache."""

    calls: dict[int, AttentionCall] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor:
        self.calls[call.layer] = call
        return _attend(call, call.key, call.value, None)


@dataclass
class _Keys(AttentionHandler):
    """Sees the keys of each layer, [B, H, D], while every token attends to itself alone, wherever it stands."""

    keys: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor:
        self.keys[call.layer] = call.key[:, :, 0]
        return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)


def forward(model: PreTrainedModel, carrier: AttentionHandler, **inputs: Any) -> Tensor:
    """Logits [B, kept, vocab] of one pass in which `carrier` is handed to every attention layer."""
    keyword = adapters.keyword(model)
    return model(**inputs, use_cache=False, **{keyword: carrier}).logits


@torch.inference_mode()
def prepare(model: PreTrainedModel) -> tuple[LayerSpec, ...]:
    """Make `model` use the compressed cache, and say what each of its layers needs.

    Raises:
        UnsupportedModelError: an architecture or feature the cache cannot carry, by name.
    """
    adapters.check(model)
    adapters.install(model, zsmerge_attention, NAME)
    trace = _Trace()
    embedding: Any = model.get_input_embeddings()
    token = torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device)
    forward(model, trace, input_ids=token, position_ids=token, logits_to_keep=1)
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    missing = sorted(set(range(config.num_hidden_layers)) - set(trace.calls))
    if missing:
        raise UnsupportedModelError(
            f"Layers {missing} of {type(model).__name__} do not attend through transformers' attention interface "
            "(linear attention or a state space, perhaps): the compressed cache cannot carry them."
        )
    return tuple(_spec(trace.calls[index], kinds[index], config) for index in range(config.num_hidden_layers))


@torch.inference_mode()
def rotations(model: PreTrainedModel, places: Sequence[int]) -> list[Rotation | None]:
    """How each layer's keys carry their place, as seen at place 0 and at `places`; None where that is not known."""
    embedding: Any = model.get_input_embeddings()
    vocab, device = embedding.weight.shape[0], embedding.weight.device
    tokens = torch.linspace(0, vocab - 1, 8, device=device).long()[:, None]

    def keys(place: int) -> dict[int, Tensor]:
        seen = _Keys()
        at = torch.full_like(tokens, place)
        forward(model, seen, input_ids=tokens, position_ids=at, logits_to_keep=1)
        return seen.keys

    origin = keys(0)
    # Read out now: some models change their frequencies with the place.
    frequencies = [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    frequencies = [each for index, each in enumerate(frequencies) if not _among(each, frequencies[:index])]
    moved = {place: keys(place) for place in places}
    return [
        fit(origin[layer], {place: keys[layer] for place, keys in moved.items()}, frequencies)
        for layer in sorted(origin)
    ]


def _among(tensor: Tensor, others: Sequence[Tensor]) -> bool:
    return any(torch.equal(tensor.cpu(), other.cpu()) for other in others)


def _spec(call: AttentionCall, kind: str | None, config: Any) -> LayerSpec:
    window = call.window
    if kind == "sliding_attention" and window is None:
        window = config.sliding_window
    if kind == "full_attention":
        window = None
    return LayerSpec(
        query_heads=call.query.shape[1],
        kv_heads=call.key.shape[1],
        key_dim=call.key.shape[3],
        value_dim=call.value.shape[3],
        window=window,
        dtype=call.key.dtype,
        device=call.key.device,
        scaling=call.scaling,
        softcap=call.softcap,
    )
