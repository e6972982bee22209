"""The header of a GGUF file: read, and every count, offset and size in it compared with what the file holds."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from zsmerge_llm.errors import CorruptModelError, ModelNotFoundError, UnsupportedModelError

EXPERTS = ("qwen2moe", "qwen3moe", "qwen35moe", "gemma4", "gpt-oss", "minimax-m2")
"""Supported architectures with experts."""
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "qwen35", "gemma2", "gemma3", "phi3", "lfm2", "starcoder2", "stablelm"),
    *("falcon", "gpt2", "nemotron", *EXPERTS),
)
"""Supported architectures: their conversion is tested against the original model. Mistral and SmolLM are "llama"."""
REFUSED = {
    "deci": "whose shape differs from layer to layer: transformers has no model of this kind",
}
"""Architectures that transformers names among those of GGUF files, and why they cannot be read all the same."""
SIGMOID = 2
"""llama.cpp's number of the function that weighs MiniMax-M2's experts."""
REMEDY = "load the model's folder or Hub id in safetensors format instead"
TEXT, ARRAY = 8, 9
MOST_LAYERS = 1024
"""Of a list that has a value for each layer."""
NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Types of fields in the file, and bytes of those that are numbers."""
SIZES = ("block_count", "embedding_length", "attention.head_count")
OPTIONAL_SIZES = (
    *("feed_forward_length", "expert_feed_forward_length", "attention.head_count_kv", "vocab_size"),
    *("attention.key_length", "attention.key_length_swa", "attention.value_length"),
    *("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank"),
)
"""Fields from which a model is made: none is larger than the largest dimension of a tensor."""


@dataclass(frozen=True)
class Header:
    """Fields and tensors of a GGUF file. `tensors` are those of the gguf package, mapped from the file."""

    path: Path
    architecture: str
    fields: dict[str, Any]
    tensors: dict[str, Any]

    def get(self, key: str) -> Any:
        """Return a field of the architecture, such as `context_length`, or None if the file lacks it."""
        return self.fields.get(f"{self.architecture}.{key}")


def read_header(path: Path) -> Header:
    """Read a file's fields, and check that it holds all of its tensors.

    Raises:
        ModelNotFoundError: no such file.
        CorruptModelError: an empty, truncated or damaged file, or not a GGUF file at all.
        UnsupportedModelError: an architecture not in ARCHITECTURES, a mixture of experts, or part of a split file.
    """
    from gguf import GGUFReader

    if not path.is_file():
        raise ModelNotFoundError(f"There is no file {path}: check the path.")
    try:
        size = path.stat().st_size
        if size == 0:
            raise CorruptModelError(f"{path} is empty: download it again.")
        if not is_gguf(path):
            raise CorruptModelError(f"{path} is not a GGUF file: give a .gguf file, a model folder or a Hub id.")
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            _check_counts(content)
        reader = GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items() if _is_setting(field)}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        _check_places(list(tensors.values()), size)
    except CorruptModelError:
        raise
    except Exception as error:  # whatever a damaged file makes of numpy
        raise CorruptModelError(f"{path} is truncated or damaged ({error}): download it again.") from error
    header = Header(path, str(fields.get("general.architecture", "")), fields, tensors)
    _check_supported(header)
    _check_sizes(header)
    return header


def _is_setting(field: Any) -> bool:
    """Return whether a field is one value, or numbers of the layers; vocabularies are left to transformers."""
    return len(field.data) <= 1 or (len(field.data) <= MOST_LAYERS and int(field.types[-1]) != TEXT)


def is_gguf(path: Path) -> bool:
    """Return whether a file begins with the GGUF magic number."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _check_counts(content: mmap) -> None:
    """Walk over all fields and tensor infos: the gguf package goes as far as a count says, beyond the file's end, too.

    Raises:
        ValueError, struct.error: a count or a length goes beyond the file, or a type is unknown.
    """
    order = ">" if int.from_bytes(content[4:8], "little") & 0xFFFF == 0 else "<"
    at = 8

    def number(code: str) -> int:
        value: int = struct.unpack_from(order + code, content, at)[0]
        skip(struct.calcsize(order + code))
        return value

    def skip(nbytes: int) -> None:
        nonlocal at
        at += nbytes
        if at > len(content):
            raise ValueError("a field ends behind the file")

    num_tensors, num_fields = number("Q"), number("Q")
    for _ in range(num_fields):
        skip(number("Q"))
        kind, count = number("I"), 1
        if kind == ARRAY:
            kind, count = number("I"), number("Q")
        if kind == TEXT:
            for _ in range(count):
                skip(number("Q"))
        elif kind in NUMBERS:
            skip(count * NUMBERS[kind])
        else:
            raise ValueError(f"a field is of the unknown type {kind}")
    for _ in range(num_tensors):
        skip(number("Q"))
        skip(8 * number("I") + 12)  # sizes, type, offset


def _check_places(tensors: list[Any], size: int) -> None:
    """Check that each tensor is inside the file and that none lies in another. Raises ValueError."""
    end = 0
    for start, nbytes, name in sorted((int(each.data_offset), int(each.n_bytes), each.name) for each in tensors):
        if start < end or start + nbytes > size:
            raise ValueError(f"{name} is outside the file or inside another tensor")
        end = start + nbytes


def _check_supported(header: Header) -> None:
    if header.fields.get("split.count") not in (None, 0, 1):
        raise UnsupportedModelError(
            f"{header.path} is one part of a split file: join the parts with `llama-gguf-split --merge` first."
        )
    if header.architecture in REFUSED:
        raise UnsupportedModelError(
            f"{header.path} holds a {header.architecture} model, {REFUSED[header.architecture]}: {REMEDY}."
        )
    if header.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{header.path} holds a {header.architecture or 'nameless'} model; from GGUF files "
            f"{', '.join(ARCHITECTURES)} can be read: {REMEDY}."
        )
    if header.get("expert_count") and header.architecture not in EXPERTS:
        raise UnsupportedModelError(f"{header.path} holds a mixture of experts: {REMEDY}.")
    if header.architecture == "minimax-m2" and header.get("expert_gating_func") not in (None, SIGMOID):
        raise UnsupportedModelError(f"{header.path} weighs its experts by another function than a sigmoid: {REMEDY}.")
    if "token_embd.weight" not in header.tensors:
        raise CorruptModelError(f"{header.path} holds no weights (a vocabulary only?): give the model's own file.")


def _check_sizes(header: Header) -> None:
    """Refuse fields that claim another model than the tensors are, before memory is taken for it."""
    shapes = {name: [int(size) for size in tensor.shape] for name, tensor in header.tensors.items()}
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blk.")}
    largest = max(max(shape, default=0) for shape in shapes.values())
    claimed = {name: _largest(header.get(name)) for name in (*SIZES, *OPTIONAL_SIZES)}
    wrong = [
        name
        for name, size in claimed.items()
        if not (size is None and name in OPTIONAL_SIZES) and not (type(size) is int and 0 < size <= largest)
    ]
    if claimed["block_count"] != len(blocks):
        wrong.append("block_count")
    if claimed["embedding_length"] != next(iter(shapes["token_embd.weight"]), 0):
        wrong.append("embedding_length")
    if not wrong and claimed["attention.head_count"] * (claimed["attention.key_length"] or 1) > largest:
        wrong.append("attention.key_length")
    if wrong:
        field = f"{wrong[0]} ({claimed[wrong[0]]!r})"
        raise CorruptModelError(f"The field {field} of {header.path} does not fit its tensors: download it again.")


def _largest(value: Any) -> Any:
    """Return the largest number of a list that has one for each layer, or the field's only value."""
    return max(value, default=0) if isinstance(value, list) else value
