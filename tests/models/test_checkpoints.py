"""Checkpoints that are quantized already: loaded by transformers, or refused by name before weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from tests.models.tiny_folders import load_tiny
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from zsmerge_llm.models import checkpoints
from zsmerge_llm.models.loader import load

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
SIZES = {"hidden_size": 128, "intermediate_size": 256}
IDS = tokens(24)


def quantized(folder: Path, target: Path, settings: dict[str, Any]) -> Path:
    """A copy of a model folder whose config.json says that its weights are quantized."""
    shutil.copytree(folder, target)
    return describe(target, settings)


def describe(folder: Path, settings: dict[str, Any]) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    return folder


@pytest.fixture
def no_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize(
    ("settings", "packages"),
    [
        (GPTQ, "optimum gptqmodel"),
        (AWQ, "gptqmodel"),
        (COMPRESSED, "compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": {"default": {}}}, "torchao"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"quant_method": "quanto", "weights": "int8"}, "optimum-quanto"),
    ],
    ids=["gptq", "awq", "compressed-tensors", "torchao", "bitsandbytes", "quanto"],
)
def test_a_quantized_checkpoint_names_the_packages_that_it_needs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], packages: str
) -> None:
    monkeypatch.setattr(checkpoints, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=rf"needs .*: pip install {packages}$"):
        load(quantized(folder, tmp_path / "m", settings), device="cpu")


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize("settings", [GPTQ, AWQ, COMPRESSED, FP8], ids=lambda each: each["quant_method"])
@pytest.mark.parametrize("quantization", ["int4", "nf4"])
def test_quantization_on_top_of_a_quantized_checkpoint_is_refused(
    folder: Path, tmp_path: Path, settings: dict[str, Any], quantization: str
) -> None:
    expected = rf"quantized already \({settings['quant_method']}\).*'{quantization}' cannot be applied: leave it out"
    with pytest.raises(ConfigError, match=expected):
        load(quantized(folder, tmp_path / "m", settings), quantization=quantization, device="cpu")


@pytest.mark.usefixtures("no_weights_are_read")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quant_method": "something-new"}, "quantized by something-new, which this version of transformers does not"),
        ({"bits": 4}, "quantized by an unknown method"),
        ({"quant_method": "fbgemm_fp8"}, r"fbgemm_fp8 checkpoint, which cannot be loaded here \(.*GPU.*unquantized"),
    ],
    ids=["new", "none", "fbgemm"],
)
def test_a_checkpoint_that_cannot_be_loaded_here_is_refused_by_name(
    folder: Path, tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    if torch.cuda.is_available() and "fbgemm" in reason:
        pytest.skip("this machine may be able to load it")
    with pytest.raises(UnsupportedModelError, match=reason):
        load(quantized(folder, tmp_path / "m", settings))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([IDS])).logits[0, -1].float()


def check_logits(
    folder: Path, tokenizer: Path, reference: PreTrainedModel, compile: bool, tolerance: float, last: int = 1
) -> str | None:
    """Compare a folder's logits with a model's, the `last` tokens in a pass of their own: why it is not compiled."""
    with LLM(folder, tokenizer=load_tiny(tokenizer).tokenizer, dtype="float32", device="cpu", compile=compile) as llm:
        engine = llm.engine
        cache, first = engine.new_cache(), len(IDS) - last
        if first:
            engine.read(cache, IDS[:first])
        torch.testing.assert_close(engine.read(cache, IDS[first:]), logits(reference), atol=tolerance, rtol=0)
        return engine.backend.disabled_reason


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_fp8_checkpoint_is_dequantized_on_a_cpu(folder: Path, tmp_path: Path, compile: bool) -> None:
    """Blocks of 128 by 128 weights share a scale; transformers dequantizes them where no GPU can multiply them."""
    reference = tiny_model(**SIZES)
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        codes, scales = blockwise(tensors[name])
        tensors |= {name: codes, f"{name}_scale_inv": scales}
        exact = codes.float() * scales.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)
        reference.get_parameter(name).data.copy_(exact[:, : codes.shape[1]])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert check_logits(describe(tmp_path, FP8), folder, reference, compile, 1e-3) is None


def blockwise(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 codes [N, K] and scales [⌈N / 128⌉, ⌈K / 128⌉]."""
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)
    scales = torch.zeros(int(rows.max()) + 1, int(columns.max()) + 1)
    for row in range(len(scales)):
        for column in range(scales.shape[1]):
            block = weight[rows == row][:, columns == column]
            scales[row, column] = block.abs().max() / 448
    return (weight / scales[rows][:, columns]).to(torch.float8_e4m3fn), scales


@pytest.mark.parametrize(
    "settings",
    [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}],
    ids=["nf4", "int8"],
)
def test_a_bitsandbytes_checkpoint_has_the_logits_of_the_model_that_was_saved(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    tiny_model(**SIZES).save_pretrained(tmp_path / "exact")
    saved = AutoModelForCausalLM.from_pretrained(
        tmp_path / "exact",
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(**settings),
        device_map={"": "cpu"},
    )
    saved.save_pretrained(tmp_path / "m")  # before its first pass: bitsandbytes then packs the weights for the CPU
    # One pass: int8 layers set columns apart by the largest value in the pass.
    check_logits(tmp_path / "m", folder, saved, True, 1e-3, last=len(IDS))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
def test_a_compressed_tensors_checkpoint_has_the_logits_of_transformers(
    folder: Path, tmp_path: Path, scheme: str, compile: bool
) -> None:
    pytest.importorskip("compressed_tensors")
    compressed(tiny_model(**SIZES), scheme).save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    check_logits(tmp_path, folder, reference, compile, 1e-3)


def compressed(model: PreTrainedModel, scheme: str) -> PreTrainedModel:
    """The model with weights rounded and packed by compressed-tensors, one scale a row or group."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        apply_quantization_config,
        preset_name_to_scheme,
    )

    groups = {"all": preset_name_to_scheme(scheme, ["Linear"])}
    settings = QuantizationConfig(config_groups=groups, ignore=["lm_head"], quantization_status="initialized")
    apply_quantization_config(model, settings)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            form = module.quantization_scheme.weights
            largest = {"int": 2 ** (form.num_bits - 1) - 1, "float": 448}[form.type]
            ranges = module.weight.view(module.weight_scale.numel(), -1).abs().amax(-1)
            module.weight_scale.data.copy_((ranges / largest).view(module.weight_scale.shape))
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    save = model.save_pretrained

    def save_with_config(where: Path) -> None:
        save(where)
        compressor.update_config(str(where))

    model.save_pretrained = save_with_config
    return model


# --- model objects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["fp8-weight-only", "int8-weight-only"])
def test_a_torchao_model_object_has_its_own_logits_and_a_fingerprint(folder: Path, quantize: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    kinds: dict[str, Callable[[], Any]] = {
        "fp8-weight-only": lambda: torchao.Float8WeightOnlyConfig(set_inductor_config=False),
        "int8-weight-only": lambda: torchao.Int8WeightOnlyConfig(set_inductor_config=False),
    }
    tokenizer = load_tiny(folder).tokenizer
    models = [tiny_model(**SIZES, seed=seed) for seed in (0, 1)]
    prints = []
    for model in models:
        torchao.quantize_(model, kinds[quantize]())
        expected = logits(model)
        with LLM(model, tokenizer=tokenizer, cache=CacheConfig(slots=None), compile=True) as llm:
            given = llm.engine.read(llm.engine.new_cache(), IDS)
            torch.testing.assert_close(given, expected, atol=1e-3, rtol=1e-3)
            llm.engine.stream(llm.engine.new_cache(), IDS, SamplingParams(max_tokens=2))
            assert "are not compiled" in (llm.engine.backend.disabled_reason or "")
            prints.append(llm.store.fingerprint.weights)
        torch.testing.assert_close(logits(model), expected)
    assert prints[0] != prints[1]


def test_an_engine_on_a_bitsandbytes_model_object_gives_it_back(tmp_path: Path) -> None:
    tiny_model(**SIZES).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        device_map={"": "cpu"},
    )
    expected = logits(model)
    engine = Engine(model, CacheConfig(slots=None), compile=True)
    torch.testing.assert_close(engine.read(engine.new_cache(), IDS), expected, atol=1e-3, rtol=1e-3)
    engine.close()
    assert torch.equal(logits(model), expected)
