"""C++ kernels for a CPU (`cpp/`), of decode steps and of reading: built once for each machine, then loaded in no time.

Which calls they serve is decided here; everything else goes the way of plain PyTorch.
"""

from __future__ import annotations

import hashlib
import operator
import platform
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from zsmerge_llm.cpu.quantized_linear import layout
from zsmerge_llm.errors import UnsupportedModelError

DECODING = ("vectors", "rounding", "matrices", "attention", "program")
READING = ("vectors", "rounding", "products", "reading")
"""The files of `cpp` that are one source."""
MOST = 8
"""Rows that share one reading of a matrix, and tokens of a pass."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PACKED = 64
"""Outputs that stand together in a matrix of 4 bits, where the kernels can read it: as torch packs for AVX-512."""
FLAGS = ("-ffp-contract=fast", "-ftree-loop-vectorize", "-fno-math-errno")
VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)


@cache
def build(parts: Sequence[str] = DECODING) -> None:
    """Compile and load kernels. The first time on a machine takes about half a minute, for those of reading 10 s.

    Raises:
        UnsupportedModelError: there is no compiler, or it does not take them; the message says what it said.
    """
    from torch._inductor.codecache import CppCodeCache

    try:
        CppCodeCache.load(_source(parts), needs_vec_isa=False, extra_flags=FLAGS)
    except Exception as error:  # whatever a compiler throws, PyTorch's own operators do the same
        raise UnsupportedModelError(f"The kernels could not be built ({type(error).__name__}: {error}).") from error
    stamp = _stamp(parts)
    with suppress(OSError):  # where nothing can be written, they are built again in each process
        stamp.touch()
    if parts == DECODING:
        torch.library.register_fake("zsmerge::rows", _like_rows)
        _takes_packed()  # while a graph is traced, it could not be found out


def built(parts: Sequence[str]) -> bool:
    """Whether `build` has done this on this machine before, so that it only has to load."""
    return _stamp(parts).exists()


def _source(parts: Sequence[str]) -> str:
    folder = files("zsmerge_llm.cpu").joinpath("csrc")
    return "\n".join(folder.joinpath(f"{part}.cpp").read_text(encoding="utf-8") for part in parts)


@cache  # asked for with each chunk that is read until then
def _stamp(parts: Sequence[str]) -> Path:
    """A file beside PyTorch's compiled code, which goes when that goes."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    made_of = "\n".join([torch.__version__, platform.processor(), *FLAGS, _source(parts)])
    return Path(cache_dir(), f"zsmerge-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}")


def serves(*tensors: Tensor) -> bool:
    """Whether queries, keys and values [B, H, T, D] are what `look` and `remember` take."""
    return tensors[0].shape[2] <= MOST and tensors[0].dtype in DTYPES and _alike(tensors)


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Whether all are on the CPU, of one dtype, and their rows in one piece."""
    return all(each.dtype == tensors[0].dtype and each.is_cpu and each.stride(3) == 1 for each in tensors)


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
        slots: keys, values [B, H, P, D], count, score, accumulated float32 [B, H, P], position int32 [B, H, P];
            written to.
        position: int32 [B, T]. Others: as in `policy.weights`, `policy.slot_bias` and `policy.window_bias`.
    """
    output: Tensor = torch.ops.zsmerge.look(
        *arriving, *slots, position, fills, scaling, alpha, softcap or 0.0, window or 0, sinks
    )
    return output


def reads(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `read` takes a query [B, Hq, T, D], key and value [B, H, T, D] and what is held of their kind."""
    fits = query.shape[2] > MOST and query.shape[3] % 2 == 0 and query.dtype == torch.bfloat16
    return fits and _alike((query, key, value))


def multiplies_bfloat16() -> bool:
    """Whether this machine's kernels read."""
    return bool(torch.ops.zsmerge.reads())


def read(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    bases: Sequence[int],
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None = None,
    bias: Tensor | None = None,
    asking: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    """Attention of many tokens to all slots, without a mask: [B, Hq, T, D].

    Args:
        query: [B, Hq, T, D]. keys, values: [B, H, C, D], the tokens' own among them: query t of row b sees the first
            bases[b] + t + 1.
        bias: float32 [B, H, C], added to the logits of each slot.
        asking: int32 [B, T], position: int32 [B, C], where the queries and the slots stand, if there is a `window`.
    """
    output: Tensor = torch.ops.zsmerge.read(
        query, keys, values, bases, scaling, softcap or 0.0, window or 0, bias, asking, position, sinks
    )
    return output


def watch(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    asking: Tensor,
    position: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What queries [B, Hq, m, D] pay each slot: in the mean, and the most that any pays. Two of float32 [B, H, C].

    Args:
        keys: [B, H, C, D]; bias: float32 [B, H, C]; position: int32 [B, H, C].
        asking: int [B, m], where the queries stand: they look at nothing behind; -1: not at all.
    """
    mean, most = torch.ops.zsmerge.watch(queries, keys, bias, asking, position, scaling, softcap or 0.0, sinks)
    return mean, most


def multiplies_packed() -> bool:
    """Whether this machine's kernels of reading multiply with weights of 4 and 8 bits, faster than by dequantising."""
    return bool(torch.ops.zsmerge.reads_packed()) and layout() == (PACKED, True)


def takes_many(x: Tensor, weight: Tensor, ranges: Tensor) -> bool:
    """Whether `many` takes x [..., K] and a matrix of 4 or 8 bits, where `multiplies_packed` holds."""
    kinds = x.dtype == ranges.dtype == torch.bfloat16 and weight.dtype in (torch.uint8, torch.int8)
    return kinds and x.is_cpu and x.numel() > x.shape[-1] * MOST and len(weight) % PACKED == 0


def many(x: Tensor, weight: Tensor, ranges: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] of a chunk times a matrix, + bias [N]: [..., N].

    A matrix is uint8 [N, K / 2] with ranges [K / group, N, 2], or int8 [N, K] with ranges [N].
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    output: Tensor = torch.ops.zsmerge.many(rows, weight, ranges, bias)
    return output.view(*x.shape[:-1], len(weight))


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


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `rows` takes x [..., K] and this matrix, in one of the forms it knows."""
    if not x.is_cpu or x.dtype not in DTYPES or not weight.is_contiguous():
        return False
    return 0 < x.numel() <= x.shape[-1] * _most(weight, x.dtype)


def _most(weight: Tensor, dtype: torch.dtype) -> int:
    """Rows that are faster through `rows` than through PyTorch."""
    if weight.dtype == torch.uint8:
        return MOST if _takes_packed() and len(weight) % PACKED == 0 else 0
    return MOST if weight.dtype in (torch.int8, dtype) else 0


@cache
def _takes_packed() -> bool:
    """Whether this machine's kernels take weights of 4 bits."""
    return bool(torch.ops.zsmerge.packed()) and layout() == (PACKED, True)


def share(module: GraphModule) -> None:
    """Let products of a graph that share their input run as one `rows`. The graph knows its tensors.

    That saves a launch for each, and all cores are busy for longer.
    """
    groups: dict[tuple[object, ...], list[Node]] = {}
    for node in module.graph.nodes:
        if node.target is torch.ops.zsmerge.rows.default:
            x, (weight,), _, biases = cast("tuple[Node, list[Node], list[Node], list[Node]]", node.args)
            kind = _shown(x), weight.meta["val"].dtype, len(biases)
            groups.setdefault(kind, []).append(node)
    for group in groups.values():
        _join(module.graph, group)
    module.graph.eliminate_dead_code()
    module.recompile()


def _join(graph: Graph, group: Sequence[Node]) -> None:
    x = group[0].args[0]
    weights, scales, biases = (
        [each for node in group for each in cast("list[Node]", node.args[at])] for at in (1, 2, 3)
    )
    with graph.inserting_before(group[0]):
        together = graph.call_function(torch.ops.zsmerge.rows.default, (x, weights, scales, biases))
        for index, node in enumerate(group):
            for output in list(node.users):  # the only one of its list
                output.replace_all_uses_with(graph.call_function(operator.getitem, (together, index)))


def _shown(node: Node) -> Node:
    """What a view shows, as long as its rows stay whole."""
    given = node.args[0] if node.target in VIEWS else None
    if isinstance(given, Node) and given.meta["val"].shape[-1] == node.meta["val"].shape[-1]:
        return _shown(given)
    return node
