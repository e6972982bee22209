"""Decode steps of one conversation through decoder layers that TorchInductor has fused.

A layer is traced with its weights as inputs and attention as one opaque operator. Layers with the same graph share the
compiled code, usually one for the whole model, and attention, cache and compression stay what they are. Everything
else, such as reading or several conversations in one pass, runs the layers as transformers wrote them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from zsmerge_llm.attention.interface import AttentionCall, AttentionHandler, ForwardPass
from zsmerge_llm.cpu import native as kernels
from zsmerge_llm.cpu.graph_passes import fuse_gemvs
from zsmerge_llm.cpu.quantized_linear import Int4Linear, Int8Linear
from zsmerge_llm.cpu.step_recorder import StepRecorder
from zsmerge_llm.engine.prompt_lookup import AHEAD
from zsmerge_llm.errors import UnsupportedModelError

log = logging.getLogger(__name__)

OPTIONS = {"size_asserts": False, "allow_buffer_reuse": False, "inplace_buffers": False}
"""What attention was given stays as it is until the layers after it have run, when the cache may still need it."""
WIDTHS = (1, 1 + AHEAD)
"""Tokens of the passes that are compiled: one, and one with a whole guess behind it."""

READ_AFTER = 16_384
"""Tokens read before the kernels of reading are built of their own accord, which takes 10 s once on a machine."""

SHAPES = (*((1, width) for width in WIDTHS), (kernels.MAX_ROWS, 1))
"""Rows and tokens of the passes that are compiled. Several rows, up to so many, only where they can be recorded too."""

_HERE: ContextVar[tuple[ForwardPass, int]] = ContextVar(
    "zsmerge_here"
)  # where the running layer attends: its step and number
_COMPILER = Lock()  # TorchInductor is not made for several threads

Compiled = Callable[..., Sequence[Tensor]]

torch.library.define(
    "zsmerge::attend",
    "(Tensor query, Tensor key, Tensor value, float scaling, float? softcap, Tensor? sinks) -> Tensor",
)


@torch.library.impl("zsmerge::attend", "default")
def _attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    step, layer = _HERE.get()
    return step.attend(AttentionCall(layer, query, key, value, scaling, None, softcap, sinks)).contiguous()


@torch.library.register_fake("zsmerge::attend")
def _shape(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


class _Opaque(AttentionHandler):
    """Attention while a layer is traced: one operator, whatever is behind it."""

    def attend(self, call: AttentionCall) -> Tensor:
        attend: Any = torch.ops.zsmerge.attend
        return attend(call.query, call.key, call.value, call.scaling, call.softcap, call.sinks)


class CompiledLayers:
    """The compiled layers of one model. Off until `start`; a layer is compiled when it first decodes after that.

    A model that cannot be compiled goes on as it was, and `trouble` says why.

    Args:
        layers: how many the model has.
        after: decode steps before it starts by itself; None: never.
    """

    def __init__(self, model: PreTrainedModel, layers: int, after: int | None) -> None:
        self.trouble: str | None = None
        self.seconds = 0.0
        self.graphs: dict[str, Compiled] = {}
        self.replays: dict[tuple[int, int], StepRecorder] = {}
        self._model = model
        self._expected = layers
        self._left = after
        self.reads = False
        self._many: list[GemmLinear] = []
        self._unread = None if after is None else READ_AFTER
        self._layers: list[CompiledLayer] = []
        self._matrices: list[GemvLinear] = []

    @property
    def kernels(self) -> bool:
        """Whether decode steps go through the kernels, which serve models that cannot be compiled too."""
        return bool(self._matrices)

    @property
    def on(self) -> bool:
        """Whether decode steps go through compiled layers."""
        return bool(self._layers) and self.trouble is None

    def start(self) -> None:
        """From now on, compile. Where that is known not to work, `trouble` says why."""
        if self._layers or self.trouble is not None:
            return
        if self._model.device.type == "cpu":
            self._build_reading()
            self._build()
        try:
            layers = _decoder_layers(self._model, self._expected)
        except UnsupportedModelError as error:
            self.give_up(error)
            return
        self._layers = [CompiledLayer(self, layer, index) for index, layer in enumerate(layers)]

    def _build(self) -> None:
        """Load the kernels and let the matrices use them; what is compiled works without them too."""
        if self._loads(kernels.DECODE_SOURCES, "Decoding"):
            self._matrices = [GemvLinear(each) for each in self._model.modules() if _is_matrix(each)]
            self.replays = {(rows, width): StepRecorder(self._expected, width, rows) for rows, width in SHAPES}

    def _build_reading(self) -> None:
        """Load the kernels that read, where the model is one for them."""
        if self.reads or self._many or not self._fits_reading or not self._loads(kernels.PREFILL_SOURCES, "Reading"):
            return
        self.reads = kernels.has_bf16_products()
        if kernels.has_int8_products():
            packed = [each for each in self._model.modules() if isinstance(each, Int4Linear | Int8Linear)]
            self._many = [GemmLinear(each) for each in packed]

    def _loads(self, parts: Sequence[str], what: str) -> bool:
        """Load kernels; where that does not work, say so."""
        started = time.perf_counter()
        try:
            with _COMPILER:
                kernels.build(parts)
        except UnsupportedModelError as error:
            log.warning("%s goes on without kernels of its own: %s", what, error)
            return False
        self.seconds += time.perf_counter() - started
        return True

    @property
    def _fits_reading(self) -> bool:
        return self._model.device.type == "cpu" and self._model.dtype == torch.bfloat16

    @property
    def may_read(self) -> bool:
        """Whether the kernels that read will be loaded sooner or later, but are not yet."""
        return self._unread is not None and self._fits_reading

    def load_reading(self) -> None:
        """Load the kernels that read now, where they would be later."""
        if self._unread is not None:
            self._unread = None
            self._build_reading()

    def count(self, tokens: int) -> None:
        """Take note of a pass of so many tokens, if it is one that kernels or compiling would make faster."""
        if self._unread is not None and tokens > kernels.MAX_ROWS:
            self._unread -= tokens
            if self._unread <= 0 or kernels.is_built(kernels.PREFILL_SOURCES):
                self.load_reading()
        if self._left is None or tokens not in WIDTHS:
            return
        self._left -= 1
        if self._left == 0:
            self._left = None
            log.info("Compiling the decoder layers, which takes some seconds.")
            self.start()

    def give_up(self, why: Exception) -> None:
        """Run every layer as it is, and say so once."""
        self.trouble = f"{type(why).__name__}: {why}"
        for layer in self._layers:
            layer.remove()
        log.warning("Decoding goes on without compiled layers: %s", self.trouble)

    def compile(self, graph: GraphModule, inputs: Sequence[Tensor]) -> Compiled:
        """The code for a graph, compiled once however many layers have it with weights of the same shapes."""
        constants = [getattr(graph, str(node.target)) for node in graph.graph.nodes if node.op == "get_attr"]
        shapes = [(*each.shape, *each.stride(), each.dtype, each.device) for each in inputs]
        key = "\n".join([graph.code, str(shapes), *(str(each.tolist()) for each in constants)])
        if key not in self.graphs:
            self.graphs[key] = torch._inductor.compile(graph, list(inputs), options=OPTIONS)
        return self.graphs[key]


@dataclass(frozen=True)
class Code:
    """The compiled code of a layer for passes of one width; the constants it was made for, and its result's form."""

    run: Compiled
    constants: list[Any]
    form: pytree.TreeSpec


class CompiledLayer:
    """Stands in for the forward of one decoder layer."""

    def __init__(self, fusion: CompiledLayers, layer: nn.Module, index: int) -> None:
        self.fusion = fusion
        self.layer = layer
        self.index = index
        named = [*layer.named_parameters(), *layer.named_buffers()]
        self.names = [name for name, _ in named]
        self.weights = [weight for _, weight in named]
        self.eager = layer.forward
        self.codes: dict[tuple[int, int], Code] = {}
        layer.forward = self

    def remove(self) -> None:
        """Put the layer's own forward back."""
        self.layer.forward = self.eager

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One pass: compiled if it is a decode step of one or a few conversations, else as the model has it."""
        step = next((value for value in kwargs.values() if isinstance(value, ForwardPass)), None)
        shape = None if step is None else self._shape(step)
        if step is None or shape is None:
            return self.eager(*args, **kwargs)
        replay = self.fusion.replays.get(shape)
        if replay is not None and replay.runs(step, self.index):
            output = args[0]
            if replay.needs(self.index):
                output = replay.go_on(step, self.index, _flat((*args, *kwargs.values()))[0])
            return pytree.tree_unflatten([output], self.codes[shape].form)
        tensors, constants = _flat((*args, *kwargs.values()))
        if shape not in self.codes:
            try:
                example = tensors if replay is None else [replay.room(step, each) for each in tensors]
                self.codes[shape] = self._prepare(args, kwargs, example, constants)
            except Exception as error:  # whatever a compiler throws, the model works without it
                self.fusion.give_up(error)
        code = self.codes.get(shape)
        if code is None or constants != code.constants:
            return self.eager(*args, **kwargs)
        here = _HERE.set((step, self.index))
        try:
            outputs = None
            if replay is not None and args and args[0] is tensors[0]:
                outputs = replay.record(step, self.index, code.run, tensors, self.weights)
            if outputs is None and shape[0] == 1:
                outputs = code.run(*tensors, *self.weights)
        finally:
            _HERE.reset(here)  # it would hold the step's cache
        return self.eager(*args, **kwargs) if outputs is None else pytree.tree_unflatten(list(outputs), code.form)

    def _shape(self, step: ForwardPass) -> tuple[int, int] | None:
        """Which of SHAPES serves a step."""
        rows, width = step.position.shape
        if rows == 1:
            return (1, width) if width in WIDTHS else None
        several = self.fusion.replays.get(SHAPES[-1])
        if several is None or several.trouble is not None or not width == 1 == step.new:
            return None
        return SHAPES[-1] if several.ready or rows <= several.rows else None

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], rest: list[Any]) -> Code:
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
        self.remove()
        with _COMPILER:
            graph = make_fx(run, tracing_mode="fake")(*inputs)
            if self.fusion.kernels:
                fuse_gemvs(graph)
            compiled = self.fusion.compile(graph, inputs)
        self.layer.forward = self
        self.fusion.seconds += time.perf_counter() - started
        return Code(compiled, rest, form[-1])


class GemvLinear:
    """Stands in for the forward of one matrix: few rows go through the kernels, whatever runs around it."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.eager = layer.forward
        layer.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        own = self.layer
        weight = cast(Tensor, own.weight)
        scales, biases = _some(getattr(own, "scales", None)), _some(own.bias)
        if not kernels.can_gemv(x, weight) or any(each.dtype != x.dtype for each in (*scales, *biases)):
            return self.eager(x)
        (output,) = kernels.gemv(x.reshape(-1, x.shape[-1]), [weight], scales, biases)
        return output.view(*x.shape[:-1], -1)


class GemmLinear:
    """Stands in for the forward of one matrix of 4 or 8 bits: the rows of a chunk go through the kernels."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = cast("Int4Linear | Int8Linear", layer)
        self.eager = layer.forward
        layer.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        own = self.layer
        if not kernels.can_gemm(x, own.weight, own.scales):
            return self.eager(x)
        return kernels.quantized_gemm(x, own.weight, own.scales, own.bias)


def _some(tensor: Any) -> list[Tensor]:
    return [] if tensor is None else [tensor]


def _flat(values: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """The tensors among the values of a call, those in tuples included, and the other values but the step."""
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
    """`value` with other tensors in the places that `_flat` took them from, and opaque attention for the step."""
    if isinstance(value, Tensor):
        return next(tensors)
    if _is_tensors(value):
        return tuple(next(tensors) for _ in value)
    return _Opaque() if isinstance(value, ForwardPass) else value


def _is_tensors(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(each, Tensor) for each in value)


def _decoder_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """The model's decoder layers, in order.

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
        kinds = {type(weight) for weight in (*layer.parameters(), *layer.buffers())} - {nn.Parameter, Tensor}
        if kinds:
            raise UnsupportedModelError(f"Weights of type {kinds.pop().__name__} are not compiled.")
    return layers


def _is_matrix(module: nn.Module) -> bool:
    plain = type(module) in (nn.Linear, Int8Linear, Int4Linear) and not hasattr(module, "_hf_hook")
    return plain and type(module.weight) in (nn.Parameter, Tensor)


def _attends(layer: nn.Module) -> bool:
    return sum(hasattr(module, "layer_idx") for module in layer.children()) == 1
