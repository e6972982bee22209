"""Scoring operations in plain PyTorch: the reference for every backend, and what runs between two forward passes."""

from __future__ import annotations

from torch import Tensor

from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.slots import AttentionInputs, LayerSpec


class TensorScoring:
    """`ScoringOps` as tensor expressions, in float32."""

    def attention_mass(
        self,
        queries: Tensor,
        query_positions: Tensor,
        keys: Tensor,
        bias: Tensor,
        positions: Tensor,
        spec: LayerSpec,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return mean and maximum attention of each slot; see `ScoringOps`."""
        visible = positions[:, :, None, :] <= query_positions[:, None, :, None]  # [B, H, m, C]
        masked = bias[:, :, None, :].masked_fill(~visible, equations.NEVER)[:, :, None]
        weights = equations.grouped_weights(queries.float(), keys.float(), masked, spec.scale, spec.softcap, sinks)
        counted = query_positions >= 0
        most = (weights * counted[:, None, None, :, None]).amax((2, 3))
        return equations.mean_attention(weights, counted), most

    def push_queries(self, queries: Tensor, query_positions: Tensor, inputs: AttentionInputs) -> None:
        """Write a pass's queries into the ring of the newest ones; see `ScoringOps`."""
        new = inputs.queries, inputs.positions, inputs.query_positions
        ring, positions = equations.push_ring(queries, query_positions, *new)
        queries.copy_(ring)
        query_positions.copy_(positions)
