"""Scoring operations in plain PyTorch: the reference for every backend, and what runs between two forward passes."""

from __future__ import annotations

import torch
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
        return equations.mean_attention(weights, query_positions >= 0), weights.amax((2, 3))

    def push_queries(self, queries: Tensor, query_positions: Tensor, inputs: AttentionInputs) -> None:
        """Push a pass's queries into the newest ones; see `ScoringOps`."""
        room = queries.shape[2]
        both = torch.cat([queries, inputs.queries], dim=2)
        positions = torch.cat([query_positions, inputs.query_positions], dim=1)
        if inputs.padded:  # padding, at position -1, must not push a row's own queries out
            positions, order = positions.sort(dim=1, stable=True)
            both = equations.gather_slots(both, order[:, None].expand(-1, both.shape[1], -1))
        queries.copy_(both[:, :, -room:])
        query_positions.copy_(positions[:, -room:])
