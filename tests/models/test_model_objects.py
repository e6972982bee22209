"""A model object that is wrapped, offloaded, in training or changed has its own logits, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from tests.support.templates import byte_level
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.errors import ConfigError, LoadError, UnsupportedModelError, ZSMergeError
from zsmerge_llm.sessions.fingerprint import fingerprint

IDS = [5, 6, 7, 8, 9, 10, 20, 30]
CACHE = CacheConfig(slots=128)


def plain(seed: int = 0) -> Any:
    return tiny_model(vocab=len(byte_level()), seed=seed)


def with_dropout() -> Any:
    model = plain().train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return model


def partly_in_training() -> Any:
    model = plain()
    model.model.layers[0].train()
    return model


def with_checkpointing() -> Any:
    model = plain()
    model.gradient_checkpointing_enable()
    return model.train()


def with_noise_in_training() -> Any:
    model = plain().train()
    model.get_input_embeddings().register_forward_hook(
        lambda module, _, output: output + torch.rand_like(output) if module.training else output
    )
    return model


def with_owners_forward() -> Any:
    model = plain()
    original = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: original(x) * 0.5
    return model


def with_hook_of_accelerate() -> Any:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Doubled(ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 2

    model = plain()
    add_hook_to_module(model.model.norm, Doubled())
    return model


class Larger(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 1.5


def parametrized() -> Any:
    model = plain()
    parametrize.register_parametrization(model.model.layers[0].self_attn.q_proj, "weight", Larger())
    return model


def with_adapters() -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_dropout": 0.3, "init_lora_weights": False}
    model = get_peft_model(plain(), LoraConfig(target_modules=["q_proj", "v_proj"], **settings))
    model.add_adapter("second", LoraConfig(target_modules=["k_proj"], **settings))
    model.base_model.set_adapter(["default", "second"])
    return model.train()


def on_the_host(seed: int = 0) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(plain(seed), execution_device=torch.device("cpu"))


def on_disk(folder: Path) -> Any:
    from accelerate import dispatch_model

    names = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    places: Any = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    return dispatch_model(plain(), places, main_device="cpu", offload_dir=str(folder))


MODELS: dict[str, Callable[[], Any]] = {
    "dropout": with_dropout,
    "partly in training": partly_in_training,
    "gradient checkpointing": with_checkpointing,
    "noise in training": with_noise_in_training,
    "a forward of the owner's": with_owners_forward,
    "a hook of accelerate": with_hook_of_accelerate,
    "a parametrization": parametrized,
    "two adapters": with_adapters,
    "torch.compile": lambda: torch.compile(plain(), backend="eager"),
    "torch.compile of adapters": lambda: torch.compile(with_adapters(), backend="eager"),
    "DataParallel": lambda: nn.DataParallel(plain()),
    "offloaded to the host": on_the_host,
}


def logits(model: Any) -> torch.Tensor:
    """Return the model's own logits behind IDS in evaluation, and leave its modes as they are."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([IDS]), use_cache=False).logits[0, -1]
    for module, training in modes:
        module.training = training
    return found


def state(model: Any) -> list[Any]:
    """Return what the owner of a model would miss."""
    return [
        (module.training, len(module._forward_hooks), vars(module).get("forward"), getattr(module, "_hf_hook", None))
        for module in model.modules()
    ]


def check(model: Any) -> None:
    before, expected = state(model), logits(model)
    with LLM(model, tokenizer=byte_level(), cache=CACHE) as llm:
        found = llm.engine.read(llm.engine.new_cache(), IDS)
        assert llm.complete("Hello", sampling=SamplingParams(max_tokens=2)).usage.completion_tokens
    torch.testing.assert_close(found.reshape(-1), expected, rtol=1e-4, atol=1e-4)
    assert state(model) == before
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_object_has_its_own_logits_and_is_given_back_as_it_was(kind: str) -> None:
    check(MODELS[kind]())


def test_a_model_with_a_layer_on_disk_has_its_own_logits(tmp_path: Path) -> None:
    check(on_disk(tmp_path))


def test_offloaded_weights_count_in_the_fingerprint() -> None:
    marks = {fingerprint(on_the_host(seed), byte_level(), "", CACHE).weights for seed in (0, 1, 0)}
    assert len(marks) == 2


def without_data() -> Any:
    model = plain()
    model.model.layers[1].to("meta")
    return model


def of_two_dtypes() -> Any:
    model = plain().to(torch.bfloat16)
    model.lm_head.float()
    return model


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = plain()


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (without_data, LoadError, r"model\.layers\.1\.self_attn\.q_proj\.weight.* meta device.* name or folder"),
        (of_two_dtypes, UnsupportedModelError, "LlamaForCausalLM cannot read a single token .*same dtype"),
        (Wrapper, ConfigError, "give the transformers model inside of the Wrapper"),
        (lambda: nn.Linear(2, 2), ConfigError, "not Linear"),
        (lambda: 7, ConfigError, "not int"),
    ],
)
def test_a_model_object_that_cannot_work_is_refused_with_the_remedy(
    make: Callable[[], Any], error: type[ZSMergeError], says: str
) -> None:
    model = make()
    before = state(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=says):
        LLM(model, tokenizer=byte_level(), cache=CACHE).warm_up()
    if before is not None:
        assert state(model) == before


def test_a_model_that_torch_has_quantized_is_refused_by_name() -> None:
    model = torch.ao.quantization.quantize_dynamic(plain(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModelError, match=r"torch\.ao.*quantization='int8'"):
        LLM(model, tokenizer=byte_level(), cache=CACHE).warm_up()
