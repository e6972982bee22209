"""Record decode steps on a CPU once, and repeat them without Python between their parts, as CUDA graphs do on a GPU.

TorchInductor's kernels for a layer are called one after another by a function that it generates in Python. Here that
function is run once for each layer with other names in it: each does what it did, and adds it to a native program
(`Program` in csrc), which does the same again on the same memory. A model whose generated functions do anything unknown
is not recorded.
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

from zsmerge_llm.attention.call import AttentionCall
from zsmerge_llm.attention.passes import ForwardPass, SpeculativePass
from zsmerge_llm.kvcache.eviction import only_records, records_queries
from zsmerge_llm.kvcache.layer_cache import QUERY_STATE, LayerCache
from zsmerge_llm.kvcache.slots import PER_SLOT

KERNEL = "cpp_fused"
"""How the names of TorchInductor's kernels for a CPU begin."""
MEMORY = {"empty_strided_cpu", "reinterpret_tensor", "assert_size_stride", "assert_alignment"}
KNOWN = {"torch", "ops", "zsmerge", "gemv", "attend", "default", "clear"} | MEMORY
"""Everything else that a generated function may name."""
STATE = (*PER_SLOT, *QUERY_STATE)
"""The tensors of a layer's cache that a program is given, in its order."""
MAX_DEPTH = 8
"""Closures around a generated function."""


@dataclass(frozen=True)
class Recorded:
    """One layer's part of a program, which ends at `end`.

    inputs: the input tensors that no earlier layer has, by their index among the layer's own, and the program's memory
    for them. call: its attention call; output: its output. Both are in the program's memory.
    """

    end: int
    inputs: list[tuple[int, Tensor]]
    call: AttentionCall
    output: Tensor


class StepRecorder:
    """Records the decode steps of one shape in a step that runs anyway, then repeats them.

    Args:
        num_layers: of the model. num_tokens: of a step.
        rows: how many conversations there is memory for; fewer leave some of it unused, more take turns.
    """

    def __init__(self, num_layers: int, num_tokens: int, rows: int = 1) -> None:
        self.num_layers = num_layers
        self.num_tokens = num_tokens
        self.rows = rows
        self.disabled_reason: str | None = None
        self._clear()

    def _clear(self) -> None:
        self.program = torch.classes.zsmerge.Program()
        self.recorded: list[Recorded] = []
        self._memory: list[Tensor] = []  # what the program points at
        self._memory_of: dict[int, tuple[Tensor, Tensor]] = {}  # by id: an input tensor, and its memory
        self._last_output: Tensor | None = None  # of the layer that was recorded last
        self._step: ReferenceType[ForwardPass] | None = (
            None  # that is being repeated; a weak reference, so that its cache can go
        )
        self._sources: list[tuple[Tensor, Tensor]] = []  # the step's inputs so far, and their memory

    @property
    def ready(self) -> bool:
        """Whether all layers have been recorded."""
        return len(self.recorded) == self.num_layers

    # -- recording ---------------------------------------------------------------------------------------------------

    def record(
        self,
        step: ForwardPass,
        index: int,
        code: Callable[..., Any],
        tensors: Sequence[Tensor],
        weights: Sequence[Tensor],
    ) -> Any:
        """Run a layer's code and record it; return its outputs, or None if it cannot be recorded and was not run.

        The first of its `tensors` is the output of the layer before. They have as many rows as the step.
        """
        if self.disabled_reason is not None or self.ready:
            return None
        if index == 0:
            self._clear()
        generated = _generated(code)
        if generated is None:
            self.disabled_reason = "the code of a layer does something unknown"
        elif index != len(self.recorded) or (index and tensors[0] is not self._last_output):
            self.disabled_reason = "layers do not follow one another directly"
        if self.disabled_reason is not None:
            return None
        inputs, own = [], list(tensors)
        for place, tensor in enumerate(tensors):
            if index and place == 0:
                own[0] = self.recorded[-1].output
                continue
            if id(tensor) not in self._memory_of:
                self._memory_of[id(tensor)] = (tensor, self.padded(step, tensor).clone())
                inputs.append((place, self._memory_of[id(tensor)][1]))
            own[place] = self._memory_of[id(tensor)][1]
        recording = _Recording(self.program, self._memory, step, index)
        outputs = recording.run(cast("tuple[MethodType, list[str]]", generated), [*own, *weights])
        if len(outputs) != 1 or len(recording.calls) != 1:
            self.disabled_reason = "a layer attends more than once, or makes several tensors"
            return outputs
        end = self.program.size()
        self.recorded.append(Recorded(end, inputs, recording.calls[0], outputs[0]))
        self._last_output = _first(outputs[0], len(step.layout.num_new_tokens))
        if self.ready:
            self._memory += [memory for _, memory in self._memory_of.values()]
            self._memory_of.clear()
        return [self._last_output]

    def padded(self, step: ForwardPass, tensor: Tensor) -> Tensor:
        """Pad an input of a layer to as many rows as there is memory for."""
        missing = self.rows - len(tensor)
        if missing == 0 or len(tensor) != len(step.layout.num_new_tokens):  # the same for all rows
            return tensor
        return torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])

    # -- repeating ---------------------------------------------------------------------------------------------------

    def runs(self, step: ForwardPass, index: int) -> bool:
        """Return whether the program does this step; decided when the first layer is called."""
        if index == 0:
            self._step, self._sources = None, []
            fits = (
                self.ready and type(step) in (ForwardPass, SpeculativePass) and step.layout.num_new == self.num_tokens
            )
            if fits and all(layer.has_room(self.num_tokens) for layer in step.cache.layers):
                self._step = ref(step)
        return self._step is not None and self._step() is step

    def needs(self, index: int) -> bool:
        """Return whether a layer has inputs of its own, so that the program cannot have run that far yet."""
        return bool(self.recorded[index].inputs)

    def go_on(self, step: ForwardPass, index: int, tensors: Sequence[Tensor]) -> Tensor:
        """Run from a layer that `needs` its tensors up to the next such one; return the output there.

        More rows than there is memory for go one group after another.
        """
        last = next((each for each in range(index + 1, self.num_layers) if self.needs(each)), self.num_layers)
        layers, count = step.cache.layers[index:last], len(step.layout.num_new_tokens)
        plain = [self._is_plain(step, layer) for layer in layers]
        self._sources += [(tensors[place], memory) for place, memory in self.recorded[index].inputs]
        groups = [slice(start, min(start + self.rows, count)) for start in range(0, count, self.rows)]
        outputs, calls = [], []
        for rows in groups:
            outputs.append(self._run(step, index, last, tensors, plain, rows))
            size = rows.stop - rows.start
            found = [_of_rows(each.call, size) for each in self.recorded[index:last]]
            calls.append([call if plain[at] or len(groups) == 1 else _copy(call) for at, call in enumerate(found)])
        for at, layer in enumerate(layers):
            if plain[at]:
                layer.count(step.layout.num_new_tokens, step.layout.on(layer.spec.device)["counts"])
            else:
                step.after_attention(_joined([group[at] for group in calls]))
        if last == self.num_layers:
            self._sources = []
        return outputs[0] if len(groups) == 1 else torch.cat(outputs)

    def _run(
        self, step: ForwardPass, index: int, last: int, tensors: Sequence[Tensor], plain: Sequence[bool], rows: slice
    ) -> Tensor:
        """Run the layers from `index` to before `last` for some rows of the step; return their output."""
        count, layers = len(step.layout.num_new_tokens), step.cache.layers[index:last]
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
            [filled for layer in layers for filled in layer.num_filled[rows]],
            [layer.config.alpha for layer in layers],
            [int(is_plain and records_queries(layer)) for layer, is_plain in zip(layers, plain, strict=True)],
            [int(new > 0) for new in step.layout.num_new_tokens[rows]],
            step.layout.on(layers[0].spec.device)["new_positions"][rows],
        )
        output = _first(self.recorded[last - 1].output, rows.stop - rows.start)
        return output if whole else output.clone()

    def _is_plain(self, step: ForwardPass, layer: LayerCache) -> bool:
        """Return whether a layer only counts its tokens after attention, and records their queries."""
        return type(step) is ForwardPass and only_records(layer, self.num_tokens)


class _Recording:
    """What the names in a generated function mean while a layer is recorded."""

    def __init__(self, program: Any, memory: list[Tensor], step: ForwardPass, index: int) -> None:
        self.calls: list[AttentionCall] = []
        self._program = program
        self._memory = memory
        self._index = index
        self._rows_of_step = len(step.layout.num_new_tokens)
        self._spec = step.cache.layers[index].spec

    def run(self, generated: tuple[MethodType, list[str]], inputs: list[Tensor]) -> Sequence[Tensor]:
        """Run the function and return its outputs; it empties `inputs`."""
        method, kernels = generated
        function = cast(FunctionType, method.__func__)
        names = dict(function.__globals__)
        names |= {name: partial(self._kernel, names[name], _address(names[name])) for name in kernels}
        operators = SimpleNamespace(
            gemv=SimpleNamespace(default=self._gemv), attend=SimpleNamespace(default=self._attend)
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

    def _gemv(self, *inputs: Any) -> Sequence[Tensor]:
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
    """Return the first rows; the tensor itself if it has no more."""
    return tensor if len(tensor) == rows else tensor[:rows]


def _of_rows(call: AttentionCall, rows: int) -> AttentionCall:
    query, key, value = (_first(each, rows) for each in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value)


def _copy(call: AttentionCall) -> AttentionCall:
    return replace(call, query=call.query.clone(), key=call.key.clone(), value=call.value.clone())


def _joined(calls: Sequence[AttentionCall]) -> AttentionCall:
    """Join the calls of groups of rows into one of all rows."""
    if len(calls) == 1:
        return calls[0]
    query, key, value = (torch.cat([getattr(call, name) for call in calls]) for name in ("query", "key", "value"))
    return replace(calls[0], query=query, key=key, value=value)


def _generated(code: Callable[..., Any]) -> tuple[MethodType, list[str]] | None:
    """Return the function that TorchInductor generated for a graph, and its kernels; None if it does more."""
    found = _compiled_graph(code, MAX_DEPTH)
    if found is None or not isinstance(method := found.current_callable, MethodType):
        return None
    function = cast(FunctionType, method.__func__)
    names = function.__code__.co_names
    kernels = [name for name in names if name.startswith(KERNEL)]
    dtypes = [name for name in names if isinstance(getattr(torch, name, None), torch.dtype)]
    own = [hasattr(getattr(function.__globals__[name], "__self__", None), "__file__") for name in kernels]
    return (method, kernels) if all(own) and set(names) <= {*KNOWN, *kernels, *dtypes} else None


def _compiled_graph(code: Any, depth: int) -> CompiledFxGraph | None:
    """Find the compiled graph behind the closures that prepare its inputs."""
    if isinstance(code, CompiledFxGraph) or not depth:
        return code if isinstance(code, CompiledFxGraph) else None
    behind = [cell.cell_contents for cell in getattr(code, "__closure__", None) or () if _is_full(cell)]
    found = (_compiled_graph(each, depth - 1) for each in behind if callable(each))
    return next((each for each in found if each is not None), None)


def _is_full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _address(kernel: Any) -> int:
    """Return the address of one of TorchInductor's kernels."""
    library = ctypes.CDLL(kernel.__self__.__file__)
    return cast(int, ctypes.cast(library.kernel, ctypes.c_void_p).value)
