"""Run the decoder layers of a model through a package: one native call a step, without Python between the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from zsmerge_llm.attention.call import AttentionCall
from zsmerge_llm.attention.passes import ForwardPass, SpeculativePass
from zsmerge_llm.cpu import native
from zsmerge_llm.cpu.decoder_layers import named_weights
from zsmerge_llm.cpu.step_capture import HIDDEN
from zsmerge_llm.cpu.step_package import Manifest, PackagedForm, TensorShape, file_name
from zsmerge_llm.errors import PackageError
from zsmerge_llm.kvcache.eviction import only_records, records_queries
from zsmerge_llm.kvcache.layer_cache import QUERY_STATE, LayerCache
from zsmerge_llm.kvcache.slots import PER_SLOT

STATE = (*PER_SLOT, *QUERY_STATE)
"""The tensors of a layer's cache that native code is given, in its order."""


class PackagedStep:
    """The steps of one form.

    A layer may have inputs that no layer before it has; those layers begin a stretch, and all up to the next one that
    does run in one call. Layers inside a stretch have nothing left to do when the model calls them.

    Args:
        packaged: what the package says of this form. layers: the model's.

    Attributes:
        trusted: whether a step of it has been compared with the model's own.

    Raises:
        PackageError: the package does not fit the layers' weights.
    """

    def __init__(self, folder: Path, manifest: Manifest, packaged: PackagedForm, layers: Sequence[nn.Module]) -> None:
        self.form = packaged.form
        self.num_results = packaged.num_results
        self.trusted = False
        self._shapes = packaged.inputs
        self._sources = packaged.sources
        self._native = torch.classes.zsmerge.PackagedStep()
        for kind in range(max(manifest.kinds) + 1):
            self._native.add_package(str(folder / file_name(self.form.name, kind)))
        for kind, sources, layer in zip(manifest.kinds, packaged.sources, layers, strict=True):
            weights = list(named_weights(layer).values())
            shapes = packaged.weights[kind]
            if len(weights) != len(shapes) or not all(map(TensorShape.fits, shapes, weights)):
                raise PackageError("The package is for weights of other shapes.")
            self._native.add_layer(kind, sources, weights)
        self._first_uses = _first_uses(packaged.sources)
        self._step: ReferenceType[ForwardPass] | None = None  # that runs; weak, so that its cache can go
        self._inputs: list[Tensor] = []  # of the step so far

    def serves(self, step: ForwardPass) -> bool:
        """Return whether the package runs a pass."""
        fits = type(step) in (ForwardPass, SpeculativePass) and step.layout.num_new == self.form.tokens
        return fits and all(layer.has_room(self.form.tokens) for layer in step.cache.layers)

    def begin(self, step: ForwardPass) -> None:
        """Let the package run a pass from its first layer on."""
        self._step, self._inputs = ref(step), []

    def leave(self) -> None:
        """Let the layers run the rest of the pass themselves."""
        self._step, self._inputs = None, []

    def runs(self, step: ForwardPass) -> bool:
        """Return whether the package runs this pass."""
        return self._step is not None and self._step() is step

    def needs(self, index: int) -> bool:
        """Return whether a layer begins a stretch."""
        return bool(self._first_uses[index])

    def go_on(self, step: ForwardPass, index: int, tensors: Sequence[Tensor]) -> Tensor | None:
        """Run a stretch of layers; return the output of its last one, or None where the layer's inputs do not fit.

        More rows than native code takes go one group after another.
        """
        if not self._take(index, tensors, len(step.layout.num_new_tokens)):
            return None
        count = len(self._sources)
        last = next((each for each in range(index + 1, count) if self.needs(each)), count)
        layers = step.cache.layers[index:last]
        plain = [type(step) is ForwardPass and only_records(layer, self.form.tokens) for layer in layers]
        hidden = next((t for t, source in zip(tensors, self._sources[index], strict=True) if source == HIDDEN), None)
        groups = _groups(len(step.layout.num_new_tokens))
        parts = [self._run(step, index, layers, plain, hidden, rows) for rows in groups]
        kept = [iter(part[1:]) for part in parts]
        for at, layer in enumerate(layers):
            if plain[at]:
                layer.count(step.layout.num_new_tokens, step.layout.on(layer.spec.device)["counts"])
                continue
            query, key, value = (_joined([next(part) for part in kept]) for _ in range(3))
            sinks, spec = [next(part) for part in kept][-1], layer.spec
            call = AttentionCall(index + at, query, key, value, spec.scale, spec.window, spec.softcap, None)
            step.after_attention(replace(call, sinks=sinks) if len(sinks) else call)
        if last == count:
            self._inputs = []
        return _joined([part[0] for part in parts])

    def _take(self, index: int, tensors: Sequence[Tensor], rows: int) -> bool:
        """Take the inputs that a layer is the first to have; return whether the package may be given them."""
        if len(tensors) != len(self._sources[index]):
            return False
        for place in self._first_uses[index]:
            tensor, shape = tensors[place], self._shapes[self._sources[index][place]]
            if not shape.fits(tensor) or (shape.rows and len(tensor) != rows):
                return False
            self._inputs.append(tensor)
        return True

    def _run(
        self,
        step: ForwardPass,
        index: int,
        layers: Sequence[LayerCache],
        plain: Sequence[bool],
        hidden: Tensor | None,
        rows: slice,
    ) -> list[Tensor]:
        """Run layers for some rows: the last output, then query, key, value and sinks of those not plain."""
        layout = step.layout
        whole = rows.stop - rows.start == len(layout.num_new_tokens)
        inputs, state = self._inputs, [getattr(layer, name) for layer in layers for name in STATE]
        if not whole:
            shapes = self._shapes[: len(inputs)]
            inputs = [each[rows] if shape.rows else each for each, shape in zip(inputs, shapes, strict=True)]
            state = [each[rows] for each in state]
            hidden = None if hidden is None else hidden[rows]
        outputs: list[Tensor] = self._native.run(
            index,
            inputs[0] if hidden is None else hidden,
            inputs,
            state,
            [filled for layer in layers for filled in layer.num_filled[rows]],
            [layer.config.alpha for layer in layers],
            [layer.spec.window or 0 for layer in layers],
            [int(is_plain and records_queries(layer)) for layer, is_plain in zip(layers, plain, strict=True)],
            [int(not is_plain) for is_plain in plain],
            [int(new > 0) for new in layout.num_new_tokens[rows]],
            layout.on(layers[0].spec.device)["new_positions"][rows],
        )
        return outputs


def _first_uses(sources: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return for each layer the places of the inputs that no layer before it has."""
    known: set[int] = {HIDDEN}
    places = []
    for layer in sources:
        new = [place for place, source in enumerate(layer) if source not in known and source not in layer[:place]]
        places.append(new)
        known.update(layer)
    return places


def _groups(rows: int) -> list[slice]:
    """Split rows into as few groups of nearly equal size as native code takes: never one row beside others."""
    count = -(-rows // native.MAX_ROWS)
    ends = [rows * each // count for each in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
