"""Decode steps through decoder layers that TorchInductor has compiled.

A layer is traced with its weights as inputs and attention as one opaque operator. Layers with the same graph share the
compiled code, usually one for the whole model; attention, cache and compression stay what they are. Everything else,
such as prefill, runs the layers as transformers wrote them. Works on any device; on a CPU the compiled steps may also
be recorded (`step_recorder`).
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
from zsmerge_llm.cpu.patches import ForwardPatches
from zsmerge_llm.cpu.step_recorder import StepRecorder
from zsmerge_llm.errors import UnsupportedModelError

log = logging.getLogger(__name__)

OPTIONS = {
    "size_asserts": False,
    "allow_buffer_reuse": False,
    "inplace_buffers": False,
    "cpp.min_chunk_size": 1 << 20,
}
"""TorchInductor's. The inputs of attention stay as they are until later layers have run: the cache may need them.
Loops over a step's few values run on one thread: others would have their number written into the code."""

PassShape = tuple[int, int]
"""Rows and tokens of a decode step."""

_CURRENT: ContextVar[tuple[ForwardPass, int]] = ContextVar("zsmerge_current")  # the pass and layer that attends now
COMPILER = Lock()
"""Held while something is compiled: TorchInductor is not made for several threads."""

COMPILE_AFTER = 512
"""Decode steps before layers are compiled of their own accord: as long as compiling takes (docs/research/kernels)."""

Compiled = Callable[..., Sequence[Tensor]]

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
        automatic: whether they are compiled once that pays (`is_due`), not only by `start`.

    Attributes:
        recorders: by shape, what records compiled steps and repeats them; a shape without one takes one row.
        optimize: changes a traced graph before it is compiled. compiler: compiles it.
        graphs: the compiled code, by the text of its graph.
        seconds: spent on compiling.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_layers: int,
        shapes: Sequence[PassShape],
        automatic: bool = False,
    ) -> None:
        self.disabled_reason: str | None = None
        self.seconds = 0.0
        self.graphs: dict[str, Compiled] = {}
        self.recorders: dict[PassShape, StepRecorder] = {}
        self.optimize: Callable[[GraphModule], None] | None = None
        self.compiler: Callable[[GraphModule, Sequence[Tensor]], Compiled] = compile_graph
        self.patches = ForwardPatches()
        self._shapes = frozenset(shapes)
        self._steps_left = COMPILE_AFTER if automatic else None
        self._model = model
        self._num_layers = num_layers

    @property
    def enabled(self) -> bool:
        """Whether decode steps go through compiled layers."""
        return len(self.patches) > 0

    @property
    def steps_left(self) -> int | None:
        """Decode steps after which layers are compiled of their own accord; None: never, or that has been tried."""
        return None if self.enabled or self.disabled_reason is not None else self._steps_left

    def is_due(self, num_tokens: int) -> bool:
        """Count a pass of so many tokens; return True once, when compiling has come to pay."""
        if self._steps_left is None or all(num_tokens != tokens for rows, tokens in self._shapes if rows == 1):
            return False
        self._steps_left -= 1
        if self._steps_left:
            return False
        self._steps_left = None
        log.info("Compiling the decoder layers, which takes some seconds.")
        return True

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
        """Return the compiled shape that serves a pass; None for one that runs as transformers wrote it.

        One row has a shape of its own. Several rows share one that is recorded for more rows than it needs.
        """
        rows, tokens = step.layout.positions.shape
        if rows == 1:
            return (1, tokens) if (1, tokens) in self._shapes else None
        if step.layout.static:
            return (rows, tokens) if (rows, tokens) in self._shapes else None
        if not tokens == 1 == step.layout.num_new:
            return None
        for shape, recorder in self.recorders.items():
            if shape[0] > 1 and recorder.disabled_reason is None and (recorder.ready or rows <= recorder.rows):
                return shape
        return None


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor]) -> Compiled:
    """Return the compiled code of a graph."""
    return torch._inductor.compile(graph, list(inputs), options=OPTIONS)


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
        named = [*layer.named_parameters(), *layer.named_buffers()]
        self.names = [name for name, _ in named]
        self.weights = [weight for _, weight in named]
        self.eager = layer.forward
        self.codes: dict[PassShape, Code] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass: compiled if it is a decode step of one or a few conversations, else as the model has it."""
        step = next((value for value in kwargs.values() if isinstance(value, ForwardPass)), None)
        shape = None if step is None else self.layers.shape_of(step)
        if step is None or shape is None:
            return self.eager(*args, **kwargs)
        recorder = self.layers.recorders.get(shape)
        if recorder is not None and recorder.runs(step, self.index):
            output = args[0]
            if recorder.needs(self.index):
                output = recorder.go_on(step, self.index, _flat((*args, *kwargs.values()))[0])
            return pytree.tree_unflatten([output], self.codes[shape].form)
        tensors, constants = _flat((*args, *kwargs.values()))
        code = self._code(shape, step, args, kwargs, tensors, constants)
        if code is None or constants != code.constants:
            return self.eager(*args, **kwargs)
        outputs = self._run(code, shape, step, recorder if args and args[0] is tensors[0] else None, tensors)
        return self.eager(*args, **kwargs) if outputs is None else pytree.tree_unflatten(list(outputs), code.form)

    def _run(
        self, code: Code, shape: PassShape, step: ForwardPass, recorder: StepRecorder | None, tensors: list[Tensor]
    ) -> Sequence[Tensor] | None:
        """Run compiled code, recording it where possible. None where several rows cannot be recorded."""
        current = _CURRENT.set((step, self.index))
        try:
            outputs = None
            if recorder is not None:
                outputs = recorder.record(step, self.index, code.run, tensors, self.weights)
            runs = outputs is None and (recorder is None or shape[0] == 1)
            return code.run(*tensors, *self.weights) if runs else outputs
        finally:
            _CURRENT.reset(current)  # it would keep the step's cache alive

    def _code(
        self,
        shape: PassShape,
        step: ForwardPass,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        constants: list[Any],
    ) -> Code | None:
        """Return the layer's code for passes of a shape, compiled the first time; None where that fails."""
        if shape not in self.codes:
            recorder = self.layers.recorders.get(shape)
            try:
                example = tensors if recorder is None else [recorder.padded(step, each) for each in tensors]
                self.codes[shape] = self._compile(args, kwargs, example, constants)
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
            if self.layers.optimize is not None:
                self.layers.optimize(graph)
            compiled = self.layers.compile(graph, inputs)
        self.layers.seconds += time.perf_counter() - started
        return Code(compiled, rest, form[-1])


def _flat(values: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """Return the tensors among a call's values, those in tuples included, and the other values but the pass."""
    tensors: list[Tensor] = []
    rest: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif _is_tensors(value):
            tensors.extend(value)
        elif not isinstance(value, ForwardPass):
            rest.append(value)
    return tensors, rest


def _refill(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return `value` with other tensors where `_flat` took them from, and opaque attention for the pass."""
    if isinstance(value, Tensor):
        return next(tensors)
    if _is_tensors(value):
        return tuple(next(tensors) for _ in value)
    return _OpaqueAttention() if isinstance(value, ForwardPass) else value


def _is_tensors(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(each, Tensor) for each in value)


def decoder_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """Return the model's decoder layers, in order.

    Raises:
        UnsupportedModelError: layers that cannot be told, or whose weights are not all plain tensors in their place.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    stacks = [stack for stack in stacks if all(_attends(layer) for layer in stack)]
    if len(stacks) != 1:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of its {count} decoder layers.")
    layers = list(stacks[0])
    for layer in layers:
        if any(hasattr(module, "_hf_hook") for module in layer.modules()):
            raise UnsupportedModelError("Layers that accelerate moves between devices are not compiled.")
        if any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules() if module is not layer):
            raise UnsupportedModelError("Layers with forward hooks are not compiled.")
        kinds = {type(weight) for weight in (*layer.parameters(), *layer.buffers())} - {nn.Parameter, Tensor}
        if kinds:
            raise UnsupportedModelError(f"Weights of type {kinds.pop().__name__} are not compiled.")
    return layers


def _attends(layer: nn.Module) -> bool:
    return sum(hasattr(module, "layer_idx") for module in layer.children()) == 1
