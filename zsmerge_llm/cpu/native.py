"""C++ operators for CPUs (`csrc/`): compiled once on a machine, then loaded from a cache folder.

A `can_...` function tells which inputs an operator takes; callers use plain PyTorch for all others.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, partial
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from zsmerge_llm.cpu.quantized_linear import int4_layout
from zsmerge_llm.cpu.trusted_files import digest, writable_folder
from zsmerge_llm.errors import UnsupportedModelError
from zsmerge_llm.paths import cache_folder, check_folder, check_owner, private_folder

DECODE_SOURCES = (
    *("simd", "shapes", "quantization", "dot", "dot_avx512", "dot_avx2", "int4_avx2", "float_chunk"),
    *("gemv", "decode_attention", "packaged_step"),
)
PREFILL_SOURCES = ("simd", "shapes", "quantization", "quantized_gemm", "prefill_attention")
"""Files of `csrc/` that are compiled together, in this order."""
MAX_ROWS = 8
"""Most rows of `gemv`, and most tokens a row of `decode_attention` (docs/research/kernels)."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PANEL = 64
"""`quantized_gemm` multiplies by so many outputs at a time: a block of torch's int4 packing for AVX-512."""
FLAGS = ("-O3", "-DNDEBUG", "-ffp-contract=fast", "-fno-math-errno")


# -- building ----------------------------------------------------------------------------------------------------------


@cache
def build(sources: Sequence[str] = DECODE_SOURCES) -> None:
    """Load operators; compile them first if this machine has not. That takes 15 s for decoding, 10 s for prefill.

    Raises:
        UnsupportedModelError: no C++ compiler, or it fails; the message quotes it.
    """
    library = _library_path(sources)
    try:
        if _is_trusted(library):
            torch.ops.load_library(library)
        else:
            _compile_and_load(_source(sources), library)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        raise UnsupportedModelError(f"The C++ kernels could not be built: {str(reason).strip()[-1000:]}") from error
    if sources == DECODE_SOURCES:
        _register_fakes()
        int4_pack_width()  # cached here: it cannot run while a graph is traced


@cache
def _register_fakes() -> None:
    """Tell torch the shapes of what operators return. Once: before torch 2.13 a second time is an error."""
    torch.library.register_fake("zsmerge::gemv", _fake_gemv)
    torch.library.register_fake("zsmerge::attend_slots", _fake_attend_slots)


def find_compiler() -> str | None:
    """Return the path of the C++ compiler that kernels and layers are compiled with; None where there is none."""
    return shutil.which((os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")).split()[0])


def library_name(sources: Sequence[str]) -> str:
    """Return a name for compiled sources: another for each version of torch, processor, flags and text."""
    return _library_path(sources).name


def is_built(sources: Sequence[str]) -> bool:
    """Return whether this machine has compiled these sources, so that `build` only loads them."""
    library = _library_path(sources)
    return library.exists() and _digest_path(library).exists()


def _is_trusted(library: Path) -> bool:
    """Return whether a library is there as the user wrote it, in a folder that nobody else may write to."""
    try:
        check_folder(library.parent)
        check_owner(library)
        check_owner(_digest_path(library))
        return _digest_path(library).read_text(encoding="utf-8") == digest(library)
    except (OSError, ValueError):
        return False


def _digest_path(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _compile_and_load(source: str, library: Path) -> None:
    """Compile in a private folder and move the result to its place at once: other processes never see half a file."""
    parent = writable_folder(partial(private_folder, library.parent), "C++ kernels are compiled again by each process")
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        compiled = _compile(source, Path(folder))
        if parent is not None:
            written = _digest_path(compiled)
            written.write_text(digest(compiled), encoding="utf-8")
            compiled = compiled.replace(library)
            written.replace(_digest_path(library))
        torch.ops.load_library(compiled)


def _compile(source: str, folder: Path) -> Path:
    from torch.utils.cpp_extension import get_cxx_compiler, include_paths, library_paths  # slow import

    code, library = folder / "kernels.cpp", folder / "kernels.so"
    code.write_text(source, encoding="utf-8")
    paths = [f"-I{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    mac = ("-Xclang", "-fopenmp", "-lomp", "-undefined", "dynamic_lookup")
    system = mac if sys.platform == "darwin" else ("-march=native", "-fopenmp")
    output = ["-w", "-std=c++20", "-shared", "-fPIC", str(code), "-o", str(library)]
    command = [get_cxx_compiler(), *output, *FLAGS, *system, abi, *paths, "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


@cache
def _library_path(sources: Sequence[str]) -> Path:
    """Return where the compiled sources are cached: a name for each version of torch, processor, flags and sources."""
    key = "\n".join([torch.__version__, _processor(), *FLAGS, _source(sources)])
    return cache_folder() / "kernels" / f"{sources[-1]}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def _processor() -> str:
    """Describe the processor and its instruction sets: a home folder may be shared by different machines."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU ")))
    return f"{platform.machine()} {platform.processor()}"


def _source(sources: Sequence[str]) -> str:
    folder = files("zsmerge_llm.cpu").joinpath("csrc")
    return "\n".join(folder.joinpath(f"{name}.cpp").read_text(encoding="utf-8") for name in sources)


# -- decode steps ------------------------------------------------------------------------------------------------------


def can_decode(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `decode_attention` and `push_queries` take these tensors, [B, H, T, D] each."""
    return query.shape[2] <= MAX_ROWS and query.dtype in DTYPES and _are_alike((query, key, value))


def _are_alike(tensors: Sequence[Tensor]) -> bool:
    """Return whether all are on the CPU, of one dtype, and contiguous in the last dimension."""
    return all(each.dtype == tensors[0].dtype and each.is_cpu and each.stride(3) == 1 for each in tensors)


def decode_attention(
    tokens: Sequence[Tensor],
    slots: Sequence[Tensor],
    token_position: Tensor,
    num_filled: Sequence[int],
    active: Sequence[int],
    *,
    scaling: float,
    alpha: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Append new tokens to a layer's slots and attend causally from them to all slots: [B, Hq, T, D].

    Args:
        tokens: queries [B, Hq, T, D], keys and values [B, H, T, D], for which `can_decode` holds.
        slots: keys, values [B, H, P, D]; multiplicity, score, cumulative attention float32 [B, H, P]; position int32
            [B, H, P]. Written to.
        token_position: int32 [B, T].
        num_filled: slots in use, for each of the B rows; the tokens are written after them.
        active: 1 for each row that has new tokens; another's stay unseen, and its output means nothing.
        scaling: factor of the logits. softcap: logits become softcap * tanh(logits / softcap).
        alpha: alpha * log(multiplicity) is added to the logits (ZSMerge, Eq. 8).
        window: sliding window in tokens. sinks: attention-sink logits [Hq].
    """
    output: Tensor = torch.ops.zsmerge.decode_attention(
        *tokens, *slots, token_position, num_filled, active, scaling, alpha, softcap or 0.0, window or 0, sinks
    )
    return output


def push_queries(queries: Tensor, query_position: Tensor, new_queries: Tensor, new_position: Tensor) -> None:
    """Write new_queries [B, Hq, T, D] into the ring queries [B, Hq, W, D], by position mod W, in place.

    new_position: int32 [B, T], -1 for padding. query_position: int32 [B, W], of the ring's entries.
    """
    torch.ops.zsmerge.push_queries(queries, query_position, new_queries, new_position)


def can_gemv(x: Tensor, weight: Tensor) -> bool:
    """Return whether `gemv` takes x [..., K] and this matrix, and is faster than PyTorch."""
    if not x.is_cpu or x.dtype not in DTYPES or not weight.is_contiguous():
        return False
    if weight.dtype == torch.uint8:
        known = int4_pack_width() > 0 and len(weight) % int4_pack_width() == 0
    else:
        known = weight.dtype in (torch.int8, x.dtype)
    few = x.numel() <= x.shape[-1] * MAX_ROWS
    return known and x.numel() > 0 and (few or (x.dtype != torch.float32 and bool(torch.ops.zsmerge.has_chunks())))


def gemv(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """Multiply x [M, K], of as many rows as `can_gemv` allows, by matrices that share it, + biases if any: [M, N] each.

    A matrix is [N, K] in x's dtype without scales; int8 [N, K] with scales [N]; or uint8 [N, K / 2] in torch's int4
    packing with scales and zeros [K / group, N, 2]. All are of one kind.
    """
    result: list[Tensor] = torch.ops.zsmerge.gemv(x, [*weights, *scales, *biases], len(weights))
    return result


def _fake_gemv(x: Tensor, operands: Sequence[Tensor], num_matrices: int) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in operands[:num_matrices]]


def _fake_attend_slots(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[3])


@cache
def int4_pack_width() -> int:
    """Return how many outputs a block of an int4 matrix has for `gemv`; 0 where it takes none on this machine."""
    width = int(torch.ops.zsmerge.int4_pack_width())
    return width if int4_layout() == (width, True) else 0


# -- prefill -----------------------------------------------------------------------------------------------------------


def has_bf16_products() -> bool:
    """Return whether `prefill_attention` and `attention_mass` run on this processor (AVX512_BF16)."""
    return bool(torch.ops.zsmerge.has_bf16_products())


def has_int8_products() -> bool:
    """Return whether `quantized_gemm` runs on this processor, and faster than dequantizing (VNNI without AMX)."""
    return bool(torch.ops.zsmerge.has_int8_products()) and int4_layout() == (PANEL, True)


def can_prefill(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `prefill_attention` takes query [B, Hq, T, D], key and value [B, H, T, D], given its products."""
    fits = query.shape[2] > MAX_ROWS and query.shape[3] % 2 == 0 and query.dtype == torch.bfloat16
    return fits and _are_alike((query, key, value))


def prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    num_past: Sequence[int],
    *,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None = None,
    bias: Tensor | None = None,
    query_position: Tensor | None = None,
    slot_position: Tensor | None = None,
) -> Tensor:
    """Attend causally from a chunk to all slots, in bfloat16 and without materializing a mask: [B, Hq, T, D].

    Args:
        query: [B, Hq, T, D].
        keys, values: [B, H, C, D], the chunk's own included: query t of row b sees slots 0 to num_past[b] + t.
        bias: float32 [B, H, C], added to the logits.
        query_position, slot_position: int32 [B, T] and [B, C], needed with a sliding `window`.
        scaling, softcap, sinks: as in `decode_attention`.
    """
    output: Tensor = torch.ops.zsmerge.prefill_attention(
        query, keys, values, num_past, scaling, softcap or 0.0, window or 0, bias, query_position, slot_position, sinks
    )
    return output


def attention_mass(
    queries: Tensor,
    keys: Tensor,
    bias: Tensor,
    query_position: Tensor,
    slot_position: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the mean and the maximum attention weight of each slot over the queries: two of float32 [B, H, C].

    Args:
        queries: bfloat16 [B, Hq, m, D]; keys: bfloat16 [B, H, C, D].
        bias: float32 [B, H, C], added to the logits.
        query_position: int [B, m]; a query sees no slot after it; -1: the query is left out.
        slot_position: int32 [B, H, C].
        scaling, softcap, sinks: as in `decode_attention`.
    """
    mean, maximum = torch.ops.zsmerge.attention_mass(
        queries, keys, bias, query_position, slot_position, scaling, softcap or 0.0, sinks
    )
    return mean, maximum


def can_gemm(x: Tensor, weight: Tensor, scales: Tensor) -> bool:
    """Return whether `quantized_gemm` takes x [..., K] and an int4 or int8 matrix, given `has_int8_products`."""
    kinds = x.dtype == scales.dtype == torch.bfloat16 and weight.dtype in (torch.uint8, torch.int8)
    return kinds and x.is_cpu and x.numel() > x.shape[-1] * MAX_ROWS and len(weight) % PANEL == 0


def quantized_gemm(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply a chunk x [..., K] by an int4 or int8 matrix, + bias [N] if any: [..., N].

    A matrix is uint8 [N, K / 2] with scales and zeros [K / group, N, 2], or int8 [N, K] with scales [N].
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    output: Tensor = torch.ops.zsmerge.quantized_gemm(rows, weight, scales, bias)
    return output.view(*x.shape[:-1], len(weight))
