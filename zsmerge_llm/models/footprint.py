"""A model without weights, and the bytes that its weights take in a dtype or a quantization.

The model is built by transformers on torch's meta device: shapes and dtypes, but no data.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from zsmerge_llm.models.log_filters import quiet_transformers
from zsmerge_llm.models.model_classes import generating_class

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BYTES_PER_WEIGHT = {"int8": 1.0, "fp8": 1.0, "int4": 0.5, "nf4": 0.5}
"""The least bytes of one quantized weight."""
GROUPS = {"nf4": 64, "int4": 32}
"""Weights that share four bytes of scale, and zero point, on a GPU; in other formats those of an output do."""


def meta_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal language model without weights, in evaluation mode."""
    import torch

    own = copy.deepcopy(config)
    if hasattr(own, "quantization_config"):
        del own.quantization_config
    rope = getattr(own.get_text_config(), "rope_parameters", None)
    if rope is not None and rope.get("rope_type") == "dynamic":  # its frequencies depend on positions, no shape does
        rope["rope_type"] = "default"
    with quiet_transformers(), torch.device("meta"):
        model: PreTrainedModel = generating_class(own).from_config(own, dtype=dtype, attn_implementation="eager")
    model.tie_weights()
    return model.eval().requires_grad_(False)


def weight_nbytes(
    model: PreTrainedModel, dtype: torch.dtype, quantization: str | None = None, packed: bool = True
) -> dict[str, int]:
    """Return the bytes of a model's weights and buffers by their kind: a dtype's or a quantization's name.

    Args:
        model: of any device, in `dtype`; its weights are not read.
        packed: whether "int8" and "int4" are torch's packing on a CPU; else those of bitsandbytes and torchao.
    """
    if quantization is None:
        return _unquantized(model, set())
    if packed and quantization != "nf4":
        from zsmerge_llm.cpu.packed_sizes import packed_nbytes

        sizes, packed_weights = packed_nbytes(model, 4 if quantization == "int4" else 8, dtype)
        return _added(_unquantized(model, packed_weights), sizes)
    return _by_layer(model, quantization)


def _unquantized(model: PreTrainedModel, without: set[int]) -> dict[str, int]:
    """Return the bytes of all tensors by dtype, each counted once; `without`: ids of those to leave out."""
    sizes: dict[str, int] = {}
    for tensor in {id(each): each for each in (*model.parameters(), *model.buffers())}.values():
        if id(tensor) not in without:
            name = str(tensor.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + tensor.nbytes
    return sizes


def _by_layer(model: PreTrainedModel, quantization: str) -> dict[str, int]:
    """Return sizes as transformers quantizes with bitsandbytes or torchao: every linear layer but the output layer."""
    from torch import nn

    head: Any = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    size = 0
    for module in linears:
        count = module.weight.numel()
        scales = -(-count // GROUPS[quantization]) if quantization in GROUPS else module.out_features
        size += int(count * BYTES_PER_WEIGHT[quantization]) + 4 * scales
    return _added(_unquantized(model, {id(module.weight) for module in linears}), {quantization: size})


def _added(sizes: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    return {name: sizes.get(name, 0) + more.get(name, 0) for name in {**more, **sizes}}
