"""Cached models are checked at each load, and a session belongs to every byte of the weights it was made with."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny_folders import load_tiny, unreachable
from tests.support.gguf_writer import random_model, write_gguf
from tests.support.tiny_models import tiny_model
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import CorruptModelError, DeviceMemoryError, LoadError, ModelNotFoundError, UntrustedFolderError
from zsmerge_llm.kvcache.layer_cache import LayerCache
from zsmerge_llm.kvcache.slots import LayerSpec
from zsmerge_llm.models import gguf, hub, integrity
from zsmerge_llm.models.weight_files import stored_weights
from zsmerge_llm.sessions.fingerprint import fingerprint, tokenizer_digest

NAME, OLD, NEW = "owner/tiny", "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder for a test, and no network."""
    monkeypatch.setenv("ZSMERGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    where = tmp_path_factory.mktemp("models")
    file = write_gguf(where / "tiny.gguf", random_model("llama", tie_word_embeddings=True), "llama")
    return gguf.convert_once(file, where / "tiny", lambda step: None)


@pytest.fixture
def copies(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Snapshots of a model as huggingface_hub keeps them: links to files that are named by their content."""
    root = tmp_path / "hub" / "models--owner--tiny"
    for revision in (OLD, NEW):
        (root / "snapshots" / revision).mkdir(parents=True)
        for file in original.iterdir():
            content = file.read_bytes()
            large = file.suffix == ".safetensors"
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            blob = root / "blobs" / (hashlib.sha256(content).hexdigest() if large else git)
            blob.parent.mkdir(exist_ok=True)
            blob.write_bytes(content)
            (root / "snapshots" / revision / file.name).symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    return root


def flip(path: Path, where: int = -5) -> None:
    """Change a byte of a file, and leave its size and time of modification as they were."""
    content, times = bytearray(path.read_bytes()), path.stat()
    content[where] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_cached_hub_model_whose_weights_were_changed_is_refused(copies: Path) -> None:
    weights = copies / "snapshots" / OLD / "model.safetensors"
    assert load_tiny(NAME).source == weights.parent
    flip(weights)
    with pytest.raises(CorruptModelError, match=rf"model\.safetensors has changed .*remove .*{OLD}"):
        load_tiny(NAME)
    flip(weights)
    load_tiny(NAME)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_hub_model_that_was_changed_before_its_first_use_is_refused_by_the_hubs_own_digests(
    copies: Path, name: str
) -> None:
    flip(copies / "snapshots" / OLD / name)
    for _ in range(2):
        with pytest.raises(CorruptModelError, match=f"{name} has changed"):
            hub.hub_folder(NAME, lambda step: None)


def test_a_hub_model_stays_at_the_revision_that_was_used_first(copies: Path) -> None:
    assert load_tiny(NAME).source.name == OLD  # type: ignore[union-attr]
    (copies / "refs" / "main").write_text(NEW)
    assert hub.hub_folder(NAME, lambda step: None).name == OLD
    assert hub.config_folder(NAME, lambda step: None).name == OLD  # of plans and `explain`
    assert hub.config_folder(f"{NAME}@{NEW}", lambda step: None).name == NEW
    assert load_tiny(f"{NAME}@{NEW}").source.name == NEW  # type: ignore[union-attr]
    shutil.rmtree(copies / "snapshots" / OLD)
    assert hub.hub_folder(NAME, lambda step: None).name == NEW


def test_a_revision_that_is_not_cached_is_asked_for_by_its_name(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def info(*args: Any, **options: Any) -> None:
        asked.append((*args[1:], options["revision"]))
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", info)
    with pytest.raises(ModelNotFoundError, match="cannot be reached"):
        hub.hub_folder(f"{NAME}@v2", lambda step: None)
    assert asked == [(NAME, "v2")]


def test_a_download_gets_the_revision_that_was_asked_about(
    copies: Path, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Info:
        sha = NEW
        siblings = ()

    Info.siblings = tuple(  # type: ignore[assignment]
        type("File", (), {"rfilename": file.name, "size": 1})() for file in original.iterdir()
    )
    asked: list[Any] = []
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: Info)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append(options["revision"]) or str(original)
    )
    hub.hub_folder("owner/other", lambda step: None)
    assert asked == [NEW]


def test_a_converted_model_that_was_changed_is_refused_and_one_that_lacks_a_file_made_again(
    tmp_path: Path, cache: Path
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    load_tiny(file)
    (weights,) = cache.glob("converted/*/tokenizer.json")
    flip(weights)
    with pytest.raises(CorruptModelError, match=r"tokenizer\.json has changed.*converted again"):
        load_tiny(file)
    weights.unlink()
    load_tiny(file)
    assert weights.exists()


def test_a_converted_model_of_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    load_tiny(file)
    (cache / "converted").chmod(0o777)
    with pytest.raises(UntrustedFolderError, match="chmod go-w"):
        load_tiny(file)


def test_a_builtin_model_that_was_changed_on_disk_is_not_converted(cache: Path) -> None:
    (cache / "models").mkdir(mode=0o700, parents=True)
    (cache / "models" / "smollm2.gguf").write_bytes(b"GGUF and more")
    with pytest.raises(CorruptModelError, match=r"smollm2\.gguf is not smollm2: remove it"):
        load_tiny("smollm2")


def test_files_that_are_known_are_not_read_again(original: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(2 * integrity.SETTLED_NS / 1e9)
    first = integrity.weights_digest(original, cache)
    monkeypatch.setattr(integrity, "_digest", lambda path: pytest.fail(f"{path} was read"))
    assert integrity.weights_digest(original, cache) == first


@pytest.mark.parametrize(
    "damage", ["", "[]", "[" * 10_000, '{"model.safetensors": 3}', '{"model.safetensors": [0, 0, 0, 7]}', "\xff", "{}"]
)
def test_records_that_are_damaged_are_made_anew(original: Path, cache: Path, damage: str) -> None:
    expected = integrity.weights_digest(original, cache)
    for record in cache.rglob("*.json"):
        record.write_text(damage, encoding="latin-1")
    assert integrity.weights_digest(original, cache) == expected


def test_records_in_a_folder_that_others_may_write_to_are_not_believed(original: Path, cache: Path) -> None:
    expected = integrity.weights_digest(original, cache)
    (record,) = cache.rglob("*.json")
    known = json.loads(record.read_text())
    record.write_text(json.dumps({name: [*entry[:-1], "0" * 64] for name, entry in known.items()}))
    record.parent.chmod(0o777)
    assert integrity.weights_digest(original, cache) == expected


# -- fingerprints ------------------------------------------------------------------------------------------------------


def print_of(model: Any, tokenizer: Any, digest: str | None = None) -> str:
    return fingerprint(model, tokenizer, None, CacheConfig(), digest).weights


@pytest.fixture(scope="module")
def tokenizer(original: Path) -> Any:
    return load_tiny(original).tokenizer


def test_any_single_value_of_a_model_object_changes_its_fingerprint(tokenizer: Any) -> None:
    model = tiny_model()
    before = print_of(model, tokenizer)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        at = int(torch.randint(len(flat), (1,), generator=generator))
        kept = flat[at].clone()
        flat[at] += 1
        assert print_of(model, tokenizer) != before
        flat[at] = kept
    assert print_of(model, tokenizer) == before


def test_values_that_change_places_change_the_fingerprint(tokenizer: Any) -> None:
    model = tiny_model()
    before = print_of(model, tokenizer)
    weight = model.get_input_embeddings().weight.data
    weight[[3, 4]] = weight[[4, 3]]
    assert print_of(model, tokenizer) != before


def test_the_digest_of_a_tokenizer_is_kept(original: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, again = (load_tiny(original).tokenizer for _ in range(2))
    first = tokenizer_digest(tokenizer)
    kept = [path for path in (cache / "digests").iterdir() if json.loads(path.read_text()) == {"digest": first}]
    with monkeypatch.context() as patch:
        patch.setattr("json.JSONEncoder.iterencode", pytest.fail)
        assert tokenizer_digest(again) == first
    for content in ("", "[]", '{"digest": 1}'):
        kept[0].write_text(content)
        assert tokenizer_digest(tokenizer) == first
    again("a b c d", truncation=True, max_length=2, padding="max_length")
    assert tokenizer_digest(again) == first
    tokenizer.add_tokens(["<another>"])
    assert tokenizer_digest(tokenizer) != first


def test_the_code_of_a_model_that_is_not_transformers_own_belongs_to_its_fingerprint(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    prints = [print_of(tiny_model(), tokenizer)]
    for name, body in (("first_code", "1"), ("second_code", "2"), ("third_code", "1")):
        (tmp_path / f"{name}.py").write_text(
            f"from transformers import LlamaForCausalLM\nclass Own(LlamaForCausalLM):\n    value = {body}\n"
        )
        model = tiny_model()
        model.__class__ = importlib.import_module(name).Own
        prints.append(print_of(model, tokenizer))
    assert len(set(prints)) == 3
    assert prints[1] == prints[3]


def test_an_embedding_of_which_most_was_changed_has_another_fingerprint(tokenizer: Any) -> None:
    model = tiny_model()
    before = print_of(model, tokenizer)
    weight = model.get_input_embeddings().weight.data.view(-1)
    sampled = torch.zeros(len(weight), dtype=torch.bool)
    sampled[:: len(weight) // 64] = True
    weight[~sampled] += 0.5
    assert print_of(model, tokenizer) != before


def test_any_byte_of_a_folders_weights_and_its_config_changes_the_fingerprint(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    digests = {integrity.weights_digest(original, tmp_path / "cache")}
    assert integrity.weights_digest(folder, tmp_path / "cache") in digests  # wherever it is
    for where in (-1, -1000, len((folder / "model.safetensors").read_bytes()) // 2):
        flip(folder / "model.safetensors", where)
        digests.add(integrity.weights_digest(folder, tmp_path / "cache"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    digests.add(integrity.weights_digest(folder, tmp_path / "cache"))
    assert len(digests) == 5


def test_numbers_of_another_kind_from_the_same_files_have_another_fingerprint(original: Path) -> None:
    loaded = [load_tiny(original, dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert loaded[0].weights_digest == loaded[1].weights_digest
    prints = {print_of(each.model, each.tokenizer, each.weights_digest) for each in loaded}
    assert len(prints) == 2


# -- headers -----------------------------------------------------------------------------------------------------------


def gguf_text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    "field",
    [
        gguf_text(b"general.name") + struct.pack("<I", 8) + gguf_text(b"\xff\xfe"),
        gguf_text(b"\xff\xfe") + struct.pack("<II", 4, 1),
        gguf_text(b"general.name") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000,
        gguf_text(b"general.tags") + struct.pack("<IIQ", 9, 8, 2**63),
        gguf_text(b"general.tags") + struct.pack("<IIQ", 9, 4, 2**40) + bytes(1000),
        gguf_text(b"general.name") + struct.pack("<IQ", 8, 2**62) + b"short",
        gguf_text(b"general.name") + struct.pack("<I", 77),
    ],
    ids=["a text", "a name", "nested arrays", "many texts", "many numbers", "a long text", "a type"],
)
def test_a_gguf_field_that_cannot_be_read_is_a_damaged_file(tmp_path: Path, field: bytes) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with pytest.raises(CorruptModelError, match="truncated or damaged"):
        load_tiny(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("field", "value"), [("block_count", 10**6), ("embedding_length", 2**31), ("attention.head_count", 2**31)]
)
def test_a_gguf_file_that_claims_a_larger_model_than_it_holds_is_refused(
    tmp_path: Path, field: str, value: int
) -> None:
    file = write_gguf(tmp_path / "a.gguf", random_model("llama"), "llama")
    content = file.read_bytes()
    at = content.index(f"llama.{field}".encode()) + len(f"llama.{field}") + 4
    file.write_bytes(content[:at] + struct.pack("<I", value) + content[at + 4 :])
    with pytest.raises(CorruptModelError, match=rf"{field} \({value}\).* does not fit its tensors"):
        load_tiny(file)


def test_gguf_tensors_inside_one_another_are_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "a.gguf", random_model("llama"), "llama")
    content = file.read_bytes()
    name = b"blk.1.attn_q.weight"
    at = content.index(name) + len(name) + 4 + 16 + 4
    file.write_bytes(content[:at] + bytes(8) + content[at + 8 :])
    with pytest.raises(CorruptModelError, match="inside another tensor"):
        load_tiny(file)


@pytest.mark.parametrize(
    "change",
    [{"num_hidden_layers": 10**9}, {"vocab_size": 10**12}, {"hidden_size": -8}, {"hidden_size": 10**7}],
)
def test_a_config_that_claims_a_larger_model_than_its_weights_is_refused(
    original: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CorruptModelError, match=r"config\.json"):
        load_tiny(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json"])
def test_json_that_is_nested_too_deep_is_refused(original: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    (folder / name).write_text('{"a":' * 100_000)
    with pytest.raises(LoadError):
        load_tiny(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800000]}}',
        b'{"a": {"dtype": 4, "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 8], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [8, 0]}}',
        b'{"a":' * 50_000,
    ],
)
def test_a_safetensors_header_that_does_not_fit_its_file_is_refused(
    original: Path, tmp_path: Path, header: bytes
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "copy"))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert stored_weights(folder) is None
    with pytest.raises(CorruptModelError):
        load_tiny(folder)


def test_a_header_takes_no_memory_that_its_file_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 90 * 2**20) + b"{}")
    tracemalloc.start()
    try:
        assert stored_weights(tmp_path) is None
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("heads", [10**4, 10**9])
def test_a_cache_of_more_slots_than_memory_is_a_memory_error(heads: int) -> None:
    spec = LayerSpec(heads, heads, 4096, 4096, None, torch.float32, torch.device("cpu"))
    with pytest.raises(DeviceMemoryError, match="give fewer"):
        LayerCache(CacheConfig(slots=10**6), spec, 1)
