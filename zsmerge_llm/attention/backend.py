"""What computes the attention of a forward pass: the protocol of a backend, and the one in plain PyTorch.

Nothing above this room knows which backend runs. A backend for a device overrides what its kernels do better, and
everything else stays PyTorch's (`cpu.backend`, `gpu.backend`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor

from zsmerge_llm.attention.call import AttentionCall, dense_attention
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.kvcache.layer_cache import KVView, LayerCache
from zsmerge_llm.kvcache.scoring import TensorScoring
from zsmerge_llm.kvcache.slots import AttentionInputs, LayerSpec, ScoringOps

CHUNK_TOKENS = 512
"""Tokens of a pass: more are not faster on a CPU (docs/research/kernels)."""

Replay = Callable[[], None]
"""Repeats work on fixed memory."""

DecodeStep = Literal["captured", "compiled", "eager"]
"""How a decode step runs: as a captured graph of the device, through compiled layers, or as transformers wrote it."""


class AttentionOps(ScoringOps, Protocol):
    """The attention operations of one layer in one forward pass. `ScoringOps` adds attention masses and queries."""

    def attend(
        self, layer: LayerCache, call: AttentionCall, inputs: AttentionInputs, layout: PassLayout
    ) -> tuple[KVView, Tensor]:
        """Append the new tokens to the layer and attend: the view attended to, and the output [B, Hq, T, D]."""


class AttentionBackend(Protocol):
    """Computes attention for a model, and may make its forward passes faster."""

    @property
    def max_decode_tokens(self) -> int | None:
        """The most tokens of one row that a decode step should have; None: no limit of its own."""

    @property
    def max_decode_rows(self) -> int | None:
        """The most conversations that one decode step should take; None where more are always better."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a row's logits are the same, bit for bit, alone, beside others, and one token or a few at a time."""

    @property
    def disabled_reason(self) -> str | None:
        """Why the backend does less than it could, for logs; None where nothing is wrong."""

    def default_chunk(self, specs: Sequence[LayerSpec]) -> int:
        """Return how many tokens a pass should read, for a model with such layers."""

    @property
    def static_sizes(self) -> Sequence[int] | None:
        """The rows that steps in fixed memory may have, ascending; None: caches decode in their own memory."""

    def capture(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Replay:
        """Return what repeats `run`, on fixed memory. `warm_up` does the same work without a trace."""

    @property
    def decode_step(self) -> DecodeStep:
        """How decode steps run now; "eager" also where something faster is not yet due."""

    @property
    def fastest_step(self) -> DecodeStep:
        """How decode steps run once `start` has worked."""

    @property
    def steps_until_start(self) -> int | None:
        """Decode steps after which the backend starts of its own accord; None: never, or it has."""

    def ops(self, layer: LayerCache, call: AttentionCall, layout: PassLayout) -> AttentionOps:
        """Choose the operations for one layer's call in one forward pass."""

    @property
    def pending_build(self) -> bool:
        """Whether `warm_up` has something to build, which may take seconds."""

    def start(self) -> None:
        """Make ready, at once, everything that would otherwise be made once it pays (kernels, compiled layers)."""

    def warm_up(self) -> None:
        """Load kernels for prefill now that would otherwise be loaded while a prompt is read."""

    def on_pass(self, num_tokens: int) -> None:
        """Take note of a forward pass of so many tokens, before it runs."""

    def running(self, most_threads: int) -> AbstractContextManager[None]:
        """Return what passes and sampling run within: it chooses the number of threads that they run on."""

    def release_threads(self) -> None:
        """End the idle threads of the calling thread, which waits for a pass in another one: that needs the cores."""

    def thread_choice(self) -> tuple[int, str] | None:
        """Return how many threads a pass of the calling thread uses, and why not more; None: not the backend's."""

    def close(self) -> None:
        """Give every module of the model its own forward back. No pass comes after that."""


class TorchOps(TensorScoring):
    """Attention in plain PyTorch, for any pass and any device."""

    def attend(
        self, layer: LayerCache, call: AttentionCall, inputs: AttentionInputs, layout: PassLayout
    ) -> tuple[KVView, Tensor]:
        """Append the new tokens and attend to the slots and, behind them, the probe's own keys."""
        view = layer.append(inputs, layout.static)
        keys, values = view.keys, view.values
        if call.query.shape[2] > layout.num_new:
            keys = torch.cat([keys, call.key[:, :, layout.num_new :]], dim=2)
            values = torch.cat([values, call.value[:, :, layout.num_new :]], dim=2)
        return view, self.attention(view, call, keys, values, layout)

    def attention(self, view: KVView, call: AttentionCall, keys: Tensor, values: Tensor, layout: PassLayout) -> Tensor:
        """Attend from call.query to keys and values [B, H, C + m, D]: [B, Hq, T, D]."""
        return dense_attention(call, keys, values, layout.logit_bias(view, call))


class TorchBackend:
    """The reference backend: nothing is built, compiled or chosen."""

    max_decode_tokens: int | None = None
    max_decode_rows: int | None = None
    static_sizes: Sequence[int] | None = None
    fastest_step: DecodeStep = "eager"

    def __init__(self) -> None:
        self.torch_ops = TorchOps()

    @property
    def batch_invariant(self) -> bool:
        """Whether rows are computed as if alone. PyTorch's products are not: they depend on how many rows there are."""
        return False

    @property
    def disabled_reason(self) -> str | None:
        """Nothing is ever disabled."""
        return None

    def default_chunk(self, specs: Sequence[LayerSpec]) -> int:
        """Return the same for all."""
        return CHUNK_TOKENS

    def capture(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Replay:
        """Return `run` itself."""
        return run

    @property
    def decode_step(self) -> DecodeStep:
        """Every layer runs as transformers wrote it."""
        return "eager"

    @property
    def steps_until_start(self) -> int | None:
        """There is nothing to start."""
        return None

    def ops(self, layer: LayerCache, call: AttentionCall, layout: PassLayout) -> AttentionOps:
        """Return PyTorch's operations."""
        return self.torch_ops

    @property
    def pending_build(self) -> bool:
        """Nothing has to be built."""
        return False

    def start(self) -> None:
        """Do nothing: everything is ready."""

    def warm_up(self) -> None:
        """Do nothing: everything is loaded."""

    def on_pass(self, num_tokens: int) -> None:
        """Do nothing."""

    def running(self, most_threads: int) -> AbstractContextManager[None]:
        """Change nothing."""
        return nullcontext()

    def release_threads(self) -> None:
        """Do nothing."""

    def thread_choice(self) -> tuple[int, str] | None:
        """Threads are left to PyTorch."""
        return None

    def close(self) -> None:
        """Do nothing: the model was not changed."""
