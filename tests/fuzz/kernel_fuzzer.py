"""Call the C++ operators with random shapes, strides, dtypes and numbers: right ones, and ones that do not fit.

As a script it loads libraries that were built with sanitizers: `python -m tests.fuzz.kernel_fuzzer COUNT LIBRARY...`.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)
WIDTHS = (1, 2, 7, 16, 31, 32, 33, 64, 80, 96)
REFUSALS = (RuntimeError, IndexError, ValueError, TypeError)


class Fuzzer:
    """Makes calls of operators from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    # -- calls that fit ----------------------------------------------------------------------------------------------

    def rows(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return numbers [..., D], sometimes as a part of a larger tensor, or with two dimensions exchanged."""
        kind = self.random.choice(("dense", "dense", "part", "exchanged")) if len(shape) == 4 else "dense"
        if kind == "part":
            return self.numbers(shape[0], shape[1] + 2, shape[2] + 3, shape[3], dtype=dtype)[:, 1:-1, 2:-1]
        if kind == "exchanged":
            return self.numbers(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)
        return self.numbers(*shape, dtype=dtype)

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if dtype.is_floating_point:
            return torch.randn(shape, generator=self.generator).to(dtype)
        return torch.randint(0, 100, shape, generator=self.generator).to(dtype)

    def decode_attention(self) -> list[Any]:
        pick = self.random.choice
        rows, heads, group, new = (self.random.randint(1, each) for each in (3, 3, 4, 9))
        dim, value_dim, slots, dtype = pick(WIDTHS), pick(WIDTHS), self.random.randint(new, 600), pick(FLOATS)
        tokens = [self.rows(rows, each * heads, new, size, dtype=dtype) for each, size in ((group, dim), (1, dim))]
        held = [self.numbers(rows, heads, slots, size, dtype=dtype) for size in (dim, value_dim)]
        marks = [self.numbers(rows, heads, slots).abs() for _ in range(3)]
        position = self.numbers(rows, heads, slots, dtype=torch.int32)
        return [
            *(*tokens, self.rows(rows, heads, new, value_dim, dtype=dtype), *held, *marks, position),
            self.numbers(rows, new, dtype=torch.int32),
            [self.random.randint(0, slots - new) for _ in range(rows)],
            [self.random.randint(0, 1) for _ in range(rows)],
            *(0.3, 0.6, pick((0.0, 5.0)), pick((0, 8))),
            pick((None, self.numbers(heads * group))),
        ]

    def push_queries(self) -> list[Any]:
        rows, heads, size, new = (self.random.randint(1, each) for each in (3, 6, 40, 50))
        dim, dtype = self.random.choice(WIDTHS), self.random.choice(FLOATS)
        start = self.random.randint(-5, 1000)
        return [
            self.numbers(rows, heads, size, dim, dtype=dtype),
            self.numbers(rows, size, dtype=torch.int32),
            self.rows(rows, heads, new, dim, dtype=dtype),
            torch.arange(start, start + new, dtype=torch.int32).clamp(min=-1).expand(rows, new),
        ]

    def gemv(self) -> list[Any]:
        count, dtype = self.random.randint(1, 3), self.random.choice(FLOATS)
        kinds = ("plain", "int8", "int4") if torch.ops.zsmerge.int4_pack_width() else ("plain", "int8")
        kind = self.random.choice(kinds)
        rows = self.random.randint(1, 20 if dtype != torch.float32 and torch.ops.zsmerge.has_chunks() else 8)
        groups, width = self.random.randint(1, 4), self.random.choice((2, 16, 32, 64, 128))
        inputs = groups * width if kind == "int4" else self.random.choice((*WIDTHS, 300))
        outputs = [
            self.random.randint(1, 3) * 64 if kind == "int4" else self.random.randint(1, 200) for _ in range(count)
        ]
        operands = {
            "plain": lambda n: self.numbers(n, inputs, dtype=dtype),
            "int8": lambda n: self.numbers(n, inputs, dtype=torch.int8),
            "int4": lambda n: self.numbers(n, inputs // 2, dtype=torch.uint8),
        }[kind]
        scales = {"plain": None, "int8": lambda n: (n,), "int4": lambda n: (groups, n, 2)}[kind]
        given = [operands(each) for each in outputs]
        given += [] if scales is None else [self.numbers(*scales(each), dtype=dtype) for each in outputs]
        given += [] if self.random.random() < 0.5 else [self.numbers(each, dtype=dtype) for each in outputs]
        return [self.numbers(rows, inputs, dtype=dtype), given, count]

    def prefill_attention(self) -> list[Any]:
        rows, heads, group, new = (self.random.randint(1, each) for each in (2, 2, 3, 130))
        dim, value_dim = 2 * self.random.randint(1, 40), self.random.choice(WIDTHS)
        slots = new + self.random.randint(0, 400)
        window = self.random.choice((0, 8))
        return [
            self.rows(rows, heads * group, new, dim, dtype=torch.bfloat16),
            self.rows(rows, heads, slots, dim, dtype=torch.bfloat16),
            self.rows(rows, heads, slots, value_dim, dtype=torch.bfloat16),
            [self.random.randint(0, slots - new) for _ in range(rows)],
            *(0.3, self.random.choice((0.0, 5.0)), window),
            self.random.choice((None, self.numbers(rows, heads, slots))),
            self.numbers(rows, new, dtype=torch.int32) if window else None,
            self.numbers(rows, slots, dtype=torch.int32) if window else None,
            self.random.choice((None, self.numbers(heads * group))),
        ]

    def attention_mass(self) -> list[Any]:
        rows, heads, group, count, slots = (self.random.randint(1, each) for each in (2, 2, 4, 70, 500))
        dim = 2 * self.random.randint(1, 40)
        return [
            self.rows(rows, heads * group, count, dim, dtype=torch.bfloat16),
            self.rows(rows, heads, slots, dim, dtype=torch.bfloat16),
            self.numbers(rows, heads, slots),
            self.numbers(rows, count, dtype=torch.int32) - 1,
            self.numbers(rows, heads, slots, dtype=torch.int32),
            *(0.3, self.random.choice((0.0, 5.0))),
            self.random.choice((None, self.numbers(heads * group))),
        ]

    def quantized_gemm(self) -> list[Any]:
        rows, groups, width = (
            self.random.randint(1, 70),
            self.random.randint(1, 4),
            self.random.choice((4, 32, 64, 128)),
        )
        inputs, outputs, is_int4 = groups * width, 64 * self.random.randint(1, 3), self.random.random() < 0.5
        size, dtype = (inputs // 2, torch.uint8) if is_int4 else (inputs, torch.int8)
        return [
            self.numbers(rows, inputs, dtype=torch.bfloat16),
            self.numbers(outputs, size, dtype=dtype),
            self.numbers(*((groups, outputs, 2) if is_int4 else (outputs,)), dtype=torch.bfloat16),
            self.random.choice((None, self.numbers(outputs, dtype=torch.bfloat16))),
        ]

    # -- calls that do not -------------------------------------------------------------------------------------------

    def spoiled(self, arguments: list[Any]) -> list[Any]:
        """Return the arguments with one of them changed."""
        spoiled = list(arguments)
        index = self.random.randrange(len(spoiled))
        value = spoiled[index]
        if isinstance(value, Tensor):
            spoiled[index] = self._other_tensor(value)
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            at = self.random.randrange(len(value))
            spoiled[index] = self.random.choice(
                ([*value[:at], self._other_tensor(value[at]), *value[at + 1 :]], value[:at], [*value, value[at]], [])
            )
        elif isinstance(value, list):
            at = self.random.randrange(len(value))
            wrong = self.random.choice((-1, 10**6, 2**62, -(2**62), 600))
            spoiled[index] = self.random.choice(([*value[:at], wrong, *value[at + 1 :]], value[:-1], [*value, 0]))
        elif value is None:
            spoiled[index] = self.numbers(self.random.randint(0, 3), dtype=self.random.choice(DTYPES))
        elif isinstance(value, int):
            spoiled[index] = self.random.choice((-1, 0, 1, 7, 2**40))
        return spoiled

    def _other_tensor(self, tensor: Tensor) -> Tensor | None:
        dim = self.random.randrange(tensor.dim())
        size = tensor.shape[dim]
        return self.random.choice(
            (
                lambda: tensor.narrow(dim, 0, size // 2).contiguous(),
                lambda: tensor.narrow(dim, 0, size - 1).contiguous(),
                lambda: tensor.narrow(dim, 0, 0).contiguous(),
                lambda: torch.cat([tensor, tensor], dim),
                lambda: tensor.unsqueeze(dim),
                lambda: tensor.select(dim, 0).contiguous() if size else tensor,
                lambda: tensor.flatten(),
                lambda: tensor.to(self.random.choice(DTYPES)),
                lambda: tensor.transpose(dim, -1),
                lambda: torch.cat([tensor, tensor], -1)[..., ::2],
                lambda: tensor.narrow(dim, 0, min(size, 1)).expand(tensor.shape),
                lambda: tensor.reshape(tensor.shape[::-1]),
                lambda: tensor.new_empty(0),
                lambda: tensor.to("meta"),
            )
        )()


OPERATORS = ("decode_attention", "push_queries", "gemv", "prefill_attention", "attention_mass", "quantized_gemm")
NEEDED = {
    "prefill_attention": "has_bf16_products",
    "attention_mass": "has_bf16_products",
    "quantized_gemm": "has_int8_products",
}
"""Operators that not every processor has, and what tells whether this one does."""


def fuzz(count: int, seed: int = 0, report: Callable[[str], None] = lambda text: None) -> Counter[str]:
    """Call operators `count` times as they are meant, and each time once more with an argument that is not.

    Returns how many calls were answered, and how many refused. A call that fits is never refused. Only operators that
    are loaded, and that this processor has, are called.
    """
    fuzzer, found = Fuzzer(seed), Counter[str]()
    loaded = [name for name in OPERATORS if hasattr(torch.ops.zsmerge, name)]
    loaded = [name for name in loaded if name not in NEEDED or getattr(torch.ops.zsmerge, NEEDED[name])()]
    for index in range(count):
        name = loaded[index % len(loaded)]
        arguments = getattr(fuzzer, name)()
        operator = getattr(torch.ops.zsmerge, name)
        operator(*arguments)
        found["answered"] += 1
        spoiled = fuzzer.spoiled(arguments)
        report(f"{index} {name} {_describe(spoiled)}")
        try:
            operator(*spoiled)
            found["answered though spoiled"] += 1
        except REFUSALS:
            found["refused"] += 1
    return found


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}/{value.stride()}"
    return f"[{', '.join(map(_describe, value))}]" if isinstance(value, list) else repr(value)


if __name__ == "__main__":
    for library in sys.argv[2:]:
        torch.ops.load_library(library)
    print(dict(fuzz(int(sys.argv[1]), report=lambda text: print(text, file=sys.stderr, flush=True))))
