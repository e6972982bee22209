"""Weights of 4 or 8 bits on torch's packed CPU kernels: a transformers model whose linear layers are replaced.

What decodes is bound by reading the weights, so a few rows at a time go through the packed kernels, which read a
quarter or half of the bytes. Many rows (a chunk of a document, a large batch) are bound by arithmetic, where those
kernels lose: for them a matrix is dequantised piece by piece, for the time of the call, and multiplied as usual, unless
kernels of our own serve (`kernels.many`).

4 bits: groups of 32 inputs of one output share a scale and a zero. 8 bits: one scale for each output. The output layer
and the embeddings have 8 bits in both modes, and are one matrix where they are tied. Left as they are: norms, biases,
experts (their weights are no linear layers), GPT-2's Conv1D, and matrices whose sizes the kernels do not take.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

GROUP = 32
FEW_INT4, FEW_INT8 = 32, 12
"""Up to so many rows the packed kernel is faster than dequantising first (measured with AVX-512 and AMX)."""

_PIECE = 2**18
"""Weights worked on at once: their float32 copy stays in a core's cache."""
_SHORT_LIVED = 2**23
"""Weights of 8 bits that are dequantised at once. The output layer is larger."""


class Int8Linear(nn.Module):
    """`y = x Wᵀ + b`, W in 8 bits. weight int8 [N, K], scale [N] and bias [N] in the model's dtype; x [..., K]."""

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
    def ranges(self) -> Tensor:
        """What the kernels take beside the weight."""
        return self.scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        few = len(rows) <= FEW_INT8
        out = torch._weight_int8pack_mm(rows, self.weight, self.scale) if few else self._many(rows)
        return _finish(out, self.bias, x)

    def dequantised(self) -> Tensor:
        """float32 [N, K]: the matrix that the layer multiplies with."""
        return self.weight.float() * self.scale.float()[:, None]

    def _many(self, rows: Tensor) -> Tensor:
        """[M, K] → [M, N]."""
        step = max(1, _SHORT_LIVED // self.in_features)
        if step >= self.out_features:
            return F.linear(rows, self.weight.to(rows.dtype)).mul_(self.scale)
        out = rows.new_empty(len(rows), self.out_features)
        for start in range(0, self.out_features, step):
            some = slice(start, start + step)
            out[:, some] = F.linear(rows, self.weight[some].to(rows.dtype)).mul_(self.scale[some])
        return out


class Int4Linear(nn.Module):
    """`y = x Wᵀ + b`, W in 4 bits: code · scale + zero, codes from -8 to 7.

    weight uint8 [N, K / 2] as the kernel packs it; scales_and_zeros [K / group, N, 2] and bias [N] in the model's
    dtype; x [..., K].
    """

    def __init__(self, weight: Tensor, scales_and_zeros: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape[0], 2 * weight.shape[1]
        self.group = self.in_features // len(scales_and_zeros)
        self.weight: Tensor
        self.scales_and_zeros: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("scales_and_zeros", scales_and_zeros)
        self.register_buffer("bias", bias)

    @property
    def ranges(self) -> Tensor:
        """What the kernels take beside the weight."""
        return self.scales_and_zeros

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] → [..., N]."""
        rows = x.reshape(-1, self.in_features).contiguous()
        few = len(rows) <= FEW_INT4 or layout() is None
        out = self._few(rows) if few else self._many(rows)
        return _finish(out, self.bias, x)

    def dequantised(self) -> Tensor:
        """float32 [N, K]: the matrix that the layer multiplies with."""
        identity = torch.eye(self.in_features, dtype=self.scales_and_zeros.dtype)
        return self._few(identity).T.float()

    def _few(self, rows: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group, self.scales_and_zeros)

    def _many(self, rows: Tensor) -> Tensor:
        """[M, K] → [M, N]."""
        out = rows.new_empty(len(rows), self.out_features)
        step = max(64, _PIECE // self.in_features // 64 * 64)
        for start in range(0, self.out_features, step):
            end = min(start + step, self.out_features)
            out[:, start:end] = rows @ self._columns(start, end)
        return out

    def _columns(self, start: int, end: int) -> Tensor:
        """Wᵀ[:, start:end], [K, end - start]; `start` is a multiple of 64."""
        codes = unpack(self.weight[start:end], cast("tuple[int, bool]", layout())).float()  # [K, n], 0 to 15
        grouped = codes.view(-1, self.group, end - start)  # float32: in bfloat16 torch takes three times as long
        scale, zero = self.scales_and_zeros[:, start:end].float().unbind(-1)
        zero = (zero - 8 * scale)[:, None].contiguous()
        torch.addcmul(zero, grouped, scale.contiguous()[:, None], out=grouped)
        return codes.to(self.scales_and_zeros.dtype)


class Int8Embedding(nn.Module):
    """Token embeddings in 8 bits. weight int8 [vocab, width], scale [vocab]; `factor` multiplies all (Gemma)."""

    def __init__(self, weight: Tensor, scale: Tensor, factor: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.factor = factor
        self.weight: Tensor
        self.scale: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [...] → [..., width]."""
        rows = self.weight[ids].to(self.scale.dtype) * self.scale[ids][..., None]
        return rows if self.factor == 1 else rows * self.factor


def pack(model: PreTrainedModel, bits: int, dtype: torch.dtype) -> None:
    """Turn a model into one with weights of 4 or 8 bits, in place, one matrix at a time; what is left gets `dtype`."""
    given = model.dtype
    head, embedding = cast(Any, model.get_output_embeddings()), cast(Any, model.get_input_embeddings())
    names = {id(module): name for name, module in model.named_modules()}
    tied = head.weight is embedding.weight
    for name in [name for name, module in model.named_modules() if _is_linear(module)]:
        layer = cast(nn.Linear, model.get_submodule(name))
        model.set_submodule(name, packed_linear(layer, 8 if layer is head else bits, dtype))
    factor = _embedding_factor(embedding, dtype)
    if factor is not None:
        output = model.get_output_embeddings()
        one = tied and isinstance(output, Int8Linear)
        weight, scale = (output.weight, output.scale) if one else round_to_int8(embedding.weight, dtype)
        model.set_submodule(names[id(embedding)], Int8Embedding(weight, scale, factor))
    for parameter in model.parameters():
        if parameter.dtype == given:
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def packed_linear(linear: nn.Linear, bits: int, dtype: torch.dtype) -> nn.Module:
    """The layer in 4 bits, in 8 where the 4-bit kernel does not take its size, or itself where neither does."""
    outputs, inputs = linear.weight.shape
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    if bits == 4 and inputs % GROUP == 0 and outputs % 16 == 0:
        return Int4Linear(*round_to_int4(linear.weight, dtype), bias)
    if inputs % 16 == 0:  # the 8-bit kernel reads beyond the end of other rows
        return Int8Linear(*round_to_int8(linear.weight, dtype), bias)
    return linear


@torch.no_grad()
def round_to_int8(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[N, K] → int8 [N, K] and its scales [N] in `dtype`."""
    codes = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), dtype=dtype)
    step = max(1, _PIECE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        scale = (rows.abs().amax(-1) / 127).clamp(min=_smallest(dtype)).to(dtype)
        codes[start : start + step] = (rows / scale.float()[:, None]).round_().clamp_(-127, 127)
        scales[start : start + step] = scale
    return codes, scales


@torch.no_grad()
def round_to_int4(weight: Tensor, dtype: torch.dtype, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """[N, K] → packed uint8 [N, K / 2] and scales_and_zeros [K / group, N, 2] in `dtype`."""
    outputs, inputs = weight.shape
    packed, ranges = [], []
    step = max(64, _PIECE // inputs // 64 * 64)  # the kernel's blocks of rows stay whole
    for start in range(0, outputs, step):
        rows = weight[start : start + step].float()
        codes, scale, zero = _fit(rows.reshape(-1, group), dtype)
        codes = codes.add_(8).to(torch.int32).view(rows.shape)
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        ranges.append(torch.stack([scale, zero], -1).view(len(rows), -1, 2).to(dtype))
    return torch.cat(packed), torch.cat(ranges).transpose(0, 1).contiguous()


def _fit(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [G, group] → codes -8 to 7 as float32, scale [G], zero [G]: weight ≈ codes · scale + zero.

    From the smallest to the largest value. A least-squares fit is nearer to the weights, but predicts text worse.
    """
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=_smallest(dtype)).to(dtype).float()  # the codes are for what is stored
    zero = (low + 8 * scale).to(dtype).float()
    return ((weight - zero) / scale).round_().clamp_(-8, 7), scale[:, 0], zero[:, 0]


def unpack(packed: Tensor, layout: tuple[int, bool]) -> Tensor:
    """Packed uint8 [N, K / 2], from a row that is a multiple of 64 on → uint8 [K, N], 0 to 15.

    layout: (rows of a block, whether a byte holds the rows n and n + half a block, or neighbours).
    The rows that fill no block are a smaller block of neighbours.
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
def layout() -> tuple[int, bool] | None:
    """How this machine's kernel packs, found by packing known codes; None if in no way known here."""
    codes = torch.arange(112 * 32, dtype=torch.int32).mul_(7).remainder_(31).remainder_(16).view(112, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for layout in ((64, True), (32, True), (64, False), (32, False), (16, False), (16, True)):
        if torch.equal(unpack(packed, layout).T.int(), codes):
            return layout
    return None


def _finish(out: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    out = out if bias is None else out.add_(bias)
    return out.view(*x.shape[:-1], out.shape[-1])


def _is_linear(module: nn.Module | None) -> bool:
    """Only plain ones: a subclass may compute something else. Falcon's does not."""
    return type(module) is nn.Linear or type(module).__name__ == "FalconLinear"


def _embedding_factor(embedding: nn.Module, dtype: torch.dtype) -> float | None:
    """What an embedding layer multiplies its rows with; None for one of an unknown kind."""
    if type(embedding) is nn.Embedding:
        return 1.0
    if type(embedding).__name__.endswith("TextScaledWordEmbedding"):
        return float(cast(Tensor, embedding.embed_scale).to(dtype))
    return None


def _smallest(dtype: torch.dtype) -> float:
    """A scale for weights that are all zero."""
    return torch.finfo(dtype).tiny
