"""Decode steps through a package give the logits and caches of the layers of transformers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tests.support.cpu_kernels import load_kernels
from tests.support.tiny_models import FAMILIES, tiny_model
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.cpu import native, quantized_linear
from zsmerge_llm.cpu.step_capture import step_forms
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.prompt_lookup import MAX_DRAFT_TOKENS
from zsmerge_llm.kvcache.cache import Cache

ALL_FORMS = True
WIDTHS = (1, 1 + MAX_DRAFT_TOKENS)
CONFIG = CacheConfig(slots=24, sink=2, recent=6, stage=8, observation_window=4)
PROMPT = [5, 17, 40, 3, 88, 61, 22, 9, 14, 70, 33, 51]
STEPS = 24
IN_EVERY_RUN = ("llama", "gpt_oss-sinks")
IN_ALL_FORMS = ("llama", "gemma3")
"""Families whose steps of drafts and of several conversations are compiled too: one kind of layer, and two."""
COMPILED = [family for family in FAMILIES if family != "mistral"]  # its layers compute what llama's do


def start(engine: Engine) -> Engine:
    """Let an engine decode through a package, and count the passes that each of its forms runs."""
    engine.backend.start()
    backend: Any = engine.backend
    for step in [] if backend.compiled.layers is None else backend.compiled.layers.steps.values():
        step.num_passes = 0
        step.go_on = partial(_counted, step, step.go_on)
    return engine


def _counted(step: Any, go_on: Callable[..., Any], forward_pass: Any, index: int, tensors: Any) -> Any:
    output = go_on(forward_pass, index, tensors)
    step.num_passes += index == 0 and output is not None
    return output


def started(family: str = "llama") -> Engine:
    """Return an engine whose steps are compiled."""
    return start(Engine(tiny_model(family), CONFIG, compile=False))


def forms_used(engine: Engine) -> set[str]:
    """Return which forms of step have run through the package, more often than once to be compared."""
    backend: Any = engine.backend
    return {name for name, step in backend.compiled.layers.steps.items() if step.trusted and step.num_passes > 1}


def decode(engine: Engine, config: CacheConfig = CONFIG) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the logits of steps of one or more tokens over several compressions, and the tensors of the cache."""
    cache = engine.new_cache(config)
    engine.read(cache, PROMPT)
    logits = [engine.read(cache, list(range(at, at + WIDTHS[at % 4 == 3]))) for at in range(STEPS)]
    tensors = [
        getattr(layer, name)[:, :, : layer.num_filled[0]] for layer in cache.layers for name in ("keys", "score")
    ]
    return torch.stack(logits), [*tensors, *(layer.queries for layer in cache.layers)]


def assert_same_steps(engine: Engine, plain: Engine, config: CacheConfig = CONFIG, atol: float = 1e-4) -> None:
    (logits, tensors), (expected, expected_tensors) = decode(engine, config), decode(plain, config)
    assert torch.allclose(logits, expected, atol=atol)
    assert all(torch.allclose(a, b, atol=atol) for a, b in zip(tensors, expected_tensors, strict=True))


@pytest.fixture
def one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile steps of one token only, a third of the work."""
    monkeypatch.setattr("zsmerge_llm.cpu.compiled_steps.step_forms", lambda num_draft: step_forms(num_draft)[:1])


@pytest.mark.parametrize(
    "family", [each if each in IN_EVERY_RUN else pytest.param(each, marks=pytest.mark.slow) for each in COMPILED]
)
def test_steps_of_a_package_give_the_same_logits_and_caches_in_every_family(
    family: str, request: pytest.FixtureRequest
) -> None:
    if family not in IN_ALL_FORMS:
        request.getfixturevalue("one_form")
    engine = started(family)
    assert_same_steps(engine, Engine(tiny_model(family), CONFIG, compile=False))

    if family == "gpt_oss-sinks":
        assert engine.backend.disabled_reason is not None
    else:
        forms = {"single", "draft"} if family in IN_ALL_FORMS else {"single"}
        assert forms_used(engine) >= forms, engine.backend.disabled_reason


@pytest.mark.parametrize(
    "config", [CacheConfig.paper(16), CacheConfig.h2o(16), CacheConfig.streaming(16), CacheConfig.full()]
)
def test_a_package_works_with_every_eviction_policy(config: CacheConfig) -> None:
    engine = started()
    assert_same_steps(engine, Engine(tiny_model(), CONFIG, compile=False), config)
    assert "single" in forms_used(engine)  # where each step compresses there is no room for more tokens


@pytest.mark.slow
@pytest.mark.usefixtures("one_form")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_package_works_with_quantized_weights(bits: int) -> None:
    engines = []
    for _ in range(2):
        model = tiny_model(hidden_size=128, intermediate_size=192)
        quantized_linear.quantize_model(model, bits, torch.float32)
        engines.append(Engine(model, CONFIG, compile=False))
    start(engines[0])

    assert torch.allclose(decode(engines[0])[0], decode(engines[1])[0], atol=2e-2)  # inputs are rounded to 16 bits
    assert forms_used(engines[0]) == {"single"}, engines[0].backend.disabled_reason


@pytest.mark.slow
@pytest.mark.usefixtures("one_form")
def test_layers_of_other_sizes_have_code_of_their_own() -> None:
    engines = []
    for _ in range(2):
        model = tiny_model()
        model.model.layers[1].mlp = tiny_model(seed=1, intermediate_size=96).model.layers[1].mlp
        engines.append(Engine(model, CONFIG, compile=False))
    start(engines[0])

    assert_same_steps(*engines)
    assert forms_used(engines[0]) == {"single"}


def test_a_package_keeps_no_reference_to_a_cache() -> None:
    engine = started()
    cache = engine.new_cache()
    for step in range(6):
        engine.read(cache, [step])
    reference = weakref.ref(cache)
    del cache
    gc.collect()
    assert reference() is None


def test_conversations_alternate_in_the_same_package() -> None:
    engine, plain = started(), Engine(tiny_model(), CONFIG, compile=False)
    caches = {each: [each.new_cache() for _ in range(2)] for each in (engine, plain)}
    for step in range(STEPS):
        logits = [each.read(caches[each][step % 2], [step + 1]) for each in (engine, plain)]
        assert torch.allclose(*logits, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rows", [2, 3, 8, 9, 19])
def test_batches_of_conversations_are_decoded_through_a_package(family: str, rows: int) -> None:
    """Of different lengths, over compressions, and with steps in which some rows are inactive."""
    engine = started(family)
    logits, cache = decode_batch(engine, rows)

    expected, expected_cache = decode_batch(Engine(tiny_model(family), CONFIG, compile=False), rows)
    assert "batch" in forms_used(engine)
    assert torch.allclose(logits, expected, atol=1e-4)
    for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
        assert layer.num_filled == other.num_filled
        used = max(layer.num_filled)
        assert torch.equal(
            layer.position[:, :, :used] * (layer.multiplicity > 0)[:, :, :used],
            other.position[:, :, :used] * (other.multiplicity > 0)[:, :, :used],
        )
        assert torch.allclose(layer.queries, other.queries, atol=1e-4)


def decode_batch(reader: Engine, rows: int) -> tuple[torch.Tensor, Cache]:
    """Return the logits of every row after each step, and the cache."""
    cache = reader.new_cache(rows=rows)
    reader.read_batch(cache, [PROMPT[: 3 + row] for row in range(rows)])
    logits = []
    with torch.inference_mode():
        for step in range(STEPS):
            active = None if step % 3 else torch.tensor([[(row + step) % 4 != 0] for row in range(rows)])
            reader.runner.run(cache, torch.full((rows, 1), step + 1), active)
            assert cache.logits is not None
            logits.append(cache.logits.clone())
    return torch.stack(logits), cache


def test_a_batch_is_told_what_its_rows_are_told_alone() -> None:
    engine = started()
    cache = engine.new_cache(CONFIG, rows=2)
    engine.read_batch(cache, [PROMPT, PROMPT[:5]])
    params = [SamplingParams(max_tokens=20, ignore_eos=True)] * 2

    answers = [list(row) for row in zip(*engine.decode(cache, params, [[], []]), strict=True)]

    for prompt, answer in zip([PROMPT, PROMPT[:5]], answers, strict=True):
        assert list(engine.stream(engine.new_cache(CONFIG), prompt, params[0])) == answer


@pytest.mark.parametrize(
    ("family", "compiled", "dtype"),
    [
        ("llama", True, torch.float32),
        ("llama", True, torch.bfloat16),
        ("llama", False, torch.float32),
        ("llama", False, torch.bfloat16),
        pytest.param("gemma3", True, torch.float32, marks=pytest.mark.slow),
        ("gemma3", False, torch.float32),
        ("gemma3", False, torch.bfloat16),
    ],
)
def test_the_kernels_give_a_row_the_same_logits_bit_for_bit_beside_others_and_in_drafts(
    family: str, compiled: bool, dtype: torch.dtype
) -> None:
    engine = Engine(tiny_model(family).to(dtype), CONFIG, compile=False)
    if compiled:
        start(engine)
    else:
        load_kernels(engine)
    prompts = [PROMPT[: 3 + row] for row in range(5)]
    alone = [engine.new_cache() for _ in prompts]
    for cache, prompt in zip(alone, prompts, strict=True):
        engine.read(cache, prompt)
    together = Cache.stack([cache.clone() for cache in alone])

    with torch.inference_mode():
        for token in range(STEPS):
            for cache in alone:
                engine.runner.run(cache, torch.tensor([[token]]))
            engine.runner.run(together, torch.full((5, 1), token))
            assert together.logits is not None
            for cache, logits in zip(alone, together.logits, strict=True):
                assert cache.logits is not None
                assert torch.equal(cache.logits[0], logits)
        draft = engine.runner.speculate(alone[0].clone(), [1, 2, 3, 4, 5])[1]
        for token, logits in enumerate(draft, 1):
            engine.runner.run(alone[0], torch.tensor([[token]]))
            assert alone[0].logits is not None
            assert torch.equal(alone[0].logits[0], logits)
    assert not compiled or forms_used(engine) >= {"single", "batch"}


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int4", "int8", None])
def test_a_real_model_agrees_with_its_package_whatever_its_weights_are(quantization: str | None, gguf: Any) -> None:
    path = gguf["smollm2-135m-instruct"]
    with LLM(path, dtype="bfloat16", quantization=quantization, compile=True) as llm:
        engine = start(llm.engine)
        decode_batch(engine, 2)
        decode(engine)
        cache = engine.new_cache()
        engine.read(cache, PROMPT)
        for _ in range(2):
            engine.runner.speculate(cache.clone(), PROMPT[: WIDTHS[1]])
        assert forms_used(engine) == {"single", "draft", "batch"}
        assert engine.backend.disabled_reason is None


def test_drafts_are_verified_through_a_package() -> None:
    engine = started()
    greedy = SamplingParams(max_tokens=40, ignore_eos=True)
    prompt = PROMPT * 3
    exact = engine.new_cache(CacheConfig.full())
    plain = list(engine.stream(exact, prompt, greedy.replace(lookup=False)))

    for _ in range(2):
        cache = engine.new_cache(CacheConfig(slots=200))
        assert list(engine.stream(cache, prompt, greedy)) == plain
    assert "draft" in forms_used(engine)


def test_rows_go_in_groups_of_nearly_equal_size() -> None:
    from zsmerge_llm.cpu.packaged_step import _groups

    for rows in range(1, 40):
        sizes = [each.stop - each.start for each in _groups(rows)]
        assert sum(sizes) == rows
        assert max(sizes) <= native.MAX_ROWS
        assert max(sizes) - min(sizes) <= 1
