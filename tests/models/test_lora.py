"""LoRA adapters of peft on a model object: answers, fingerprints, compiled layers, and what is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.models.tiny_folders import load_tiny, logits
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.cpu.package_key import describe_layer
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import (
    ConfigError,
    CorruptModelError,
    InputError,
    MissingDependencyError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from zsmerge_llm.models.description import describe
from zsmerge_llm.sessions.fingerprint import fingerprint
from zsmerge_llm.testing import tiny_model as tiny_model_and_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear", **settings})


def randomized(model: Any, seed: int = 0) -> Any:
    """The model with random adapters; as made, a LoRA adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model


def with_adapter(family: str = "llama", seed: int = 0, **settings: Any) -> PeftModel:
    return randomized(get_peft_model(tiny_model(family, **SIZES), lora(**settings)), seed)


def greedy(model: Any, ids: list[int], count: int = 12) -> list[int]:
    answer = model.eval().generate(
        input_ids=torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return answer[0, len(ids) :].tolist()


def decoded(engine: Engine, ids: list[int], count: int = 12) -> list[int]:
    return list(engine.stream(engine.new_cache(), ids, SamplingParams(max_tokens=count, ignore_eos=True)))


def logits_by_step(engine: Engine) -> torch.Tensor:
    """Logits after a prefill and after each of ten decode steps, float32 [11, vocab]."""
    cache = engine.new_cache()
    return torch.stack([engine.read(cache, tokens(12)), *(engine.read(cache, [token]) for token in tokens(10, 1))])


def reference_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.tensor([tokens(12) + tokens(10, 1)])).logits[0, 11:].float()


ADAPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("llama", {}),
    "rslora": ("llama", {"r": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}),
    "dora": ("llama", {"use_dora": True}),
    "gemma3": ("gemma3", {}),
    "falcon": ("falcon-new", {"target_modules": ["query_key_value", "dense"]}),
}
BESIDE_THE_LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "saved-head": ("llama", {"modules_to_save": ["lm_head"]}),
}
"""Adapters of parts that are not compiled, with layers as those of the others."""


@pytest.mark.parametrize(
    ("name", "compile"),
    [
        *((name, False) for name in (*ADAPTED, *BESIDE_THE_LAYERS)),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ADAPTED),
    ],
)
def test_a_lora_model_has_the_logits_of_its_own_forward(name: str, compile: bool) -> None:
    family, settings = {**ADAPTED, **BESIDE_THE_LAYERS}[name]
    model = with_adapter(family, **settings)
    expected = reference_logits(model)
    with model.disable_adapter():
        assert (reference_logits(model) - expected).abs().max() > 0.1  # the adapter matters
    engine = Engine(model.get_base_model(), CacheConfig(slots=None), compile=compile)
    torch.testing.assert_close(logits_by_step(engine), expected, atol=1e-3, rtol=1e-3)
    if compile:
        assert engine.backend.disabled_reason is None


def test_layers_with_the_same_adapters_are_compiled_once() -> None:
    first, second = with_adapter().get_base_model().model.layers
    assert describe_layer(first) == describe_layer(second)


def test_an_llm_takes_a_peft_model_and_gives_it_back() -> None:
    base, tokenizer = tiny_model_and_tokenizer()
    model = randomized(get_peft_model(base, lora())).train()
    prompt = tokenizer.encode("the ship and the sea")
    expected = greedy(model, prompt)
    model.train()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    with LLM(model, tokenizer=tokenizer, cache=CacheConfig(slots=None), compile=False) as llm:
        result = llm.complete("the ship and the sea", sampling=SamplingParams(max_tokens=12, ignore_eos=True))
        assert result.text == tokenizer.decode(expected)
    assert all(module.training for module in model.modules())
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == trained
    assert greedy(model, prompt) == expected


def test_an_adapter_loaded_by_transformers_itself_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", peft.__version__)
    with_adapter().save_pretrained(tmp_path)
    model = tiny_model(**SIZES)
    plain = greedy(model, tokens(12))
    model.load_adapter(str(tmp_path))
    expected = greedy(model, tokens(12))
    assert expected != plain
    engine = Engine(model, CacheConfig(slots=None), compile=False)
    assert decoded(engine, tokens(12)) == expected == greedy(with_adapter(), tokens(12))


def marked(model: PreTrainedModel, tokenizer: Any) -> str:
    return fingerprint(model, tokenizer, None, CacheConfig()).weights


def test_the_fingerprint_tells_adapters_and_their_states_apart() -> None:
    tokenizer = tiny_model_and_tokenizer()[1]
    marks = {"plain": marked(tiny_model(**SIZES), tokenizer)}
    for name, other in (
        ("one", with_adapter()),
        ("another", with_adapter(seed=1)),
        ("more alpha", with_adapter(lora_alpha=16)),
        ("two adapters", with_adapter()),
    ):
        if name == "two adapters":
            other.add_adapter("second", lora(r=2))
            marks["first of two"] = marked(randomized(other, 2).get_base_model(), tokenizer)
            other.set_adapter("second")
        marks[name] = marked(other.get_base_model(), tokenizer)
    model = with_adapter()
    with model.disable_adapter():
        marks["off"] = marked(model.get_base_model(), tokenizer)
    assert marked(model.get_base_model(), tokenizer) == marks["one"]
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)
    marks["half"] = marked(model.get_base_model(), tokenizer)
    model = with_adapter()
    model.merge_adapter()
    marks["merged"] = marked(model.get_base_model(), tokenizer)
    marks["merged and unloaded"] = marked(with_adapter().merge_and_unload(), tokenizer)
    assert len(set(marks.values())) == len(marks)
    assert marked(with_adapter().get_base_model(), tokenizer) == marks["one"]  # reproducible


def switch(model: PeftModel) -> None:
    model.add_adapter("second", lora())
    model.set_adapter("second")


@pytest.mark.parametrize(
    "change",
    [switch, lambda model: model.merge_adapter(), lambda model: model.base_model.disable_adapter_layers()],
    ids=["switched", "merged", "disabled"],
)
def test_adapters_that_change_behind_an_engine_are_refused(change: Any) -> None:
    model = with_adapter()
    engine = Engine(model.get_base_model(), CacheConfig(slots=None), compile=False)
    cache = engine.new_cache()
    engine.read(cache, tokens(8))
    change(model)
    with pytest.raises(InputError, match=r"adapters were switched.*make another"):
        engine.read(cache, tokens(8))
    with pytest.raises(InputError, match="adapters were switched"):
        engine.query_attention(cache, tokens(2))
    engine.close()
    again = Engine(model.get_base_model(), CacheConfig(slots=None), compile=False)
    given = logits_by_step(again)
    again.close()
    torch.testing.assert_close(given, reference_logits(model), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]), "ALORA"),
    ],
    ids=["prompt-tuning", "alora"],
)
def test_an_adapter_that_does_more_than_change_weights_is_refused_by_name(config: Any, kind: str) -> None:
    base, tokenizer = tiny_model_and_tokenizer()
    llm = LLM(get_peft_model(base, copy.deepcopy(config)), tokenizer=tokenizer)
    with pytest.raises(UnsupportedModelError, match=rf"'default' \({kind}\).*use a LoRA adapter"):
        llm.chat("Hello")


def adapter_folder(folder: Path, where: Path, **settings: Any) -> tuple[Path, PeftModel]:
    """Save a random adapter of the tiny model in `folder`; return its own folder and the model that has it."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = randomized(get_peft_model(base, lora(**settings)))
    model.save_pretrained(where)
    return where, model


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_folder_is_its_model_with_the_adapter_merged(
    folder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    where, model = adapter_folder(folder, tmp_path / "adapter", **settings)
    loaded = load_tiny(where)
    torch.testing.assert_close(logits(loaded.model), logits(model.eval()), atol=1e-4, rtol=1e-4)
    assert (loaded.name, loaded.source) == ("adapter", where)
    assert loaded.tokenizer.get_vocab() == load_tiny(folder).tokenizer.get_vocab()
    assert not isinstance(loaded.model, PeftModel)
    assert describe(where).name == "adapter"


def test_adapters_of_one_model_have_digests_of_their_own(folder: Path, tmp_path: Path) -> None:
    first, model = adapter_folder(folder, tmp_path / "first")
    randomized(model, seed=1).save_pretrained(tmp_path / "second")
    digests = {load_tiny(where).weights_digest for where in (folder, first, tmp_path / "second")}
    assert len(digests) == 3


def test_an_adapter_is_merged_before_weights_are_packed(folder: Path, tmp_path: Path) -> None:
    where, model = adapter_folder(folder, tmp_path / "adapter")
    found = logits(load_tiny(where, quantization="int8").model).float()
    expected = logits(model.eval())
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.99


def test_an_adapter_folder_that_cannot_be_merged_says_why_before_weights_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _ = adapter_folder(folder, tmp_path / "adapter")
    config = json.loads((where / "adapter_config.json").read_text())

    def refused(error: type[Exception], match: str, **settings: Any) -> None:
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
        with pytest.raises(error, match=match):
            load_tiny(where, **settings)

    def describe_as(**changes: Any) -> None:
        (where / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    refused(ConfigError, "cannot be merged into quantized weights.*'int8' on a CPU", quantization="nf4")
    describe_as(base_model_name_or_path=None)
    refused(ModelNotFoundError, "names no model: set base_model_name_or_path")
    describe_as(base_model_name_or_path=str(tmp_path / "gone"))
    refused(ModelNotFoundError, "no file or folder")
    describe_as(peft_type="IA3")
    refused(UnsupportedModelError, "adapter of type IA3")
    describe_as()
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(MissingDependencyError, "pip install peft")


def test_an_adapter_of_another_model_does_not_fit(folder: Path, tmp_path: Path) -> None:
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(folder)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptModelError, match="does not fit its model"):
        load_tiny(tmp_path)


def test_a_folder_with_a_model_and_an_adapter_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with_adapter().save_pretrained(tmp_path)
    tiny_model(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="a model and a LoRA adapter: move"):
        LLM(tmp_path).chat("Hello")
