"""Decoder layers that run through a package of compiled steps, once a step of it has agreed with the model's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zsmerge_llm.attention.backend import AttentionBackend
from zsmerge_llm.attention.interface import forward
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.attention.passes import ForwardPass
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.cpu.decoder_layers import flatten_call
from zsmerge_llm.cpu.packaged_step import PackagedStep
from zsmerge_llm.cpu.patches import ForwardPatches
from zsmerge_llm.cpu.step_capture import FormName
from zsmerge_llm.cpu.step_package import Manifest
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.slots import LayerSpec

log = logging.getLogger(__name__)

SLOTS_OF_CHECK = 8
"""Slots that the step which is compared attends to, filled with random keys and values."""
TOLERANCE = {torch.float32: 2e-2, torch.float16: 0.1, torch.bfloat16: 0.2}
"""By how much logits may differ, relative to their norm: rounding apart, they are the same (docs/research/kernels)."""


class PackagedLayers:
    """The layers of one model, with stand-ins that run the steps a package has.

    Args:
        on_mismatch: called with the reason where a step of the package does not agree with the model's own.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], on_mismatch: Callable[[str], None]) -> None:
        self.steps: dict[FormName, PackagedStep] = {}
        self._model = model
        self._layers = layers
        self._on_mismatch = on_mismatch
        self._patches = ForwardPatches()
        self._eager = False  # while a step of the model's own runs to be compared

    @property
    def enabled(self) -> bool:
        """Whether steps go through a package."""
        return len(self._patches) > 0

    def install(self, folder: Path, manifest: Manifest) -> None:
        """Run steps through a package that has been read from `folder`.

        Raises:
            PackageError, RuntimeError: it cannot be loaded.
        """
        steps = [PackagedStep(folder, manifest, form, self._layers) for form in manifest.forms]
        self.steps = {step.form.name: step for step in steps}
        for index, layer in enumerate(self._layers):
            self._patches.replace(layer, _PackagedLayer(self, layer, index))

    def remove(self) -> None:
        """Give every layer its own forward back."""
        self._patches.restore()
        self.steps.clear()

    def running(self, step: ForwardPass, index: int) -> PackagedStep | None:
        """Return what runs a layer in this pass; None: the layer itself. Decided at the first layer."""
        if self._eager:
            return None
        rows, tokens = step.layout.positions.shape
        packaged = self.steps.get("batch" if rows > 1 else "single" if tokens == 1 else "draft")
        if packaged is None or step.layout.static:
            return None
        if index == 0:
            packaged.leave()
            if packaged.serves(step) and (packaged.trusted or self._agrees(packaged, step)):
                packaged.begin(step)
        return packaged if packaged.runs(step) else None

    def _agrees(self, packaged: PackagedStep, step: ForwardPass) -> bool:
        """Compare a step of the package with one of the layers themselves, and remember that they agree."""
        rows, tokens = min(packaged.form.rows, 2), packaged.form.tokens
        try:
            self._eager = True
            expected = self._logits(step.cache.specs, step.backend, rows, tokens)
            self._eager, packaged.trusted = False, True
            found = self._logits(step.cache.specs, step.backend, rows, tokens)
            difference = float((found - expected).norm() / expected.norm())
            packaged.trusted = difference <= TOLERANCE[step.cache.specs[0].dtype]
            reason = f"logits of its {packaged.form.name} step are off by {difference:.2g} of their norm"
        except RuntimeError as error:  # of native code
            packaged.trusted, reason = False, f"its {packaged.form.name} step failed: {str(error).splitlines()[0]}"
        finally:
            self._eager = False
        if not packaged.trusted:
            self._on_mismatch(reason)
        return packaged.trusted

    def _logits(self, specs: Sequence[LayerSpec], backend: AttentionBackend, rows: int, tokens: int) -> Tensor:
        """Run a step behind random slots: float32 [rows, tokens, vocab]."""
        generator = torch.Generator().manual_seed(0)
        cache = Cache(CacheConfig.full(), specs, rows)
        for layer in cache.layers:
            layer.grow_to(SLOTS_OF_CHECK + tokens)
            for name in ("keys", "values"):
                slots = getattr(layer, name)[:, :, :SLOTS_OF_CHECK]
                slots.copy_(torch.randn(slots.shape, generator=generator))
            layer.multiplicity[:, :, :SLOTS_OF_CHECK] = 1
            layer.position[:, :, :SLOTS_OF_CHECK] = torch.arange(SLOTS_OF_CHECK, dtype=torch.int32)
            layer.set_filled([SLOTS_OF_CHECK] * rows, torch.full((rows,), SLOTS_OF_CHECK))
        positions = (SLOTS_OF_CHECK + torch.arange(tokens)).repeat(rows, 1)
        vocab = self._model.config.get_text_config().vocab_size
        ids = torch.randint(vocab, (rows, tokens), generator=generator)
        layout = PassLayout(tokens, positions, None, [tokens] * rows, positions[:, -1] + 1)
        handler = ForwardPass(cache, layout, backend)
        return forward(self._model, handler, input_ids=ids, position_ids=positions).float()


class _PackagedLayer:
    """Stands in for the forward of one decoder layer."""

    def __init__(self, layers: PackagedLayers, layer: nn.Module, index: int) -> None:
        self._layers = layers
        self._index = index
        self._own = layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass: through the package if it is a step that it has, else as the model has it."""
        step = next((value for value in kwargs.values() if isinstance(value, ForwardPass)), None)
        packaged = None if step is None else self._layers.running(step, self._index)
        if step is None or packaged is None:
            return self._own(*args, **kwargs)
        output: Any = args[0] if args else next(iter(kwargs.values()))
        if packaged.needs(self._index):
            output = packaged.go_on(step, self._index, flatten_call((*args, *kwargs.values()))[0])
        if output is None:
            packaged.leave()
            return self._own(*args, **kwargs)
        return output if packaged.num_results is None else (output, *[None] * (packaged.num_results - 1))
