"""Headers and settings of model files that nobody would write: an error of our own, or a model, and never more memory.

The process may allocate two gigabytes beside what it has: a file that claims more is refused before.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.models.tiny_folders import load_tiny
from tests.support.gguf_writer import random_model, write_gguf
from zsmerge_llm.errors import ZSMergeError
from zsmerge_llm.models import gguf
from zsmerge_llm.models.description import describe
from zsmerge_llm.models.loader import load_tokenizer

ROOM = 2 << 30
EDGES = (0, 1, 2, 8, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
EXAMPLES, MANY = 50, 700
"""Inputs of each of six kinds, by default and in the slow suite."""
OUTCOMES: Counter[str] = Counter()


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let the process allocate `ROOM` more bytes of addresses than it has, and no more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(kind: str, read: Callable[[], Any]) -> bool:
    """Read a file, and count what came of it; return whether it was accepted. Other errors than ours leave here."""
    try:
        with limited_memory():
            read()
    except ZSMergeError as error:
        OUTCOMES[f"{kind}: {type(error).__name__}"] += 1
        return False
    OUTCOMES[f"{kind}: accepted"] += 1
    return True


def many(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of hypothesis with few inputs, and with many in the slow suite."""

    @pytest.mark.parametrize("examples", [EXAMPLES, pytest.param(MANY, marks=pytest.mark.slow)])
    def run(examples: int, root: Path) -> None:
        OUTCOMES.clear()
        chosen = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        chosen(given(st.data())(lambda data: test(data, root)))()
        assert OUTCOMES.total() >= examples // 2
        print(json.dumps(OUTCOMES))  # pytest -s

    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny_models(tmp_path_factory.mktemp("fuzz")) as where:
        yield where


@contextmanager
def tiny_models(where: Path) -> Iterator[Path]:
    """Fill a folder with a tiny model as a GGUF file and as a folder, and a cache folder for what is made of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZSMERGE_CACHE_DIR", str(where / "cache"))
        file = write_gguf(where / "tiny.gguf", random_model("llama", tie_word_embeddings=True), "llama")
        folder = gguf.convert_once(file, where / "tiny", lambda step: None)
        load_tiny(folder)
        (where / "originals").mkdir()
        for each in folder.iterdir():
            (where / "originals" / each.name).write_bytes(each.read_bytes())
        yield where


# -- GGUF --------------------------------------------------------------------------------------------------------------


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


names = st.sampled_from(
    [
        *(b"general.architecture", b"general.alignment", b"split.count", b"llama.block_count", b"llama.context_length"),
        *(b"llama.embedding_length", b"llama.attention.head_count", b"llama.expert_count", b"tokenizer.ggml.tokens"),
        *(b"tokenizer.ggml.model", b"llama.rope.scaling.type", b"\xff\xfe", b""),
    ]
)
numbers = st.sampled_from(EDGES) | st.integers(0, 2**64 - 1)
strings = st.sampled_from([b"llama", b"qwen2", b"\xff\xff", b"", b"mamba"]) | st.binary(max_size=12)


@st.composite
def values(draw: st.DrawFn, depth: int = 0) -> bytes:
    """A value with its type, which may claim more than it has."""
    kind = draw(st.integers(0, 13))
    if kind == 8:
        content = draw(strings)
        claimed = draw(st.just(len(content)) | numbers)
        return struct.pack("<IQ", 8, claimed) + content
    if kind == 9 and depth < 3:
        inner = draw(values(depth=depth + 1))
        return struct.pack("<I", 9) + inner[:4] + struct.pack("<Q", draw(st.integers(0, 3) | numbers)) + inner[4:]
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    return struct.pack("<IQ", kind, draw(numbers))[: 4 + sizes.get(kind, 8)]


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A GGUF file: of any fields and tensors, with counts that need not be true."""
    fields = [text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")] * draw(st.booleans())
    fields += [text(draw(names)) + draw(values()) for _ in range(draw(st.integers(0, 4)))]
    tensors = []
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([b"token_embd.weight", b"output.weight", b"blk.0.attn_q.weight", b"\xff"]))
        dims = draw(st.lists(st.sampled_from([1, 4, 32, *EDGES]), max_size=5))
        shape = struct.pack(f"<I{len(dims)}Q", draw(st.just(len(dims)) | st.integers(0, 2**32 - 1)), *dims)
        tensors.append(text(name) + shape + struct.pack("<IQ", draw(st.integers(0, 45)), draw(numbers)))
    counts = draw(st.just((len(tensors), len(fields))) | st.tuples(numbers, numbers))
    version = draw(st.sampled_from([3, 3, 3, 2, 1, 0, 3 << 24]))
    padding = b"\0" * draw(st.integers(0, 4096))
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(fields + tensors) + padding


@st.composite
def edits(draw: st.DrawFn, content: bytes, region: int) -> bytes:
    """Bytes with some of the first `region` overwritten, or cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(4, region - 9))
        new = draw(st.binary(min_size=1, max_size=4) | numbers.map(lambda number: struct.pack("<Q", number)))
        changed[at : at + len(new)] = new
    end = draw(st.just(len(changed)) | st.integers(0, len(changed)))
    return bytes(changed[:end])


def convert(file: Path, where: Path) -> None:
    """Convert a file to a model folder, and remove it."""
    shutil.rmtree(gguf.convert_once(file, where / "converted", lambda step: None))


@many
def test_made_up_gguf_headers_end_in_errors_of_our_own(data: st.DataObject, root: Path) -> None:
    file = root / "made-up.gguf"
    file.write_bytes(data.draw(headers()))
    outcome("GGUF header", lambda: convert(file, root))
    outcome("GGUF config", lambda: describe(file))


@many
def test_damaged_gguf_headers_end_in_errors_of_our_own(data: st.DataObject, root: Path) -> None:
    file = root / "damaged.gguf"
    original = (root / "tiny.gguf").read_bytes()
    file.write_bytes(data.draw(edits(original, 12_000)))
    outcome("damaged GGUF", lambda: convert(file, root))


# -- safetensors -------------------------------------------------------------------------------------------------------

deep = st.sampled_from([400, 5_000, 100_000]).map(lambda depth: Raw("[" * depth + "]" * depth))
odd = st.sampled_from([*EDGES, -1, -(2**63), 1e308, 0.5, "", "F32", "\ud800", None, True, [], {}, [0, 2**64], {"a": 1}])
anything = odd | deep | st.integers() | st.text(max_size=8)


class Raw(str):
    """JSON that `json.dumps` would not write."""


def dumps(value: Any) -> bytes:
    """Return JSON, with raw parts as they are."""
    if isinstance(value, Raw):
        return value.encode()
    if isinstance(value, dict):
        return b"{" + b",".join(json.dumps(key).encode() + b":" + dumps(each) for key, each in value.items()) + b"}"
    return json.dumps(value).encode()


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one of its parts replaced, removed or doubled."""
    if not isinstance(value, dict) or not value or draw(st.integers(0, 5)) == 0:
        return draw(anything)
    key = draw(st.sampled_from(sorted(value)))
    kind = draw(st.sampled_from(["change", "change", "change", "remove", "add"]))
    if kind == "remove":
        return {name: each for name, each in value.items() if name != key}
    if kind == "add":
        return {**value, draw(st.text(max_size=5)): value[key]}
    return {**value, key: draw(changed(value[key]))}


@st.composite
def documents(draw: st.DrawFn, original: bytes) -> bytes:
    """A JSON file with some of it changed: values, or bytes."""
    kind = draw(st.sampled_from(["values", "values", "values", "bytes", "cut", "anything"]))
    if kind == "bytes" and len(original) > 20:
        return draw(edits(original, len(original)))
    if kind == "cut":
        return original[: draw(st.integers(0, len(original)))]
    if kind == "anything":
        return draw(st.binary(max_size=20) | anything.map(dumps))
    value = json.loads(original)
    for _ in range(draw(st.integers(1, 3))):
        value = draw(changed(value))
    return dumps(value)


@contextmanager
def with_file(root: Path, name: str, content: bytes) -> Iterator[Path]:
    """Let a file of the tiny model hold something else."""
    (root / "tiny" / name).write_bytes(content)
    try:
        yield root / "tiny"
    finally:
        if (root / "originals" / name).is_file():
            (root / "tiny" / name).write_bytes((root / "originals" / name).read_bytes())
        else:
            (root / "tiny" / name).unlink()


@many
def test_damaged_safetensors_headers_end_in_errors_of_our_own(data: st.DataObject, root: Path) -> None:
    original = (root / "originals" / "model.safetensors").read_bytes()
    size = int.from_bytes(original[:8], "little")
    header = data.draw(documents(original[8 : 8 + size]))
    claimed = data.draw(st.just(len(header)) | numbers)
    with with_file(root, "model.safetensors", struct.pack("<Q", claimed) + header + original[8 + size :]) as folder:
        outcome("safetensors", lambda: load_tiny(folder))


@many
def test_damaged_configs_end_in_errors_of_our_own(data: st.DataObject, root: Path) -> None:
    content = data.draw(documents((root / "originals" / "config.json").read_bytes()))
    with with_file(root, "config.json", content) as folder:
        outcome("config.json", lambda: load_tiny(folder))


@many
def test_damaged_generation_configs_end_in_errors_of_our_own(data: st.DataObject, root: Path) -> None:
    content = data.draw(documents((root / "originals" / "generation_config.json").read_bytes()))
    with with_file(root, "generation_config.json", content) as folder:
        outcome("generation_config.json", lambda: load_tiny(folder))


@many
def test_damaged_tokenizer_files_end_in_errors_of_our_own(data: st.DataObject, root: Path) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]))
    original = root / "originals" / name
    content = data.draw(documents(original.read_bytes() if original.is_file() else b'{"eos_token": "<|im_end|>"}'))
    with with_file(root, name, content) as folder:
        outcome(name, lambda: load_tokenizer(folder))
