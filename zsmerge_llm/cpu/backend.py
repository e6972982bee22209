"""The CPU backend: C++ kernels for decode steps, for prefill and for matrices, and compiled decode steps.

Kernels are built and steps compiled at once (`start`), never, or once so many tokens have gone through that it pays.
What an earlier process has compiled is used from the first token on.
None of it changes an answer, but for rounding. Where there is no compiler, PyTorch does everything, and a warning says
so.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zsmerge_llm.attention.backend import AttentionOps, DecodeStep, TorchBackend, TorchOps
from zsmerge_llm.attention.call import AttentionCall
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.attention.offloading import input_device
from zsmerge_llm.cpu import native
from zsmerge_llm.cpu.compiled_steps import CompiledSteps
from zsmerge_llm.cpu.float32_products import Float32Linear, Float32Ops
from zsmerge_llm.cpu.patches import ForwardPatches, GemmLinear, GemvLinear, covers_model, is_matrix
from zsmerge_llm.cpu.product_dtype import product_dtype
from zsmerge_llm.cpu.quantized_linear import Int4Linear, Int8Linear
from zsmerge_llm.cpu.threads import PassThreads
from zsmerge_llm.errors import UnsupportedModelError
from zsmerge_llm.kvcache.layer_cache import KVView, LayerCache
from zsmerge_llm.kvcache.slots import PER_SLOT, AttentionInputs, LayerSpec

log = logging.getLogger(__name__)

BUILD_PREFILL_AFTER = 16_384
"""Tokens read before the prefill kernels are built of their own accord, which takes 10 s once on a machine."""


class DecodeOps(TorchOps):
    """Attention of a few tokens without a probe: one kernel writes them and attends. A row has all of them or none."""

    def attend(
        self, layer: LayerCache, call: AttentionCall, inputs: AttentionInputs, layout: PassLayout
    ) -> tuple[KVView, Tensor]:
        """Write the new tokens into the layer's slots and attend, in one kernel; see `AttentionOps`."""
        output = native.decode_attention(
            (inputs.queries, inputs.keys, inputs.values),
            [getattr(layer, name) for name in PER_SLOT],
            inputs.positions,
            layer.num_filled,
            [int(new > 0) for new in layout.num_new_tokens],
            scaling=call.scaling,
            alpha=layer.config.alpha,
            softcap=layer.spec.softcap,
            window=layer.spec.window,
            sinks=inputs.sinks,
        )
        return layer.view(max(layer.num_filled) + inputs.keys.shape[2]), output

    def push_queries(self, queries: Tensor, query_positions: Tensor, inputs: AttentionInputs) -> None:
        """Write the pass's queries into the ring of the newest ones; see `ScoringOps`."""
        native.push_queries(queries, query_positions, inputs.queries, inputs.query_positions)


class PrefillOps(TorchOps):
    """Attention of many tokens in bfloat16: one kernel that needs no mask."""

    def attention(self, view: KVView, call: AttentionCall, keys: Tensor, values: Tensor, layout: PassLayout) -> Tensor:
        """Attend from call.query to keys and values [B, H, C + m, D]: [B, Hq, T, D]."""
        window, bias, query_positions, key_positions = view.spec.window, None, None, None
        if window is not None or view.config.residual:
            bias = layout.slot_bias(view, call)
        if window is not None:
            query_positions, key_positions = layout.query_and_key_positions(view, call)
        return native.prefill_attention(
            call.query,
            keys,
            values,
            view.base,
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
            window=window,
            bias=bias,
            query_position=query_positions,
            slot_position=key_positions,
        )

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
        return native.attention_mass(queries, keys, bias, query_positions, positions, spec.scale, spec.softcap, sinks)


class CPUBackend(TorchBackend):
    """Kernels and compiled layers for a model on the CPU.

    Args:
        num_layers: decoder layers of the model.
        automatic: whether kernels are built and layers compiled once that pays, without `start`.
        num_draft_tokens: tokens of a speculative pass behind the first.
    """

    max_decode_tokens = native.MAX_ROWS
    max_decode_rows = native.MAX_ROWS
    fastest_step: DecodeStep = "compiled"

    def __init__(self, model: PreTrainedModel, num_layers: int, automatic: bool, num_draft_tokens: int) -> None:
        super().__init__()
        self.has_decode_kernels = False
        self.has_prefill_kernels = False
        self.patches = ForwardPatches()
        self._model = model
        self._prefill_left = BUILD_PREFILL_AFTER if automatic else None
        self._prefill_tried = False
        self._build_seconds = 0.0
        self._covers_model = False
        self._threads = PassThreads()
        self._decode_ops, self._prefill_ops = DecodeOps(), PrefillOps()
        if product_dtype(model.dtype) != model.dtype:
            self.torch_ops = Float32Ops()
            for module in [module for module in model.modules() if type(module) is nn.Linear and is_matrix(module)]:
                self.patches.replace(module, Float32Linear(module))
        self.compiled = CompiledSteps(model, num_layers, num_draft_tokens, self._load_decode)
        if automatic:
            self.compiled.watch()

    @staticmethod
    def serves(model: PreTrainedModel) -> bool:
        """Return whether a model runs on the CPU."""
        return input_device(model).type == "cpu"

    @property
    def batch_invariant(self) -> bool:
        """Whether all matrices run through the kernels, which compute each row as if it were alone."""
        return self._covers_model

    @property
    def seconds(self) -> float:
        """Seconds spent on building kernels and compiling layers."""
        return self._build_seconds + self.compiled.seconds

    # -- per pass ----------------------------------------------------------------------------------------------------

    def ops(self, layer: LayerCache, call: AttentionCall, layout: PassLayout) -> AttentionOps:
        """Choose kernels for the pass's dtype and number of tokens, PyTorch where none takes it."""
        tensors = (call.query, call.key, call.value)
        all_or_none = layout.valid is None or layout.num_new == 1
        only_new = call.query.shape[2] == layout.num_new and all_or_none
        if only_new and self.has_decode_kernels and layer.has_room(layout.num_new) and native.can_decode(*tensors):
            return self._decode_ops
        if self.has_prefill_kernels and native.can_prefill(*tensors):
            return self._prefill_ops
        return self.torch_ops

    def on_pass(self, num_tokens: int) -> None:
        """Count a pass, and build or compile what has come to pay."""
        if self._prefill_left is not None and num_tokens > native.MAX_ROWS:
            self._prefill_left -= num_tokens
            if self._prefill_left <= 0 or native.is_built(native.PREFILL_SOURCES):
                self.warm_up()
        self.compiled.on_step(num_tokens)

    def running(self, most_threads: int) -> AbstractContextManager[None]:
        """Run a pass on as many threads as there are cores for; see `AttentionBackend`."""
        return self._threads.running(most_threads)

    def release_threads(self) -> None:
        """End the idle threads of the calling thread; see `AttentionBackend`."""
        self._threads.release()

    def thread_choice(self) -> tuple[int, str]:
        """Return how many threads a pass uses, and why; see `AttentionBackend`."""
        return self._threads.choice()

    # -- building ----------------------------------------------------------------------------------------------------

    @property
    def pending_build(self) -> bool:
        """Whether the prefill kernels will be loaded sooner or later, but are not yet."""
        return self._prefill_left is not None and self._fits_prefill

    def warm_up(self) -> None:
        """Load the prefill kernels now, where they would be later."""
        if self._prefill_left is not None:
            self._prefill_left = None
            self._load_prefill()

    def start(self) -> None:
        """Load all kernels and compiled steps, made first if need be; `disabled_reason` says what does not work."""
        if self.compiled.enabled or self.disabled_reason is not None:
            return
        self._load_prefill()
        if self._load_decode():
            self.compiled.start()
        else:
            self.compiled.disable(UnsupportedModelError("Compiled steps need the C++ kernels."))

    @property
    def disabled_reason(self) -> str | None:
        """Why layers are not compiled; None where nothing is wrong."""
        return self.compiled.disabled_reason

    @property
    def decode_step(self) -> DecodeStep:
        """How decode steps run now: through a package once there is one."""
        return "compiled" if self.compiled.enabled else "eager"

    @property
    def steps_until_start(self) -> int | None:
        """Decode steps after which a package is made of its own accord; None: never, or that has been tried."""
        return self.compiled.steps_left

    def close(self) -> None:
        """Give every module its own forward back."""
        self.compiled.close()
        self.patches.restore()

    @property
    def _fits_prefill(self) -> bool:
        return self._model.dtype == torch.bfloat16

    def _load_decode(self) -> bool:
        """Load the decode kernels and let the matrices use them; models that cannot be compiled gain too."""
        if not self.has_decode_kernels and self._build(native.DECODE_SOURCES, "Decoding"):
            matrices = [module for module in self._model.modules() if is_matrix(module)]
            for module in matrices:
                self.patches.replace(module, GemvLinear(module))
            self.has_decode_kernels = True
            self._covers_model = covers_model(matrices, self._model)
        return self.has_decode_kernels

    def _load_prefill(self) -> None:
        """Load the prefill kernels, where the model's dtype is one for them."""
        if self._prefill_tried or not self._fits_prefill:
            return
        self._prefill_tried = True
        if not self._build(native.PREFILL_SOURCES, "Prefill"):
            return
        self.has_prefill_kernels = native.has_bf16_products()
        if native.has_int8_products():
            packed = [module for module in self._model.modules() if isinstance(module, Int4Linear | Int8Linear)]
            for module in packed:
                self.patches.replace(module, GemmLinear(module))

    def _build(self, parts: Sequence[str], what: str) -> bool:
        """Build or load kernels; where that does not work, log it."""
        started = time.perf_counter()
        try:
            native.build(parts)
        except UnsupportedModelError as error:
            log.warning("%s goes on without kernels of its own: %s", what, error)
            return False
        self._build_seconds += time.perf_counter() - started
        return True
