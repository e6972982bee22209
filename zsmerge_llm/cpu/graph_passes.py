"""Passes over the fx graph of a decoder layer, before AOTInductor compiles it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default)


def fuse_gemvs(module: GraphModule) -> None:
    """Merge the `zsmerge::gemv` calls that share an input (q, k, v; gate, up) into one call each, in place.

    One call has less launch overhead and keeps all cores busy for longer. Nodes need fake tensors in `meta["val"]`.
    """
    groups: dict[tuple[object, ...], list[Node]] = {}
    for node in module.graph.nodes:
        if node.target is torch.ops.zsmerge.gemv.default:
            x, operands, _ = cast("tuple[Node, list[Node], int]", node.args)
            kind = _source(x), operands[0].meta["val"].dtype, len(operands)
            groups.setdefault(kind, []).append(node)
    for group in groups.values():
        _merge(module.graph, group)
    module.graph.eliminate_dead_code()
    module.recompile()


def _merge(graph: Graph, group: Sequence[Node]) -> None:
    """Merge calls of one matrix each: their matrices, then their scales, then their biases."""
    x = group[0].args[0]
    of_each = [cast("list[Node]", node.args[1]) for node in group]
    operands = [each for alike in zip(*of_each, strict=True) for each in alike]
    with graph.inserting_before(group[0]):
        merged = graph.call_function(torch.ops.zsmerge.gemv.default, (x, operands, len(group)))
        for index, node in enumerate(group):
            for output in list(node.users):  # the only item of its list
                output.replace_all_uses_with(graph.call_function(operator.getitem, (merged, index)))


def _source(node: Node) -> Node:
    """Return the node behind views that keep the last dimension."""
    viewed = node.args[0] if node.target in VIEWS else None
    if isinstance(viewed, Node) and viewed.meta["val"].shape[-1] == node.meta["val"].shape[-1]:
        return _source(viewed)
    return node
