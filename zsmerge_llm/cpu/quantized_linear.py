"""Linear layers and embeddings with int4 or int8 weights, on torch's packed CPU kernels.

Decoding is bound by memory bandwidth, so few rows go through torch's packed kernels, which read a quarter or half of
the bytes. Many rows (a prefill chunk, a large batch) are bound by arithmetic, where those kernels are slow. For them,
the matrix is dequantized in pieces for the call, unless `native.quantized_gemm` takes it.

int4: groups of 32 inputs of an output share a scale and a zero. int8: one scale for each output. Output layer and
embeddings are int8 in both modes, and share one matrix if they are tied. Left as they are: norms, biases, experts
(their weights are not in linear layers), GPT-2's Conv1D, and matrices of sizes that the kernels do not take.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from zsmerge_llm.cpu.product_dtype import product_dtype

GROUP_SIZE = 32
"""Inputs that share a scale and a zero in int4."""
MAX_GEMV_ROWS_INT4, MAX_GEMV_ROWS_INT8 = 32, 12
"""Most rows for which the packed kernel beats dequantizing first (AVX-512 and AMX, docs/research/kernels)."""

_PIECE = 2**18
"""Weights dequantized or quantized at once: their float32 copy fits in a core's L2 cache."""
_MAX_DEQUANTIZED = 2**23
"""Most int8 weights that are dequantized at once; bounds the temporary memory of an output layer."""


class Int8Linear(nn.Module):
    """`y = x Wᵀ + b`: weight int8 [N, K]; scale [N] and bias [N] in the model's dtype; x [..., K]."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight: Tensor
        self.scale: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @property
    def scales(self) -> Tensor:
        """Return what the kernels of `native` take as scales."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., K] → [..., N]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        if len(rows) <= MAX_GEMV_ROWS_INT8:
            out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            out = self._dequantizing_matmul(rows)
        return _add_bias(out, self.bias, x)

    def dequantized_weight(self) -> Tensor:
        """Return the matrix that the layer multiplies by, float32 [N, K]."""
        return self.weight.float() * self.scale.float()[:, None]

    def _dequantizing_matmul(self, rows: Tensor) -> Tensor:
        step, wide = max(1, _MAX_DEQUANTIZED // self.in_features), rows.to(product_dtype(rows.dtype))
        if step >= self.out_features:
            return F.linear(wide, self.weight.to(wide.dtype)).mul_(self.scale).to(rows.dtype)
        out = rows.new_empty(len(rows), self.out_features)
        for start in range(0, self.out_features, step):
            some = slice(start, start + step)
            out[:, some] = F.linear(wide, self.weight[some].to(wide.dtype)).mul_(self.scale[some])
        return out


class Int4Linear(nn.Module):
    """`y = x Wᵀ + b`, each weight is code · scale + zero with a code from -8 to 7.

    weight uint8 [N, K / 2] in torch's packing; scales_and_zeros [K / group_size, N, 2] and bias [N] in the model's
    dtype; x [..., K].
    """

    def __init__(self, weight: Tensor, scales_and_zeros: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[0], 2 * weight.shape[1]
        self.group_size = self.in_features // len(scales_and_zeros)
        self.weight: Tensor
        self.scales_and_zeros: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("scales_and_zeros", scales_and_zeros)
        self.register_buffer("bias", bias)

    @property
    def scales(self) -> Tensor:
        """Return what the kernels of `native` take as scales."""
        return self.scales_and_zeros

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: [..., K] → [..., N]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        packed = len(rows) <= MAX_GEMV_ROWS_INT4 or int4_layout() is None
        out = self._packed_matmul(rows) if packed else self._dequantizing_matmul(rows)
        return _add_bias(out, self.bias, x)

    def dequantized_weight(self) -> Tensor:
        """Return the matrix that the layer multiplies by, float32 [N, K]."""
        identity = torch.eye(self.in_features, dtype=self.scales_and_zeros.dtype)
        return self._packed_matmul(identity).T.float()

    def _packed_matmul(self, rows: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group_size, self.scales_and_zeros)

    def _dequantizing_matmul(self, rows: Tensor) -> Tensor:
        out, wide = rows.new_empty(len(rows), self.out_features), rows.to(product_dtype(rows.dtype))
        step = max(64, _PIECE // self.in_features // 64 * 64)
        for start in range(0, self.out_features, step):
            end = min(start + step, self.out_features)
            out[:, start:end] = wide @ self._dequantized_columns(start, end, wide.dtype)
        return out

    def _dequantized_columns(self, start: int, end: int, dtype: torch.dtype) -> Tensor:
        """Return Wᵀ[:, start:end], [K, end - start]; `start` is a multiple of 64."""
        codes = unpack_int4(self.weight[start:end], cast("tuple[int, bool]", int4_layout())).float()  # [K, n], 0 to 15
        grouped = codes.view(-1, self.group_size, end - start)  # in bfloat16, addcmul takes three times as long
        scale, zero = self.scales_and_zeros[:, start:end].float().unbind(-1)
        zero = (zero - 8 * scale)[:, None].contiguous()
        torch.addcmul(zero, grouped, scale.contiguous()[:, None], out=grouped)
        return codes.to(dtype)


class Int8Embedding(nn.Module):
    """Token embeddings: weight int8 [vocab, width], scale [vocab]; `factor` multiplies the rows (Gemma)."""

    def __init__(self, weight: Tensor, scale: Tensor, factor: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.factor = factor
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: int64 [...] → [..., width]."""
        rows = self.weight[ids].to(self.scale.dtype) * self.scale[ids][..., None]
        return rows if self.factor == 1 else rows * self.factor


def quantize_model(model: PreTrainedModel, bits: int, dtype: torch.dtype) -> None:
    """Quantize a model's linear layers to 4 or 8 bits, in place; its other parameters become `dtype`.

    One matrix at a time, so that memory grows by one matrix at most.
    """
    original = model.dtype
    head, embedding = cast(Any, model.get_output_embeddings()), cast(Any, model.get_input_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    tied = head.weight is embedding.weight
    for name in [name for name, module in model.named_modules() if is_linear(module)]:
        layer = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, quantize_linear(layer, 8 if layer is head else bits, dtype))
    factor = _embedding_factor(embedding, dtype)
    if factor is not None:
        output = model.get_output_embeddings()
        one = tied and isinstance(output, Int8Linear)
        weight, scale = (output.weight, output.scale) if one else quantize_int8(embedding.weight, dtype)
        model.set_submodule(names[id(embedding)], Int8Embedding(weight, scale, factor))
    for parameter in model.parameters():
        if parameter.dtype == original:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def quantize_linear(linear: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Module:
    """Return the layer in `bits`; in 8 if the int4 kernel does not take its size; itself if no kernel does."""
    outputs, inputs = linear.weight.shape
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    if bits == 4 and inputs % GROUP_SIZE == 0 and outputs % 16 == 0:
        return Int4Linear(*quantize_int4(linear.weight, dtype), bias)
    if inputs % 16 == 0:  # torch's int8 kernel reads past the end of other rows
        return Int8Linear(*quantize_int8(linear.weight, dtype), bias)
    return linear


@torch.no_grad()
def quantize_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize [N, K] → int8 [N, K] and scales [N] in `dtype`."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=dtype)
    step = max(1, _PIECE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        scale = (rows.abs().amax(-1) / 127).clamp(min=_min_scale(dtype)).to(dtype)
        codes[start : start + step] = (rows / scale.float()[:, None]).round_().clamp_(-127, 127)
        scales[start : start + step] = scale
    return codes, scales


@torch.no_grad()
def quantize_int4(weight: Tensor, dtype: torch.dtype, group_size: int = GROUP_SIZE) -> tuple[Tensor, Tensor]:
    """Quantize [N, K] → packed uint8 [N, K / 2], scales and zeros [K / group_size, N, 2] in `dtype`."""
    outputs, inputs = weight.shape
    packed, scales = [], []
    step = max(64, _PIECE // inputs // 64 * 64)  # a multiple of the packing's block of outputs
    for start in range(0, outputs, step):
        rows = weight[start : start + step].float()
        codes, scale, zero = _quantize_groups(rows.reshape(-1, group_size), dtype)
        codes = codes.add_(8).to(torch.int32).view(rows.shape)
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        scales.append(torch.stack([scale, zero], -1).view(len(rows), -1, 2).to(dtype))
    return torch.cat(packed), torch.cat(scales).transpose(0, 1).contiguous()


def _quantize_groups(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize float32 [G, group_size] → codes -8 to 7 as float32, scale [G], zero [G]: weight ≈ code · scale + zero.

    Codes span minimum to maximum. A least-squares fit is nearer to the weights but gives a higher perplexity
    (docs/research/kernels).
    """
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=_min_scale(dtype)).to(dtype).float()  # codes must fit the rounded scale
    zero = (low + 8 * scale).to(dtype).float()
    return ((weight - zero) / scale).round_().clamp_(-8, 7), scale[:, 0], zero[:, 0]


def unpack_int4(packed: Tensor, layout: tuple[int, bool]) -> Tensor:
    """Unpack uint8 [N, K / 2], starting at a multiple of 64 outputs → codes 0 to 15, uint8 [K, N].

    layout: outputs of a block, and whether a byte holds outputs n and n + half a block rather than neighbors. Outputs
    that do not fill a block form a smaller block of neighbors.
    """
    block, halves = layout
    count, inputs = len(packed), 2 * packed.shape[1]
    out = torch.empty(inputs, count, dtype=torch.uint8)
    whole = count // block * block
    for start, end, size in ((0, whole, block), (whole, count, count - whole)):
        if start == end:
            continue
        data = packed[start:end].reshape(-1, inputs, size // 2).transpose(0, 1)  # [K, blocks, size / 2]
        place = out[:, start:end].unflatten(1, (-1, 2, size // 2) if halves and size == block else (-1, size // 2, 2))
        low, high = place.unbind(2 if halves and size == block else 3)
        low.copy_(data.bitwise_and(15))
        high.copy_(data.bitwise_right_shift(4))
    return out


@cache
def int4_layout() -> tuple[int, bool] | None:
    """Return the `layout` of this machine's int4 packing, found by packing known codes; None if it is unknown."""
    codes = torch.arange(112 * 32, dtype=torch.int32).mul_(7).remainder_(31).remainder_(16).view(112, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for layout in ((64, True), (32, True), (64, False), (32, False), (16, False), (16, True)):
        if torch.equal(unpack_int4(packed, layout).T.int(), codes):
            return layout
    return None


def _add_bias(out: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out = out if bias is None else out.add_(bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def is_linear(module: nn.Module | None) -> bool:
    """Return whether a module is a plain linear layer; of its subclasses, only Falcon's computes the same."""
    return type(module) is nn.Linear or type(module).__name__ == "FalconLinear"


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is a plain embedding layer, or one that multiplies its rows by a factor."""
    return type(module) is nn.Embedding or type(module).__name__.endswith("TextScaledWordEmbedding")


def _embedding_factor(embedding: nn.Module, dtype: torch.dtype) -> float | None:
    """Return the factor that an embedding layer multiplies its rows by; None for an unknown kind of layer."""
    if not is_embedding(embedding):
        return None
    return 1.0 if type(embedding) is nn.Embedding else float(cast(Tensor, embedding.embed_scale).to(dtype))


def _min_scale(dtype: torch.dtype) -> float:
    """Return the scale of a group of zeros: the smallest normal number."""
    return torch.finfo(dtype).tiny
