"""Decode steps on a CPU that are written down once, and then run without Python between their parts.

TorchInductor's functions for a layer are called one after another by a function that it generates in Python. Here that
function is run once for each layer with other names in it: each does what it did, and adds it to a program of the
kernels (`Program` in csrc), which does the same again on the same memory. That is what CUDA graphs are on a
GPU. A model whose generated functions do anything unknown is left as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch._inductor.output_code import CompiledFxGraph

from zsmerge_llm.attention.interface import AttentionCall, ForwardPass, SpeculativePass
from zsmerge_llm.kvcache.layer_cache import LayerCache

KERNEL = "cpp_fused"
"""How the names of TorchInductor's functions for a CPU begin."""
MEMORY = {"empty_strided_cpu", "reinterpret_tensor", "assert_size_stride", "assert_alignment"}
KNOWN = {"torch", "ops", "zsmerge", "gemv", "attend", "default", "clear"} | MEMORY
"""What else a generated function may name."""
STATE = ("keys", "values", "count", "score", "accumulated", "position", "queries", "query_position")
"""What of a layer's cache a program is given."""
DEEP = 8
"""Functions around a generated one."""


@dataclass(frozen=True)
class Recorded:
    """One layer's part of a program, which ends at `end`.

    inputs: the tensors it is given that no earlier layer was, by their place among its own, and the memory where the
    program finds them. call: what it attended with; output: what comes out of it. Both are in the program's memory.
    """

    end: int
    inputs: list[tuple[int, Tensor]]
    call: AttentionCall
    output: Tensor


class StepRecorder:
    """The steps of `layers` layers in passes of one width: recorded in a step that runs anyway, then repeated.

    Args:
        rows: how many conversations there is memory for; fewer leave some of it unused, more take it by turns.
    """

    def __init__(self, layers: int, width: int, rows: int = 1) -> None:
        self.layers = layers
        self.width = width
        self.rows = rows
        self.trouble: str | None = None
        self._clear()

    def _clear(self) -> None:
        self.program = torch.classes.zsmerge.Program()
        self.recorded: list[Recorded] = []
        self._memory: list[Tensor] = []  # what the program points at
        self._places: dict[int, tuple[Tensor, Tensor]] = {}  # by id: a tensor that was given, and its memory
        self._given: Tensor | None = None  # what the layer that was recorded last gave to the next
        self._step: ReferenceType[ForwardPass] | None = (
            None  # the one that is being repeated; its cache must not live on here
        )
        self._sources: list[tuple[Tensor, Tensor]] = []  # what the step was given so far, and where it goes

    @property
    def ready(self) -> bool:
        """Whether all layers have been recorded."""
        return len(self.recorded) == self.layers

    # -- recording ---------------------------------------------------------------------------------------------------

    def record(
        self,
        step: ForwardPass,
        index: int,
        code: Callable[..., Any],
        tensors: Sequence[Tensor],
        weights: Sequence[Tensor],
    ) -> Any:
        """Run a layer's code and write it down: what comes out. None if it was not run, because it cannot be.

        The first of its `tensors` is what comes out of the layer before. They have as many rows as the step.
        """
        if self.trouble is not None or self.ready:
            return None
        if index == 0:
            self._clear()
        generated = _generated(code)
        if generated is None:
            self.trouble = "the code of a layer does something unknown"
        elif index != len(self.recorded) or (index and tensors[0] is not self._given):
            self.trouble = "layers do not follow one another directly"
        if self.trouble is not None:
            return None
        inputs, own = [], list(tensors)
        for place, tensor in enumerate(tensors):
            if index and place == 0:
                own[0] = self.recorded[-1].output
                continue
            if id(tensor) not in self._places:
                self._places[id(tensor)] = (tensor, self.room(step, tensor).clone())
                inputs.append((place, self._places[id(tensor)][1]))
            own[place] = self._places[id(tensor)][1]
        writer = _Writer(self.program, self._memory, step, index)
        outputs = writer.run(cast("tuple[MethodType, list[str]]", generated), [*own, *weights])
        if len(outputs) != 1 or len(writer.calls) != 1:
            self.trouble = "a layer attends more than once, or makes several tensors"
            return outputs
        end = self.program.size()
        self.recorded.append(Recorded(end, inputs, writer.calls[0], outputs[0]))
        self._given = _first(outputs[0], len(step.counts))
        if self.ready:
            self._memory += [memory for _, memory in self._places.values()]
            self._places.clear()
        return [self._given]

    def room(self, step: ForwardPass, tensor: Tensor) -> Tensor:
        """A tensor that a layer is given in `step`, with as many rows as there is memory for."""
        missing = self.rows - len(tensor)
        if missing == 0 or len(tensor) != len(step.counts):  # the same for all rows
            return tensor
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

    # -- repeating ---------------------------------------------------------------------------------------------------

    def runs(self, step: ForwardPass, index: int) -> bool:
        """Whether the program does this step, which is decided when the first layer is called."""
        if index == 0:
            self._step, self._sources = None, []
            fits = self.ready and type(step) in (ForwardPass, SpeculativePass) and step.kernels
            if fits and step.new == self.width and all(layer.holds(self.width) for layer in step.cache.layers):
                self._step = ref(step)
        return self._step is not None and self._step() is step

    def needs(self, index: int) -> bool:
        """Whether a layer is given something new, so that the program cannot have run that far yet."""
        return bool(self.recorded[index].inputs)

    def go_on(self, step: ForwardPass, index: int, tensors: Sequence[Tensor]) -> Tensor:
        """Run from a layer that `needs` its tensors up to the next such one: what comes out there.

        More rows than there is memory for go one group after another.
        """
        last = next((each for each in range(index + 1, self.layers) if self.needs(each)), self.layers)
        layers, count = step.cache.layers[index:last], len(step.counts)
        easy = [self._easy(step, layer) for layer in layers]
        self._sources += [(tensors[place], memory) for place, memory in self.recorded[index].inputs]
        groups = [slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows)]
        outputs, calls = [], []
        for rows in groups:
            outputs.append(self._run(step, index, last, tensors, easy, rows))
            size = rows.stop - rows.start
            found = [_of_rows(each.call, size) for each in self.recorded[index:last]]
            calls.append([call if easy[at] or len(groups) == 1 else _copy(call) for at, call in enumerate(found)])
        for at, layer in enumerate(layers):
            if easy[at]:
                layer.fills = [fill + new for fill, new in zip(layer.fills, step.counts, strict=True)]
            else:
                step.attended(_joined([group[at] for group in calls]))
        if last == self.layers:
            self._sources = []
        return outputs[0] if len(groups) == 1 else torch.cat(outputs)

    def _run(
        self, step: ForwardPass, index: int, last: int, tensors: Sequence[Tensor], easy: Sequence[bool], rows: slice
    ) -> Tensor:
        """The layers from `index` to before `last`, for some rows of the step: what comes out of them."""
        count, layers = len(step.counts), step.cache.layers[index:last]
        whole = rows.stop - rows.start == count
        if index and not whole:  # the layer before ran for other rows last
            self.recorded[index - 1].output[: rows.stop - rows.start].copy_(tensors[0][rows])
        latest = self._sources[-len(self.recorded[index].inputs) :]
        for tensor, memory in latest if whole else self._sources:
            given = tensor[rows] if len(tensor) == count else tensor
            memory[: len(given)].copy_(given)
        state = [getattr(layer, name) for layer in layers for name in STATE]
        self.program.run(
            self.recorded[index - 1].end if index else 0,
            self.recorded[last - 1].end,
            state if whole else [each[rows] for each in state],
            [fill for layer in layers for fill in layer.fills[rows]],
            [layer.config.alpha for layer in layers],
            [int(layer.remembers and plain) for layer, plain in zip(layers, easy, strict=True)],
            [int(arrived > 0) for arrived in step.counts[rows]],
            step.marks(layers[0].spec.device)["kept"][rows],
        )
        output = _first(self.recorded[last - 1].output, rows.stop - rows.start)
        return output if whole else output.clone()

    def _easy(self, step: ForwardPass, layer: LayerCache) -> bool:
        """Whether a layer that has attended only counts its tokens, and remembers their queries."""
        return type(step) is ForwardPass and layer.only_counts(self.width)


class _Writer:
    """The names in a generated function while a layer is recorded."""

    def __init__(self, program: Any, memory: list[Tensor], step: ForwardPass, index: int) -> None:
        self.calls: list[AttentionCall] = []
        self._program = program
        self._memory = memory
        self._index = index
        self._rows_of_step = len(step.counts)
        self._spec = step.cache.layers[index].spec

    def run(self, generated: tuple[MethodType, list[str]], inputs: list[Tensor]) -> Sequence[Tensor]:
        """What the function returns; it empties `inputs`."""
        method, kernels = generated
        function = cast(FunctionType, method.__func__)
        names = dict(function.__globals__)
        names |= {name: partial(self._kernel, names[name], _address(names[name])) for name in kernels}
        operators = SimpleNamespace(
            gemv=SimpleNamespace(default=self._rows), attend=SimpleNamespace(default=self._attend)
        )
        dtypes = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
        names["torch"] = SimpleNamespace(ops=SimpleNamespace(zsmerge=operators), **dtypes)
        names["empty_strided_cpu"] = partial(self._empty, names["empty_strided_cpu"])
        result: Sequence[Tensor] = FunctionType(function.__code__, names)(method.__self__, inputs)
        return result

    def _empty(self, make: Callable[..., Tensor], *how: Any) -> Tensor:
        self._memory.append(make(*how))
        return self._memory[-1]

    def _kernel(self, kernel: Callable[..., None], address: int, *tensors: Tensor) -> None:
        kernel(*tensors)
        self._program.add_code(address, tensors)

    def _rows(self, *inputs: Any) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = torch.ops.zsmerge.gemv(*inputs)
        self._program.add_gemv(*inputs, outputs)
        self._memory += outputs
        return outputs

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        output = query.new_zeros(*query.shape[:3], value.shape[3])
        some = (_first(each, self._rows_of_step) for each in (query, key, value))
        output[: self._rows_of_step] = torch.ops.zsmerge.attend(*some, scaling, softcap, sinks)
        self._memory.append(output)
        cap, window = self._spec.softcap or 0.0, self._spec.window or 0
        self._program.add_attention(query, key, value, output, scaling, cap, window, sinks)
        self.calls.append(AttentionCall(self._index, query, key, value, scaling, None, softcap, sinks))
        return output


def _first(tensor: Tensor, rows: int) -> Tensor:
    """The first rows; the tensor itself if it has no more."""
    return tensor if len(tensor) == rows else tensor[:rows]


def _of_rows(call: AttentionCall, rows: int) -> AttentionCall:
    query, key, value = (_first(each, rows) for each in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value)


def _copy(call: AttentionCall) -> AttentionCall:
    return replace(call, query=call.query.clone(), key=call.key.clone(), value=call.value.clone())


def _joined(calls: Sequence[AttentionCall]) -> AttentionCall:
    """One call of all rows, from one for each group of them."""
    if len(calls) == 1:
        return calls[0]
    query, key, value = (torch.cat([getattr(call, name) for call in calls]) for name in ("query", "key", "value"))
    return replace(calls[0], query=query, key=key, value=value)


def _generated(code: Callable[..., Any]) -> tuple[MethodType, list[str]] | None:
    """The function that TorchInductor generated for a graph, and the kernels it names; None if it does more."""
    found = _inside(code, DEEP)
    if found is None or not isinstance(method := found.current_callable, MethodType):
        return None
    function = cast(FunctionType, method.__func__)
    names = function.__code__.co_names
    kernels = [name for name in names if name.startswith(KERNEL)]
    dtypes = [name for name in names if isinstance(getattr(torch, name, None), torch.dtype)]
    own = [hasattr(getattr(function.__globals__[name], "__self__", None), "__file__") for name in kernels]
    return (method, kernels) if all(own) and set(names) <= {*KNOWN, *kernels, *dtypes} else None


def _inside(code: Any, deep: int) -> CompiledFxGraph | None:
    """The compiled graph somewhere behind the functions that prepare its inputs."""
    if isinstance(code, CompiledFxGraph) or not deep:
        return code if isinstance(code, CompiledFxGraph) else None
    behind = [cell.cell_contents for cell in getattr(code, "__closure__", None) or () if _is_full(cell)]
    found = (_inside(each, deep - 1) for each in behind if callable(each))
    return next((each for each in found if each is not None), None)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _address(kernel: Any) -> int:
    """Where the code of one of TorchInductor's functions is."""
    library = ctypes.CDLL(kernel.__self__.__file__)
    return cast(int, ctypes.cast(library.kernel, ctypes.c_void_p).value)
