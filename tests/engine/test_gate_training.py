"""Gates are trained on a model's own attention, kept in a file of the model, and used by every later engine of it."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.test_static_decoding import assert_equal_caches
from tests.models.tiny_folders import load_tiny
from tests.support.static_backend import StaticBackend
from tests.support.templates import template
from tests.support.texts import STORY
from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import CacheConfig, Engine, SamplingParams
from zsmerge_llm.engine.gate_training import SINKS, GateText, RidgeSums, train_gates
from zsmerge_llm.errors import InputError
from zsmerge_llm.models.gate_files import gates_path, model_key, save_gates
from zsmerge_llm.retrieval.gate_texts import QUESTIONS, gate_texts, questions


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZSMERGE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def training_texts(count: int = 8) -> list[GateText]:
    return [GateText(tokens(400, seed=seed), [tokens(9, seed=100 + seed)]) for seed in range(count)]


def test_a_regression_finds_the_weights_of_a_linear_target_and_ignores_what_does_not_vary() -> None:
    torch.manual_seed(0)
    inputs, weight = torch.randn(2, 3000, 4), torch.tensor([[1.0, -2.0, 0.0, 0.5], [0.0, 3.0, 1.0, -1.0]])
    inputs[..., 3] = 7.0
    target = torch.einsum("hnf,hf->hn", inputs, weight) + torch.tensor([[0.25], [-4.0]])
    sums = RidgeSums(2, 4)
    for part in range(0, 3000, 500):
        sums.add(inputs[:, part : part + 500], target[:, part : part + 500])
    found, bias = sums.solve()
    torch.testing.assert_close(found[:, :3], weight[:, :3], atol=0.01, rtol=0.01)
    predicted = torch.einsum("hnf,hf->hn", inputs, found) + bias[:, None]
    torch.testing.assert_close(predicted, target, atol=0.05, rtol=0.01)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "gpt_oss-sinks"])
def test_gates_tell_which_tokens_of_another_text_are_attended_to(family: str) -> None:
    engine = Engine(tiny_model(family), compile=False)
    gates = train_gates(engine, training_texts())
    assert [gate is None for gate in gates] == [spec.window is not None for spec in engine.specs]
    cache, ids, question = engine.new_cache(CacheConfig.full()), tokens(300, seed=50), tokens(9, seed=150)
    engine.read(cache, ids)
    needed, correlations = iter(engine.query_attention(cache, question)), []
    for layer, gate in zip(cache.layers, gates, strict=True):
        if gate is not None:
            predicted = gate.attention(layer.keys[:, :, :300], layer.values[:, :, :300])[0]
            actual = next(needed)[:, :300]
            for own, other in zip(predicted[:, SINKS:], actual[:, SINKS:], strict=True):
                correlations.append(float(torch.corrcoef(torch.stack([own.log(), other.clamp(min=1e-6).log()]))[0, 1]))
    assert sum(correlations) / len(correlations) > 0.15


def test_only_the_layers_of_a_hybrid_model_that_attend_have_gates() -> None:
    engine = Engine(tiny_model("jamba"), compile=False)
    assert len(train_gates(engine, training_texts())) == len(engine.specs) < engine.model.config.num_hidden_layers


def test_gates_of_a_file_are_used_by_every_later_engine_of_the_model() -> None:
    engine = Engine(tiny_model(), compile=False)
    assert not any(spec.gate for spec in engine.specs)
    gates = train_gates(engine, training_texts())
    save_gates(gates_path(model_key(engine.model)), gates)
    later = Engine(tiny_model(dtype=torch.bfloat16), compile=False)
    for spec, gate in zip(later.specs, gates, strict=True):
        assert torch.equal(spec.gate.weight, gate.weight)
    document = later.new_cache(CacheConfig(slots=32, sink=2, recent=4, stage=8).query_agnostic())
    later.read(document, tokens(200))
    assert document.layers[0].num_filled[0] < 200


@pytest.mark.parametrize("how", [{"quantization": "int8"}, {"quantization": "int4"}, {"dtype": "bfloat16"}])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_model_has_the_same_gates_in_every_quantization(family: str, how: dict[str, str], tmp_path: Path) -> None:
    model = tiny_model(family, vocab=len(template("smollm2").tokenizer))
    for number, (name, weight) in enumerate(model.named_parameters()):
        if name.endswith(("norm.weight", "bias")):
            weight.data.fill_(1 + number / 64)
    model.save_pretrained(tmp_path / "tiny")
    template("smollm2").tokenizer.save_pretrained(tmp_path / "tiny")
    plain, other = load_tiny(str(tmp_path / "tiny")), load_tiny(str(tmp_path / "tiny"), **how)
    assert model_key(other.model) == model_key(plain.model) != model_key(tiny_model(family, num_hidden_layers=1))


def test_a_gated_document_is_kept_and_goes_on_in_fixed_memory_as_in_a_cache_alone() -> None:
    config = CacheConfig(slots=32, sink=2, recent=4, stage=8).query_agnostic()
    first = Engine(tiny_model(), compile=False)
    save_gates(gates_path(model_key(first.model)), train_gates(first, training_texts()))
    plain = Engine(tiny_model(), config, chunk=40, compile=False)
    static = Engine(tiny_model(), config, chunk=40, backend=StaticBackend())
    expected, cache = plain.new_cache(), static.new_cache()
    going_on = SamplingParams(max_tokens=30, ignore_eos=True)
    assert list(static.stream(cache, tokens(230), going_on)) == list(plain.stream(expected, tokens(230), going_on))
    assert all(layer.spec.gate is not None for layer in cache.layers)
    assert_equal_caches(cache, expected)


@pytest.mark.parametrize("fault", ["shape", "nan", "pairs", "missing", "torn", "more"])
def test_a_file_that_does_not_fit_the_model_is_no_gate(fault: str) -> None:
    engine = Engine(tiny_model(), compile=False)
    path = gates_path(model_key(engine.model))
    save_gates(path, train_gates(engine, training_texts()))
    tensors = load_file(path)
    if fault == "shape":
        tensors["0.weight"] = tensors["0.weight"][:, 1:].contiguous()
    elif fault == "nan":
        tensors["0.bias"][0] = float("nan")
    elif fault == "pairs":
        tensors["0.pairs"][0, 0] = 10**6
    elif fault == "missing":
        del tensors["1.bias"]
    elif fault == "more":
        tensors["7.bias"] = torch.zeros(2)
    save_file(tensors, path)
    if fault == "torn":
        path.write_bytes(path.read_bytes()[:-20])
    assert not any(spec.gate for spec in Engine(tiny_model(), compile=False).specs)


def test_too_little_text_is_an_error_that_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match="needs"):
        train_gates(Engine(tiny_model(), compile=False), [GateText(tokens(60), [tokens(9)])])


def test_texts_are_asked_about_their_own_sentences() -> None:
    found = questions(STORY * 2, Random(0))
    assert found
    for about, answer in found:
        assert answer in STORY
        assert about in answer
    chat_template = template("smollm2")
    parts = list(gate_texts(chat_template, [STORY * 200], 4000))
    assert 0 < sum(len(part.ids) for part in parts) <= 4000
    assert all(0 < len(part.questions) <= QUESTIONS for part in parts)
    shown = chat_template.tokenizer.decode(parts[0].questions[0])
    assert "What does the text say about" in shown
    assert chat_template.tokenizer.decode(parts[0].ids).startswith("<|im_start|>")
