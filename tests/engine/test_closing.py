"""A model object is as it was once its engine or LLM is closed, or nothing references it any more."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from tests.support.tiny_models import FAMILIES, tiny_model, tokens
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import InputError, StoreFullError, UnsupportedModelError
from zsmerge_llm.testing import tiny_model as tiny_model_and_tokenizer

CONFIG = CacheConfig(slots=24, sink=2, recent=6, stage=8, observation_window=4)


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model that an engine may have changed, by module."""
    found: dict[str, Any] = {"attention": model.config._attn_implementation}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        found[name] = (type(module), {key: id(value) for key, value in own.items() if key[:2] != "__"})
        found[f"{name} tensors"] = [
            (key, id(tensor), tensor.requires_grad, tensor.is_inference())
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        ]
    return found


def greedy(model: PreTrainedModel) -> list[int]:
    prompt = torch.tensor([tokens(12)])
    return model.generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)[0].tolist()


def handed_in(family: str = "llama", **sizes: int) -> PreTrainedModel:
    """A model as its owner may have it: half in training, some weights frozen, attending through sdpa if it can."""
    model = tiny_model(family, **sizes)
    if model._supports_sdpa:
        model.set_attn_implementation("sdpa")
    model.train()
    next(module for module in model.modules() if isinstance(module, nn.Embedding)).eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_closed_engine_leaves_a_model_of_any_family_as_it_was(family: str) -> None:
    model = handed_in(family)
    before, answer = state(model), greedy(model)

    engine = Engine(model, CONFIG, compile=False)
    assert not model.training
    engine.read(engine.new_cache(), tokens(40))
    with pytest.raises(InputError, match=r"close\(\) of the LLM or the engine"):
        greedy(model)
    engine.close()

    assert state(model) == before
    assert greedy(model) == answer


def test_a_closed_engine_leaves_a_model_with_changing_frequencies_fit_for_training() -> None:
    """Dynamic RoPE scaling replaces its frequencies in a long pass."""
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10_000.0}
    model.config.max_position_embeddings = 32
    model = type(model)(model.config).train()
    before = state(model)
    engine = Engine(model, CacheConfig(slots=128), compile=False)
    engine.read(engine.new_cache(), tokens(40))
    assert state(model) != before

    engine.close()

    assert state(model) == before
    ids = torch.tensor([tokens(8)])
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "falcon-new"])
def test_an_engine_that_nothing_references_gives_its_compiled_model_back(family: str) -> None:
    model = handed_in(family, hidden_size=64)
    before, answer = state(model), greedy(model)
    engine = Engine(model, CONFIG, compile=True)
    assert engine.backend.disabled_reason is None
    list(engine.stream(engine.new_cache(), tokens(30), SamplingParams(max_tokens=12)))
    assert state(model) != before

    gc.disable()  # at once, not at some later collection
    try:
        del engine
        assert state(model) == before
    finally:
        gc.enable()

    assert greedy(model) == answer


def test_a_model_outlives_neither_its_owner_nor_a_closed_engine() -> None:
    """Nothing that watches over models keeps them in memory."""
    for close in (True, False):
        model = tiny_model()
        engine = Engine(model, CONFIG, compile=False)
        engine.backend.start()
        gone = weakref.ref(model)
        if close:
            engine.close()
        del model, engine
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("first", [0, 1])
def test_engines_share_a_model_and_the_last_one_gives_it_back(first: int) -> None:
    model = handed_in(hidden_size=64)
    before = state(model)
    engines = [Engine(model, CONFIG, compile=False) for _ in range(2)]
    for engine in engines:
        engine.backend.start()
    expected = Engine(tiny_model(hidden_size=64), CONFIG, compile=False)

    engines[first].close()
    other = engines[1 - first]
    for count in (30, 1, 1):
        given = other.read(cache := other.new_cache(), tokens(count))
        torch.testing.assert_close(given, expected.read(expected.new_cache(), tokens(count)), atol=1e-4, rtol=1e-4)
    assert cache.seen
    other.close()

    assert state(model) == before


def test_a_closed_engine_refuses_and_closing_it_again_does_nothing() -> None:
    model = tiny_model()
    engine = Engine(model, CONFIG, compile=False)
    cache = engine.new_cache()
    stream = engine.stream(cache, tokens(8), SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    engine.close()
    engine.close()
    with pytest.raises(InputError, match="make another LLM or engine"):
        list(stream)
    with pytest.raises(InputError, match="engine is closed"):
        engine.read(cache, [5])
    with pytest.raises(InputError, match="engine is closed"):
        engine.query_attention(cache, [5])


def test_an_attention_that_the_owner_has_set_since_stays() -> None:
    model = handed_in()
    engine = Engine(model, CONFIG, compile=False)
    model.set_attn_implementation("eager")
    engine.close()
    assert model.config._attn_implementation == "eager"


def test_a_model_that_is_refused_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = handed_in()
    before = state(model)

    def refuse(*_: Any) -> None:
        raise UnsupportedModelError("no")

    monkeypatch.setattr("zsmerge_llm.engine.engine.prepare_model", refuse)
    with pytest.raises(UnsupportedModelError) as caught:
        Engine(model, CONFIG)
    assert caught.value
    assert state(model) == before


# --- LLM --------------------------------------------------------------------------------------------------------------


QUICK = SamplingParams(max_tokens=4)


@pytest.mark.slow
def test_a_closed_llm_leaves_its_model_as_it_was_and_cannot_be_used() -> None:
    model, tokenizer = tiny_llm_model()
    before = state(model)
    with LLM(model, tokenizer=tokenizer, cache=CONFIG, compile=True) as llm:
        llm.chat("Hello", sampling=QUICK)
        assert not model.training
        running = llm.stream("Hello again", sampling=SamplingParams(max_tokens=40, ignore_eos=True))
        next(running)

    assert state(model) == before
    assert not llm.loaded
    with pytest.raises(InputError, match="engine is closed"):
        list(running)
    with pytest.raises(InputError, match="LLM is closed: make another"):
        llm.chat("Hello")
    llm.close()


def test_an_llm_that_nothing_references_gives_its_model_back() -> None:
    model, tokenizer = tiny_llm_model()
    before = state(model)
    llm = LLM(model, tokenizer=tokenizer, cache=CONFIG, compile=False)
    running = llm.stream("Hello", sampling=SamplingParams(max_tokens=8, ignore_eos=True))
    next(running)
    del llm
    gc.collect()
    assert len(list(running)) > 2  # an answer that is being generated still needs the model

    del running
    gc.collect()

    assert state(model) == before


def test_an_llm_that_cannot_be_assembled_leaves_its_model_as_it_was() -> None:
    model, tokenizer = tiny_llm_model()
    before = state(model)
    llm = LLM(model, tokenizer=tokenizer, session_memory=1)
    with pytest.raises(StoreFullError) as caught:
        llm.chat("Hello")
    assert caught.value
    assert state(model) == before


def test_closing_an_llm_that_was_never_used_loads_nothing() -> None:
    llm = LLM("no/such-model")
    llm.close()
    assert not llm.loaded


def tiny_llm_model() -> tuple[PreTrainedModel, Any]:
    """A random model in training mode that attends through sdpa, and its tokenizer."""
    model, tokenizer = tiny_model_and_tokenizer()
    model.set_attn_implementation("sdpa")
    return model.train(), tokenizer
