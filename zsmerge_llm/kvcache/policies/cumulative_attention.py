"""Keep the tokens of the highest contribution score (Eq. 5 of ZSMerge; heavy hitters of H2O, arXiv 2306.14048)."""

from __future__ import annotations

from torch import Tensor

from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.policies.base import EvictionPolicy, RankingContext
from zsmerge_llm.kvcache.slots import AttentionInputs


class CumulativeAttention(EvictionPolicy):
    """Rank slots by s ← decay · s + a, a the attention from every query of every pass."""

    name = "cumulative_attention"
    capturable = True

    def observe(self, view: KVView, inputs: AttentionInputs) -> None:
        """Add the attention of each new token to the scores, in place."""
        bias = equations.slot_bias(view.multiplicity, view.config.alpha)[:, :, None, None, :]
        causal = equations.causal_bias(view.layer.filled, inputs.queries.shape[2], view.keys.shape[2], bias.dtype)
        causal = causal[:, None, None]
        spec, keys = view.spec, _centred_keys(view, inputs)
        weights = equations.grouped_weights(inputs.queries, keys, bias + causal, spec.scale, spec.softcap, inputs.sinks)
        view.score.copy_(equations.contribution(view.score, weights, inputs.valid, view.config.decay))

    def rank(self, view: KVView, context: RankingContext) -> Tensor:
        """Return the scores, float32 [B, H, C]."""
        return view.score


def _centred_keys(view: KVView, inputs: AttentionInputs) -> Tensor:
    """Return the keys less their mean, [B, H, C, D].

    A constant taken from all keys changes no softmax, and keeps half-precision logits small and exact. Soft-capping and
    learned sinks are no plain softmax of the logits: there the keys stay as they are.
    """
    if inputs.sinks is not None or view.spec.softcap is not None:
        return view.keys
    present = view.multiplicity[..., None] > 0
    centre = (view.keys.float() * present).sum(2, keepdim=True) / present.sum(2, keepdim=True).clamp(min=1)
    return (view.keys.float() - centre).to(view.keys.dtype)
