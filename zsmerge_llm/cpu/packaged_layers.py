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

log = logging.getLogger(__name__)

TOKENS_BEFORE_CHECK = 16
"""Tokens that are read before the step which is compared.

Random keys and values would do less: no token has such, and what low-bit weights round away in them grows from layer to
layer until a right step looks wrong (docs/research/kernels).
"""
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
        try:
            expected, found = self._both_logits(step, packaged)
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

    def _both_logits(self, step: ForwardPass, packaged: PackagedStep) -> tuple[Tensor, Tensor]:
        """Run a step of random tokens by the layers themselves and by the package: float32 [rows, tokens, vocab]."""
        rows, tokens = min(packaged.form.rows, 2), packaged.form.tokens
        vocab = self._model.config.get_text_config().vocab_size
        shape = (rows, TOKENS_BEFORE_CHECK + tokens)
        ids = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0))
        before, new = ids.split([TOKENS_BEFORE_CHECK, tokens], dim=1)
        self._eager = True
        cache = Cache(CacheConfig.full(), step.cache.specs, rows)
        for layer in cache.layers:
            layer.grow_to(shape[1])  # a step that has no room is not the package's
        self._run(cache, before, 0, step.backend)
        expected = self._run(cache.clone(), new, TOKENS_BEFORE_CHECK, step.backend)
        self._eager, packaged.trusted = False, True
        return expected, self._run(cache, new, TOKENS_BEFORE_CHECK, step.backend)

    def _run(self, cache: Cache, ids: Tensor, start: int, backend: AttentionBackend) -> Tensor:
        """Let a cache take in tokens that stand at `start`: logits float32 [B, T, vocab]."""
        rows, tokens = ids.shape
        positions = (start + torch.arange(tokens)).repeat(rows, 1)
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
