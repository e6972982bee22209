"""Weights of 4 and 8 bits: packed layers match their dequantized matrices, and models of them answer and are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.gguf_writer import random_model, write_gguf
from tests.support.tiny_models import tiny_model
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.cpu.quantized_linear import (
    MAX_GEMV_ROWS_INT4,
    MAX_GEMV_ROWS_INT8,
    Int4Linear,
    Int8Embedding,
    Int8Linear,
    quantize_int4,
    quantize_linear,
    quantize_model,
    unpack_int4,
)
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.errors import ConfigError, SessionMismatchError
from zsmerge_llm.models import gguf
from zsmerge_llm.models.device import packed_bits, quantization_config
from zsmerge_llm.models.loader import load
from zsmerge_llm.sessions.fingerprint import fingerprint

MARIGOLD = Path(__file__).parents[2] / "zsmerge_llm" / "data" / "marigold.txt"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = (1, 7, MAX_GEMV_ROWS_INT8, MAX_GEMV_ROWS_INT8 + 1, MAX_GEMV_ROWS_INT4, MAX_GEMV_ROWS_INT4 + 1, 70)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny tied Llama with its tokenizer as a model folder."""
    parent = tmp_path_factory.mktemp("models")
    file = write_gguf(parent / "tiny.gguf", random_model("llama", tie_word_embeddings=True), "llama")
    return gguf.convert_once(file, parent / "tiny", lambda step: None)


def linear(inputs: int, outputs: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(inputs * outputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((actual.float() - expected).abs().max() / expected.abs().max())


# --- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (96, 208), (128, 48), (1024, 80)])
def test_a_packed_layer_multiplies_with_its_dequantized_matrix_for_few_rows_and_for_many(
    inputs: int, outputs: int, bits: int, dtype: torch.dtype
) -> None:
    exact = linear(inputs, outputs, dtype)
    layer: Any = quantize_linear(exact, bits, dtype)
    assert isinstance(layer, Int4Linear if bits == 4 else Int8Linear)
    matrix = layer.dequantized_weight()
    assert torch.equal(exact.weight, linear(inputs, outputs, dtype).weight)  # not rounded in place
    for count in ROWS:
        rows = torch.randn(count, inputs).to(dtype)
        output = layer(rows)
        assert output.dtype == dtype
        assert relative_distance(output, F.linear(rows.float(), matrix, exact.bias.float())) < TOLERANCE[dtype]


@pytest.mark.parametrize(("bits", "limit"), [(4, 0.09), (8, 0.008)])
def test_the_rounded_matrix_stays_near_the_exact_one(bits: int, limit: float) -> None:
    exact = linear(256, 512, torch.bfloat16)
    exact.weight.copy_(torch.randn(512, 256))
    layer: Any = quantize_linear(exact, bits, torch.bfloat16)
    weight = exact.weight
    assert (layer.dequantized_weight() - weight.float()).norm() / weight.float().norm() < limit


@pytest.mark.parametrize(
    ("inputs", "outputs", "kind"),
    [(64, 64, Int4Linear), (48, 64, Int8Linear), (64, 40, Int8Linear), (40, 64, nn.Linear), (33, 7, nn.Linear)],
)
def test_sizes_that_the_kernel_does_not_support_get_more_bits(inputs: int, outputs: int, kind: type[nn.Module]) -> None:
    exact = linear(inputs, outputs)
    layer = quantize_linear(exact, 4, torch.float32)
    assert type(layer) is kind
    rows = torch.randn(3, inputs)
    torch.testing.assert_close(layer(rows), exact(rows), atol=0.2, rtol=0.2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_any_leading_dimensions_and_strides_are_accepted(bits: int, bias: bool) -> None:
    layer: Any = quantize_linear(linear(64, 96, bias=bias), bits, torch.float32)
    x = torch.randn(2, 9, 64)
    one_by_one = torch.stack([torch.stack([layer(x[b, t]) for t in range(9)]) for b in range(2)])
    torch.testing.assert_close(layer(x), one_by_one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x[:, -1:]), one_by_one[:, -1:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer(x.transpose(0, 1)), one_by_one.transpose(0, 1), atol=1e-4, rtol=1e-4)


def test_a_group_of_equal_weights_is_exact_to_the_precision_of_its_dtype() -> None:
    exact = linear(64, 64)
    exact.weight.fill_(0.37)
    exact.weight[3:9] = 0
    layer: Any = quantize_linear(exact, 4, torch.bfloat16)
    torch.testing.assert_close(layer.dequantized_weight(), exact.weight, atol=1e-6, rtol=5e-3)


@pytest.mark.parametrize("layout", [(64, True), (32, True), (64, False), (32, False), (16, False)])
def test_packed_codes_are_unpacked_from_every_layout(layout: tuple[int, bool]) -> None:
    block, halves = layout
    codes = torch.randint(0, 16, (112, 32), dtype=torch.uint8)
    parts = []
    for start in range(0, 112, block):
        rows = codes[start : start + block].T
        split = halves and rows.shape[1] == block
        low, high = rows.chunk(2, 1) if split else (rows[:, ::2], rows[:, 1::2])
        parts.append((low | high << 4).reshape(-1, 16))
    assert torch.equal(unpack_int4(torch.cat(parts), layout).T, codes)


def test_the_layout_of_this_machine_is_known() -> None:
    """With an unknown layout, every chunk would go through the kernel for few rows, many times slower."""
    packed, scales = quantize_int4(torch.randn(128, 64), torch.float32)
    layer = Int4Linear(packed, scales)
    torch.testing.assert_close(
        layer._dequantizing_matmul(torch.eye(64)), layer._packed_matmul(torch.eye(64)), atol=1e-5, rtol=1e-4
    )


# --- a model ----------------------------------------------------------------------------------------------------------


def module_types(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_modules()}


@pytest.mark.parametrize(("quantization", "kind"), [("int4", "Int4Linear"), ("int8", "Int8Linear")])
def test_the_layers_are_packed_and_tied_embeddings_share_one_matrix(folder: Path, quantization: str, kind: str) -> None:
    steps: list[str] = []
    model = load(folder, quantization=quantization, device="cpu", dtype="bfloat16", progress=steps.append).model
    types = module_types(model)
    assert types["model.layers.0.self_attn.q_proj"] == types["model.layers.1.mlp.down_proj"] == kind
    assert (types["model.embed_tokens"], types["lm_head"]) == ("Int8Embedding", "Int8Linear")
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {model.dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert steps[-1] == f"Packing weights in {quantization[3:]} bits"


@pytest.mark.parametrize("quantization", ["int4", "int8"])
def test_an_untied_model_keeps_two_matrices(tmp_path: Path, quantization: str) -> None:
    exact = random_model("qwen2", tie_word_embeddings=False)
    file = write_gguf(tmp_path / "tiny.gguf", exact, "qwen2")
    settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "cache_dir": tmp_path}
    model = load(file, quantization=quantization, **settings).model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embedding.weight.data_ptr() != head.weight.data_ptr()
    torch.testing.assert_close(embedding(torch.arange(9)), exact.model.embed_tokens.weight[:9], atol=0.01, rtol=0.01)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, exact.model.layers[0].self_attn.q_proj.bias)


def test_scaled_embeddings_of_gemma_stay_scaled() -> None:
    exact, packed = tiny_model("gemma3"), tiny_model("gemma3")
    quantize_model(packed, 8, torch.float32)
    assert isinstance(packed.get_input_embeddings(), Int8Embedding)
    ids = torch.arange(3, 20)
    expected = exact.get_input_embeddings()(ids)
    torch.testing.assert_close(
        packed.get_input_embeddings()(ids), expected, atol=0.02 * float(expected.detach().max()), rtol=0.02
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3", "falcon-new"])
def test_a_model_of_eight_bits_gives_almost_the_logits_of_the_exact_one(family: str) -> None:
    exact, packed = tiny_model(family), tiny_model(family)
    quantize_model(packed, 8, torch.float32)
    assert "Int8Linear" in module_types(packed).values()
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        assert torch.cosine_similarity(packed(ids).logits, exact(ids).logits, dim=-1).min() > 0.99


def test_parameters_outside_linear_layers_are_not_quantized() -> None:
    """The experts of gpt-oss are plain parameters."""
    exact, packed = tiny_model("gpt_oss-sinks"), tiny_model("gpt_oss-sinks")
    quantize_model(packed, 4, torch.float32)
    experts = [name for name, _ in exact.named_parameters() if ".experts." in name]
    assert experts
    for name in experts:
        assert torch.equal(packed.get_parameter(name), exact.get_parameter(name))


@pytest.mark.parametrize("bits", [4, 8])
def test_reading_in_chunks_a_token_at_a_time_and_in_batches_agree(bits: int) -> None:
    model = tiny_model("llama")
    quantize_model(model, bits, torch.float32)
    ids = torch.arange(3, 90).tolist()
    wide = Engine(model, CacheConfig(slots=128), chunk=64)
    narrow = Engine(model, CacheConfig(slots=128), chunk=1)
    expected = wide.read(wide.new_cache(), ids)
    torch.testing.assert_close(narrow.read(narrow.new_cache(), ids), expected, atol=1e-3, rtol=1e-3)
    logits = wide.read_batch(wide.new_cache(rows=2), [ids, ids[:40]])
    torch.testing.assert_close(logits[0], expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits[1], wide.read(wide.new_cache(), ids[:40]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("quantization", ["int4", "int8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_llm_answers_from_a_compressed_cache(folder: Path, quantization: str, dtype: str) -> None:
    settings: dict[str, Any] = {"quantization": quantization, "dtype": dtype, "device": "cpu", "chunk": 64}
    llm = LLM(folder, cache=CacheConfig(slots=96), **settings)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    first = llm.complete("hello " * 100, sampling=params)
    assert first.usage.completion_tokens == 5
    assert first.usage.dropped_tokens > 0
    assert llm.complete("hello " * 100, sampling=params).text == first.text


def test_sessions_of_other_weights_do_not_load(folder: Path, tmp_path: Path) -> None:
    """The fingerprint tells exact, 8-bit and 4-bit weights apart."""
    llms = {q: LLM(folder, quantization=q, device="cpu", dtype="float32") for q in (None, "int8", "int4")}
    digests = [
        fingerprint(llm.engine.model, llm.tokenizer, llm.tokenizer.chat_template, llm.cache).weights
        for llm in llms.values()
    ]
    assert len(set(digests)) == 3
    llms["int4"].chat("hello", session="a", sampling=SamplingParams(max_tokens=2))
    llms["int4"].session("a").save(tmp_path / "a.zsmerge")
    with pytest.raises(SessionMismatchError):
        llms["int8"].load_session(tmp_path / "a.zsmerge")
    reloaded = LLM(folder, quantization="int4", device="cpu", dtype="float32")
    assert reloaded.load_session(tmp_path / "a.zsmerge").tokens


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["xpu", "mps"])
def test_int4_on_neither_a_cpu_nor_an_nvidia_gpu_is_refused_and_nf4_named(device: str) -> None:
    with pytest.raises(ConfigError, match=f"not on {device}: set device='cpu', or use 'nf4'"):
        quantization_config("int4", torch.bfloat16, torch.device(device), None)


def test_int4_with_a_device_map_is_refused_before_anything_is_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match="not spread by device_map"):
        load(folder, quantization="int4", device_map={"": "cpu"})


def test_int8_uses_bitsandbytes_on_a_gpu_and_the_kernel_of_pytorch_on_a_cpu() -> None:
    assert packed_bits("int8", torch.device("cuda"), None) is None
    assert packed_bits("int8", torch.device("cpu"), {"": "cpu"}) is None
    assert packed_bits("int8", torch.device("cpu"), None) == 8
    assert packed_bits("nf4", torch.device("cpu"), None) is None


def test_an_unknown_quantization_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'int4' or 'fp8'"):
        LLM("smollm2", quantization="int3")


# --- real weights -----------------------------------------------------------------------------------------------------


def negative_log_likelihood(llm: LLM, tokens: int) -> float:
    ids = llm.tokenizer(MARIGOLD.read_text(encoding="utf-8")).input_ids[:tokens]
    return -float(llm.engine.logprobs(llm.engine.new_cache(), ids)[1:].mean())


@pytest.mark.slow
def test_quantized_smollm2_predicts_a_text_almost_as_well(smollm2: LLM) -> None:
    exact = negative_log_likelihood(smollm2, 1024)
    # Questions whose answers do not depend on rounding. That of the capital of France does in 8 bits: two first tokens
    # differ by one step of a bfloat16 logit.
    questions = {
        "int8": ("What is the capital of Germany?", "Berlin"),
        "int4": ("Who wrote Hamlet?", "Shakespeare"),
    }
    for quantization, limit in (("int8", 1.01), ("int4", 1.03)):
        packed = LLM("smollm2", quantization=quantization, device="cpu")
        assert negative_log_likelihood(packed, 1024) < limit * exact
        question, answer = questions[quantization]
        assert answer in packed.chat(question, sampling=SamplingParams(max_tokens=40)).text
