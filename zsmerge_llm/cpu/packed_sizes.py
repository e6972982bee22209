"""The bytes of a model in `quantized_linear`'s packing, from the shapes of its weights alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from zsmerge_llm.cpu.quantized_linear import GROUP_SIZE, is_embedding, is_linear


def packed_nbytes(model: PreTrainedModel, bits: int, dtype: torch.dtype) -> tuple[dict[str, int], set[int]]:
    """Return what `quantize_model` makes of a model, by kind, and the ids of the weights that it replaces.

    Args:
        model: of any device; its weights are not read. bits: 4 or 8. dtype: of the scales.
    """
    head, embedding = cast(Any, model.get_output_embeddings()), cast(Any, model.get_input_embeddings())
    sizes: dict[str, int] = {}
    replaced: set[int] = set()

    def add(weight: torch.Tensor, bits: int) -> None:
        if id(weight) not in replaced:
            replaced.add(id(weight))
            outputs, inputs = weight.shape
            scales = 2 * inputs // GROUP_SIZE * outputs if bits == 4 else outputs
            sizes[f"int{bits}"] = sizes.get(f"int{bits}", 0) + weight.numel() * bits // 8 + scales * dtype.itemsize

    for layer in [module for module in model.modules() if is_linear(module)]:
        linear = cast(nn.Linear, layer)
        outputs, inputs = linear.weight.shape
        if bits == 4 and layer is not head and inputs % GROUP_SIZE == 0 and outputs % 16 == 0:
            add(linear.weight, 4)
        elif inputs % 16 == 0:
            add(linear.weight, 8)
    if is_embedding(embedding):
        add(embedding.weight, 8)
        replaced |= {id(buffer) for buffer in embedding.buffers()}
    return sizes, replaced
