"""Decode steps through decoder layers that TorchInductor has compiled.

A layer is traced with its weights as inputs and attention as one opaque operator. Layers with the same graph share the
compiled code, usually one for the whole model; attention, cache and compression stay what they are. Everything else,
such as prefill, runs the layers as transformers wrote them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from zsmerge_llm.attention.call import AttentionCall, AttentionHandler
from zsmerge_llm.attention.passes import ForwardPass
from zsmerge_llm.cpu.decoder_layers import decoder_layers, flatten_call, is_tensor_tuple, named_weights
from zsmerge_llm.cpu.patches import ForwardPatches
from zsmerge_llm.errors import UnsupportedModelError
from zsmerge_llm.gpu.compiler import Compiled

log = logging.getLogger(__name__)

PassShape = tuple[int, int]
"""Rows and tokens of a decode step."""

_CURRENT: ContextVar[tuple[ForwardPass, int]] = ContextVar("zsmerge_current")  # the pass and layer that attends now
COMPILER = Lock()
"""Held while something is compiled: TorchInductor is not made for several threads."""

torch.library.define(
    "zsmerge::attend",
    "(Tensor query, Tensor key, Tensor value, float scaling, float? softcap, Tensor? sinks) -> Tensor",
)


@torch.library.impl("zsmerge::attend", "default")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    step, layer = _CURRENT.get()
    return step.attend(AttentionCall(layer, query, key, value, scaling, None, softcap, sinks)).contiguous()


@torch.library.register_fake("zsmerge::attend")
def _attend_shape(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


class _OpaqueAttention(AttentionHandler):
    """Attention while a layer is traced: one operator, whatever is behind it."""

    def attend(self, call: AttentionCall) -> Tensor:
        attend: Any = torch.ops.zsmerge.attend
        return attend(call.query, call.key, call.value, call.scaling, call.softcap, call.sinks)


class CompiledLayers:
    """The compiled decoder layers of one model. A layer is compiled when it first decodes after `start`.

    A model that cannot be compiled goes on as it was, and `disabled_reason` says why.

    Args:
        num_layers: how many decoder layers the model has.
        shapes: rows and tokens of the passes that are compiled.
        compiler: compiles a traced graph.

    Attributes:
        graphs: the compiled code, by the text of its graph.
        seconds: spent on compiling.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_layers: int,
        shapes: Sequence[PassShape],
        compiler: Callable[[GraphModule, Sequence[Tensor]], Compiled],
    ) -> None:
        self.disabled_reason: str | None = None
        self.seconds = 0.0
        self.graphs: dict[str, Compiled] = {}
        self.compiler = compiler
        self.patches = ForwardPatches()
        self._shapes = frozenset(shapes)
        self._model = model
        self._num_layers = num_layers

    @property
    def enabled(self) -> bool:
        """Whether decode steps go through compiled layers."""
        return len(self.patches) > 0

    def start(self) -> None:
        """Compile from now on. Where that is known not to work, `disabled_reason` says why."""
        if self.enabled or self.disabled_reason is not None:
            return
        try:
            layers = decoder_layers(self._model, self._num_layers)
        except UnsupportedModelError as error:
            self.disable(error)
            return
        for index, layer in enumerate(layers):
            self.patches.replace(layer, CompiledLayer(self, layer, index))

    def disable(self, why: Exception) -> None:
        """Run every layer as transformers wrote it, and log why once."""
        self.disabled_reason = f"{type(why).__name__}: {why}"
        self.patches.restore()
        log.warning("Decoding goes on without compiled layers: %s", self.disabled_reason)

    def close(self) -> None:
        """Give every layer its own forward back."""
        self.patches.restore()

    def compile(self, graph: GraphModule, inputs: Sequence[Tensor]) -> Compiled:
        """Return the code for a graph, compiled once however many layers have it with weights of the same shapes."""
        constants = [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
        shapes = [(*each.shape, *each.stride(), each.dtype, each.device) for each in inputs]
        key = "\n".join([graph.code, str(shapes), *(str(each.tolist()) for each in constants)])
        if key not in self.graphs:
            self.graphs[key] = self.compiler(graph, inputs)
        return self.graphs[key]

    def shape_of(self, step: ForwardPass) -> PassShape | None:
        """Return the compiled shape that serves a pass; None for one that runs as transformers wrote it."""
        rows, tokens = step.layout.positions.shape
        serves = (rows == 1 or step.layout.static) and (rows, tokens) in self._shapes
        return (rows, tokens) if serves else None


@dataclass(frozen=True)
class Code:
    """The compiled code of a layer for passes of one shape; the constants it was made for; the form of its result."""

    run: Compiled
    constants: list[Any]
    form: pytree.TreeSpec


class CompiledLayer:
    """Stands in for the forward of one decoder layer."""

    def __init__(self, layers: CompiledLayers, layer: nn.Module, index: int) -> None:
        self.layers = layers
        self.layer = layer
        self.index = index
        named = named_weights(layer)
        self.names, self.weights = list(named), list(named.values())
        self.eager = layer.forward
        self.codes: dict[PassShape, Code] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass: compiled if it is a decode step of one or a few conversations, else as the model has it."""
        step = next((value for value in kwargs.values() if isinstance(value, ForwardPass)), None)
        shape = None if step is None else self.layers.shape_of(step)
        if step is None or shape is None:
            return self.eager(*args, **kwargs)
        tensors, constants = flatten_call((*args, *kwargs.values()))
        code = self._code(shape, args, kwargs, tensors, constants)
        if code is None or constants != code.constants:
            return self.eager(*args, **kwargs)
        current = _CURRENT.set((step, self.index))
        try:
            outputs = code.run(*tensors, *self.weights)
        finally:
            _CURRENT.reset(current)  # it would keep the step's cache alive
        return pytree.tree_unflatten(list(outputs), code.form)

    def _code(
        self,
        shape: PassShape,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        constants: list[Any],
    ) -> Code | None:
        """Return the layer's code for passes of a shape, compiled the first time; None where that fails."""
        if shape not in self.codes:
            try:
                self.codes[shape] = self._compile(args, kwargs, tensors, constants)
            except Exception as error:  # whatever a compiler throws, the model works without it
                self.layers.disable(error)
        return self.codes.get(shape)

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], rest: list[Any]) -> Code:
        """Trace the layer and find its compiled code."""
        form: list[pytree.TreeSpec] = []
        strange = [type(value).__name__ for value in rest if not isinstance(value, (bool, int, float, str, type(None)))]
        if strange:
            raise UnsupportedModelError(f"{type(self.layer).__name__} is given a {strange[0]} in each pass.")

        def run(*inputs: Tensor) -> list[Tensor]:
            given, weights = iter(inputs), inputs[len(tensors) :]
            positional = tuple(_refill(value, given) for value in args)
            named = {name: _refill(value, given) for name, value in kwargs.items()}
            own = dict(zip(self.names, weights, strict=True))
            made, spec = pytree.tree_flatten(torch.func.functional_call(self.layer, own, positional, named))
            form.append(spec)
            return made

        inputs, started = [*tensors, *self.weights], time.perf_counter()
        with self.layers.patches.suspended(self.layer), COMPILER:
            graph = make_fx(run, tracing_mode="fake")(*inputs)
            compiled = self.layers.compile(graph, inputs)
        self.layers.seconds += time.perf_counter() - started
        return Code(compiled, rest, form[-1])


def _refill(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return `value` with other tensors where `flatten_call` took them from, and opaque attention for the pass."""
    if isinstance(value, Tensor):
        return next(tensors)
    if is_tensor_tuple(value):
        return tuple(next(tensors) for _ in value)
    return _OpaqueAttention() if isinstance(value, ForwardPass) else value
