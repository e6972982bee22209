"""Folders, model objects and settings, and everything that can be wrong with them."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.tiny_folders import load_tiny, logits
from tests.support.gguf_writer import TEMPLATE, random_model
from zsmerge_llm.errors import (
    ConfigError,
    CorruptModelError,
    MissingDependencyError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from zsmerge_llm.models import device as hardware
from zsmerge_llm.models.loader import load

# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_loads_in_evaluation_mode_without_gradients(folder: Path) -> None:
    loaded = load_tiny(str(folder), dtype="bf16")
    assert not loaded.model.training
    assert loaded.model.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.name == folder.name
    assert loaded.source == folder


@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_tied_weights_give_the_logits_of_the_model_that_was_saved(
    folder: Path, tmp_path: Path, tied: bool
) -> None:
    model = random_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    loaded = load_tiny(tmp_path).model

    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


def test_a_model_that_brings_code_of_its_own_is_refused_and_none_of_it_runs(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    own = {"model_type": "its-own", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps({**settings, **own}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedModelError, match=r"code of its own, which is not run.*trust_remote_code=True"):
        load_tiny(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_loading_says_nothing_of_its_own_and_leaves_the_log_as_it_was(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    load_tiny(folder)
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
        load_tiny(tmp_path / "m")


def test_weights_that_lack_tensors_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = _copy(folder, tmp_path / "m") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CorruptModelError, match=r"lack 1 tensors \(model\.layers\.1\.mlp\.up_proj"):
        load_tiny(tmp_path / "m")


def test_a_folder_without_a_tokenizer_takes_one_by_argument(folder: Path, tmp_path: Path) -> None:
    bare = _copy(folder, tmp_path / "m", without="tokenizer")
    with pytest.raises(ModelNotFoundError, match="pass tokenizer="):
        load_tiny(bare)
    assert load_tiny(bare, tokenizer=folder).tokenizer.tokenize("hello") == ["hello"]
    with pytest.raises(ConfigError, match="tokenizer must be"):
        load_tiny(bare, tokenizer=3)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', "encoder-decoder.*T5ForCond"),
        ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "not a causal.*BertForMaskedLM"),
        ('{"model_type": "bert"}', r"not a causal.*\(Bert\)"),
        ('{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}', "SequenceClassification"),
        ('{"model_type": "vit", "architectures": ["ViTModel"]}', "not a causal.*ViTModel"),
        ('{"model_type": "something-new"}', "not a model that this version of transformers knows"),
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


# --- model objects ----------------------------------------------------------------------------------------------------


def test_a_model_object_is_taken_as_it_is(folder: Path) -> None:
    first = load_tiny(folder)
    model = random_model("llama").train()
    loaded = load(model, tokenizer=first.tokenizer)
    assert loaded.model is model
    assert model.training
    assert loaded.tokenizer is first.tokenizer
    assert (loaded.name, loaded.source) == ("LlamaForCausalLM", None)


def test_a_model_object_that_knows_its_folder_finds_its_tokenizer(folder: Path) -> None:
    assert load(load_tiny(folder).model).tokenizer.tokenize("hello") == ["hello"]


def test_a_model_object_without_a_name_needs_its_tokenizer() -> None:
    with pytest.raises(ConfigError, match="pass tokenizer="):
        load(random_model("llama"))


@pytest.mark.parametrize("change", [{"quantization": "nf4"}, {"dtype": "float16"}, {"device": "cpu"}])
def test_a_model_object_cannot_be_changed(folder: Path, change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(change))} cannot be applied to a model that is loaded"):
        load(random_model("llama"), tokenizer=folder, **change)


def test_something_that_is_no_model_is_refused() -> None:
    wrong: Any = 3
    with pytest.raises(ConfigError, match="not int"):
        load(wrong)


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
    load_tiny(folder, device="auto", device_map={"": "cpu"})
    load_tiny(folder)
    assert asked == [{"": "cpu"}, None]


def test_a_chat_template_replaces_the_models_own_and_not_the_callers(folder: Path, tmp_path: Path) -> None:
    mine = load_tiny(folder).tokenizer
    loaded = load_tiny(folder, tokenizer=mine, chat_template="{{ messages[0].content }}")
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert mine.chat_template == TEMPLATE
    (tmp_path / "t.jinja").write_text("{{ 1 }}")
    assert load_tiny(folder, chat_template=str(tmp_path / "t.jinja")).tokenizer.chat_template == "{{ 1 }}"
    with pytest.raises(ConfigError, match="neither Jinja text nor a file"):
        load_tiny(folder, chat_template="none.jinja")


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
    model = load_tiny(folder, **settings).model
    expected = logits(_with_weights_of(model, load_tiny(folder).model))
    with caplog.at_level(logging.WARNING, logger="bitsandbytes"):
        for _ in range(3):
            found = logits(model)
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
    heavy = "{'torch', 'transformers', 'gguf', 'huggingface_hub'}"
    code = f"import sys, zsmerge_llm.models.loader; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
