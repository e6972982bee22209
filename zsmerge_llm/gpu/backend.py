"""The GPU backend: fused attention, decode steps in fixed memory that are repeated as graphs, and compiled layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from zsmerge_llm.attention.backend import DecodeStep, Replay, TorchBackend
from zsmerge_llm.gpu.attention import GPUOps
from zsmerge_llm.gpu.compiled_layers import CompiledLayers
from zsmerge_llm.gpu.compiler import compile_and_keep
from zsmerge_llm.gpu.graphs import SEVERAL_DEVICES, GraphCapture, capture_refusal
from zsmerge_llm.kvcache.slots import LayerSpec

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 32)
"""Conversations of a decode step: each has a graph of its own."""


CHUNKS = (2048, 1024, 512, 256)
"""Tokens of a pass, the first that there is memory for: larger ones were no faster in a prototype on an H100."""


def token_bytes(model: PreTrainedModel, specs: Sequence[LayerSpec]) -> int:
    """Estimate the bytes of temporary tensors for each token of a pass.

    The keys and values of all layers, which wait until all have voted, and the widest layer's activations.
    """
    config = model.config.get_text_config()
    held = sum(spec.kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize for spec in specs)
    wide = int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return held + (3 * wide + 8 * config.hidden_size) * specs[-1].dtype.itemsize


class GPUBackend(TorchBackend):
    """Graphs of decode steps, over layers that may be compiled.

    Args:
        num_layers: decoder layers of the model.
        automatic: not used: without `start` nothing is compiled, for a graph needs no compiler and is made in a moment.
        num_draft_tokens: tokens of a speculative pass behind the first.
    """

    max_decode_rows = ROWS[-1]
    fastest_step: DecodeStep = "captured"

    def __init__(self, model: PreTrainedModel, num_layers: int, automatic: bool, num_draft_tokens: int) -> None:
        super().__init__()
        self.torch_ops = GPUOps()
        shapes = [(1, 1 + num_draft_tokens), *((rows, 1) for rows in ROWS)]
        self.compiled = CompiledLayers(model, num_layers, shapes, compile_and_keep)
        self._model = model
        self._capture = GraphCapture()
        self._checked = False
        self._not_captured: str | None = None
        self.static_sizes: Sequence[int] | None = ROWS
        if len({weight.device for weight in model.parameters()}) > 1:  # fixed memory is on one
            self.static_sizes, self._not_captured = None, SEVERAL_DEVICES

    def default_chunk(self, specs: Sequence[LayerSpec]) -> int:
        """Return the most tokens, up to 2,048, whose temporary tensors take at most half of the memory that is free."""
        if not torch.cuda.is_available():
            return super().default_chunk(specs)
        free, _ = torch.cuda.mem_get_info(specs[-1].device)
        needed = token_bytes(self._model, specs)
        return next((chunk for chunk in CHUNKS if chunk * needed <= free // 2), CHUNKS[-1])

    @property
    def disabled_reason(self) -> str | None:
        """Why steps are not captured, or layers not compiled; None where nothing is wrong."""
        return self._not_captured or self.compiled.disabled_reason

    def capture(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Replay:
        """Return a graph of `run`; `run` itself for a model that cannot be captured, which is logged once."""
        if not self._checked:
            self._checked = True
            if (reason := capture_refusal(self._model)) is not None:
                self._run_eagerly(f"{type(self._model).__name__}: {reason}")
        if self._not_captured is not None:
            return run
        try:
            return self._capture(run, warm_up)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._run_eagerly(f"{type(error).__name__}: {error}")
            return run

    def _run_eagerly(self, reason: str) -> None:
        self._not_captured = reason
        log.warning("Decode steps run without graphs, and slower: %s", reason)

    @property
    def decode_step(self) -> DecodeStep:
        """How decode steps run: as graphs, unless the model cannot be captured."""
        if self._not_captured is None:
            return "captured"
        return "compiled" if self.compiled.enabled and self.compiled.disabled_reason is None else "eager"

    def start(self) -> None:
        """Compile layers from now on, with TorchInductor: each step runs them when it is captured."""
        self.compiled.start()

    def close(self) -> None:
        """Give every layer its own forward back."""
        self.compiled.close()
