"""The C++ kernels of decode steps on a CPU (`kernels.cpp`): built once for each machine, then loaded in milliseconds.

Which calls they serve is decided here; everything else goes the way of plain PyTorch.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from zsmerge_llm.errors import UnsupportedModelError
from zsmerge_llm.lowbit import layout

MOST = 5
"""Rows that share one reading of a matrix, and tokens of a pass."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PACKED = 64
"""Outputs that stand together in a matrix of 4 bits, where the kernels can read it: as torch packs for AVX-512."""
FLAGS = ("-ffp-contract=fast", "-ftree-loop-vectorize", "-fno-math-errno")
VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


@cache
def build() -> None:
    """Compile and load the kernels. The first time on a machine takes half a minute.

    Raises:
        UnsupportedModelError: there is no compiler, or it does not take them; the message says what it said.
    """
    from torch._inductor.codecache import CppCodeCache

    source = files("zsmerge_llm").joinpath("kernels.cpp").read_text(encoding="utf-8")
    try:
        CppCodeCache.load(source, needs_vec_isa=True, extra_flags=FLAGS)
    except Exception as error:  # whatever a compiler throws, PyTorch's own operators do the same
        raise UnsupportedModelError(f"The kernels could not be built ({type(error).__name__}: {error}).") from error
    torch.library.register_fake("zsmerge::rows", _like_rows)


def serves(*tensors: Tensor) -> bool:
    """Whether queries, keys and values [B, H, T, D] are what `look` and `remember` take."""
    first = tensors[0]
    return (
        first.shape[2] <= MOST
        and first.dtype in DTYPES
        and all(each.dtype == first.dtype and each.is_cpu and each.stride(3) == 1 for each in tensors)
    )


def look(
    arriving: Sequence[Tensor],
    slots: Sequence[Tensor],
    position: Tensor,
    fills: Sequence[int],
    *,
    scaling: float,
    alpha: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Put arriving tokens behind each row's `fills` slots and attend from them: [B, Hq, T, D].

    Args:
        arriving: queries [B, Hq, T, D], keys and values [B, H, T, D].
        slots: keys and values [B, H, P, D], count and score float32 [B, H, P], position int32 [B, H, P]; written to.
        position: int32 [B, T]. Others: as in `policy.weights`, `policy.slot_bias` and `policy.window_bias`.
    """
    output: Tensor = torch.ops.zsmerge.look(
        *arriving, *slots, position, fills, scaling, alpha, softcap or 0.0, window or 0, sinks
    )
    return output


def remember(queries: Tensor, asked: Tensor, newest: Tensor, position: Tensor) -> None:
    """Push newest [B, Hq, T, D] at position int32 [B, T] into the ring queries [B, Hq, W, D], asked int32 [B, W]."""
    torch.ops.zsmerge.remember(queries, asked, newest, position)


def rows(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """x [M, K] times matrices that share it, + biases if there are any: [M, N] each. M is at most `MOST`.

    A matrix is [N, K] in x's dtype; int8 [N, K] with scale [N]; or uint8 [N, K / 2] as torch packs 4 bits for AVX-512,
    with scales and zeros [K / group, N, 2]. All of one kind.
    """
    result: list[Tensor] = torch.ops.zsmerge.rows(x, weights, scales, biases)
    return result


def _like_rows(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor]
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


@dataclass(frozen=True)
class Product:
    """A node of a graph that multiplies a few rows with one matrix."""

    node: Node
    x: Node
    weight: Node
    scale: Node | None = None
    bias: Node | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What products must have in common to be taken together."""
        return _source(self.x), _shown(self.weight).dtype, self.bias is None


def share(module: GraphModule) -> None:
    """Let products of a graph that share their input run as one `rows`, where it serves. The graph knows its tensors.

    Besides reading each matrix once with all cores, it saves a launch for each further one.
    """
    groups: dict[tuple[object, ...], list[Product]] = {}
    for node in module.graph.nodes:
        product = _product(node)
        if product is not None and _served(product):
            groups.setdefault(product.kind, []).append(product)
    for group in groups.values():
        _join(module.graph, group)
    module.graph.eliminate_dead_code()
    module.recompile()


def _join(graph: Graph, group: Sequence[Product]) -> None:
    weights = [each.weight for each in group]
    scales = [each.scale for each in group if each.scale is not None]
    biases = [each.bias for each in group if each.bias is not None]
    with graph.inserting_before(group[0].node):
        together = graph.call_function(torch.ops.zsmerge.rows.default, (group[0].x, weights, scales, biases))
        for index, each in enumerate(group):
            each.node.replace_all_uses_with(graph.call_function(operator.getitem, (together, index)))


def _product(node: Node) -> Product | None:
    """The node as a product, if it is one."""
    match node.target, node.args:
        case torch.ops.aten.mm.default, (Node() as x, Node() as turned):
            return None if (weight := _untransposed(turned)) is None else Product(node, x, weight)
        case torch.ops.aten.addmm.default, (Node() as bias, Node() as x, Node() as turned) if not node.kwargs:
            return None if (weight := _untransposed(turned)) is None else Product(node, x, weight, bias=bias)
        case torch.ops.aten._weight_int8pack_mm.default, (Node() as x, Node() as weight, Node() as scale):
            return Product(node, x, weight, scale)
        case torch.ops.aten._weight_int4pack_mm_for_cpu.default, (Node() as x, Node() as weight, _, Node() as scale):
            return Product(node, x, weight, scale)
    return None


def _served(product: Product) -> bool:
    """Whether `rows` takes it. Weights and all that goes with them must be inputs of the graph."""
    x, weight = _shown(product.x), _shown(product.weight)
    inputs = [each for each in (product.weight, product.scale, product.bias) if each is not None]
    packed = weight.dtype == torch.uint8
    return (
        x.is_cpu
        and x.dtype in DTYPES
        and len(x) <= MOST
        and weight.dtype in (x.dtype, torch.int8, torch.uint8)
        and all(each.op == "placeholder" and _shown(each).is_contiguous() for each in inputs)
        and (not packed or (torch.ops.zsmerge.packed() and layout() == (PACKED, True) and len(weight) % PACKED == 0))
    )


def _untransposed(node: Node) -> Node | None:
    given = node.args[0] if node.target is torch.ops.aten.t.default else None
    return given if isinstance(given, Node) else None


def _source(node: Node) -> Node:
    """What a view shows, as long as its rows stay whole."""
    given = node.args[0] if node.target in VIEWS else None
    whole = isinstance(given, Node) and _shown(given).shape[-1] == _shown(node).shape[-1]
    return _source(given) if whole and isinstance(given, Node) else node


def _shown(node: Node) -> Tensor:
    """The tensor that stands for a node's while a graph is traced."""
    shown: Tensor = node.meta["val"]
    return shown
