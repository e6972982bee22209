"""Where the tokens of one forward pass stand, and which slots each of them may attend to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from zsmerge_llm.attention.call import AttentionCall
from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.layer_cache import KVView


@dataclass
class PassLayout:
    """The tokens of a forward pass: n = `num_new` that enter the cache and, behind them, m of a probe; T = n + m.

    positions: int [B, T], text positions. valid: bool [B, n], False for padding; None: no padding. num_new_tokens: how
    many of the n are no padding, for each row. seen: int [B], tokens read by each row, these included. static: whether
    the pass is repeated as a graph: it attends to all entries of the layers, and no number of the host decides.
    probe_valid: bool [B, m], False for padding behind the probe; None: no padding.
    """

    num_new: int
    positions: Tensor
    valid: Tensor | None
    num_new_tokens: list[int]
    seen: Tensor
    static: bool = False
    probe_valid: Tensor | None = None
    _on_device: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict)
    _causal: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Return the pass's small tensors on a layer's device, made once.

        new_positions int32 [B, n], valid bool [B, n], query_positions int32 [B, n] (-1: padding), counts int32 [B],
        probe_positions int [B, m] (-1: padding), positions, seen.
        """
        if device not in self._on_device:
            new = self.positions[:, : self.num_new].to(torch.int32)
            valid = new >= 0 if self.valid is None else self.valid
            made = {"new_positions": new, "valid": valid, "query_positions": new.masked_fill(~valid, -1)}
            made["counts"] = valid.sum(-1, dtype=torch.int32)
            probe = self.positions[:, self.num_new :]
            made["probe_positions"] = probe if self.probe_valid is None else probe.masked_fill(~self.probe_valid, -1)
            made |= {"positions": self.positions, "seen": self.seen}
            self._on_device[device] = {name: tensor.to(device) for name, tensor in made.items()}
        return self._on_device[device]

    def logit_bias(self, view: KVView, call: AttentionCall) -> Tensor | None:
        """Return what is added to the logits, broadcastable to [B, Hq, T, C + m]; None where nothing is."""
        total, window, layer = call.query.shape[2], view.spec.window, view.layer
        if window is None and layer.config.residual == 0:  # every slot in use holds just one token
            return None if total == 1 and not self.static and layer.uniform else self._causal_bias(view, call)
        bias = self.slot_bias(view, call)[:, :, None, :]
        if total > 1 or self.static:
            bias = bias + self._causal_bias(view, call)
        if window is not None:
            bias = bias + equations.window_bias(*self.query_and_key_positions(view, call), window)[:, None]
        group = call.query.shape[1] // call.key.shape[1]
        return bias.to(call.query.dtype).repeat_interleave(group, dim=1)

    def slot_bias(self, view: KVView, call: AttentionCall) -> Tensor:
        """Return the bias of the slots (Eq. 8), and 0 for the probe's own keys: float32 [B, H, C + m]."""
        bias = equations.slot_bias(view.multiplicity, view.config.alpha)
        return F.pad(bias, (0, call.query.shape[2] - self.num_new))

    def query_and_key_positions(self, view: KVView, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Return the positions of queries int32 [B, T], and of keys [B, C + m] in a layer with a sliding window."""
        positions = self.on(call.key.device)["positions"].to(torch.int32)
        return positions, torch.cat([view.position[:, 0], positions[:, self.num_new :]], dim=1)

    def _causal_bias(self, view: KVView, call: AttentionCall) -> Tensor:
        """Return the causal mask [B, 1, T, C + m], made once for all layers of one fill. The probe sees all slots."""
        slots, layer, num_probe = view.multiplicity.shape[2], view.layer, call.query.shape[2] - self.num_new
        # Layers of one budget fill up and compress together; others may have the same fill by chance.
        budget = (layer.config.slots, layer.capacity) if self.static else tuple(layer.num_filled)
        key = (budget, slots, call.query.dtype, call.query.device)
        if key not in self._causal:
            filled = layer.filled if self.static or not layer.uniform else layer.filled[:1]
            new = equations.causal_bias(filled, self.num_new, slots, call.query.dtype)
            behind = torch.full_like(filled, slots)
            probe = equations.causal_bias(behind, num_probe, slots + num_probe, call.query.dtype)
            self._causal[key] = torch.cat([F.pad(new, (0, num_probe), value=equations.NEVER), probe], dim=1)[:, None]
        return self._causal[key]
