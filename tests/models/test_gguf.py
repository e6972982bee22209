"""GGUF files: the same model and tokenizer come out, once, and bad files are refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.tiny_folders import load_tiny, logits, unreachable
from tests.support.gguf_writer import EXPERTS, TEMPLATE, VOCABULARY, random_model, write_gguf
from zsmerge_llm.errors import (
    CorruptModelError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from zsmerge_llm.models import gguf
from zsmerge_llm.models.loader import load

# --- GGUF: the same model comes out -----------------------------------------------------------------------------------

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PLAIN = {"rope_type": "default", "rope_theta": 1e4}
FALCON_11B = {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
YARN = {
    **{"rope_type": "yarn", "rope_theta": 150000.0, "factor": 8.0, "original_max_position_embeddings": 64},
    **{"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 8}
GEMMA2 = {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True}


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
        ("gemma2", {**GEMMA2, "sliding_window": 8, "attn_logit_softcapping": 20.0}),
        ("qwen3moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
        ("qwen2moe", {**EXPERTS, "shared_expert_intermediate_size": 48}),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
        ("starcoder2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
        ("stablelm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5, "partial_rotary_factor": 0.5}}),
        ("falcon", {"multi_query": True, "layer_norm_epsilon": 1e-3}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {**FALCON_11B, "tie_word_embeddings": False}),
        ("gpt2", {"n_positions": 512, "n_inner": 96, "layer_norm_epsilon": 1e-3}),
        ("nemotron", {"head_dim": 32, "norm_eps": 1e-3, "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25}}),
        ("gpt-oss", {**GPT_OSS, "rope_parameters": YARN}),
        ("minimax-m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "rotary_dim": 16}),
    ],
    ids=[
        *("llama", "llama-wide-tied", "qwen2", "qwen3", "gemma3", "phi3-sliding", "phi3-partial-rotary"),
        *("gemma2", "qwen3moe", "qwen2moe", "lfm2", "starcoder2", "stablelm"),
        *("falcon-7b", "falcon-40b", "falcon-11b", "gpt2", "nemotron", "gpt-oss", "minimax-m2"),
    ],
)
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_from(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    model = random_model(architecture, **changes)
    file = write_gguf(tmp_path / "tiny.gguf", model, architecture)
    planned, loaded = gguf.read_config(file), load_tiny(file)
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)
    assert (type(planned), planned.vocab_size) == (type(model.config), model.config.vocab_size)
    assert loaded.model.num_parameters() == model.num_parameters()
    assert loaded.name == "tiny"
    assert loaded.source == tmp_path / "tiny.gguf"


def test_the_rope_factors_of_a_llama_3_file_become_its_rope_scaling(tmp_path: Path) -> None:
    model = random_model("llama", head_dim=64, rope_parameters=dict(LLAMA3))
    plain = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    file = write_gguf(tmp_path / "tiny.gguf", model, "llama", extra={"rope_freqs.weight": factors})
    loaded = load_tiny(file)
    assert loaded.model.config.rope_parameters["rope_type"] == "llama3"
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


def test_a_llama_file_whose_name_is_mistral_is_read(tmp_path: Path) -> None:
    model = random_model("llama", head_dim=32)
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", model, "llama", name="mistral"))
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


def test_the_end_of_a_gpt_oss_message_does_not_end_its_answer(tmp_path: Path) -> None:
    model = random_model("gpt-oss", **GPT_OSS, rope_parameters=YARN, vocab_size=len(VOCABULARY) + 2)
    special = ["<|return|>", "<|end|>"]
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", model, "gpt-oss", special=special))
    assert loaded.model.generation_config.eos_token_id == [2, 0, len(VOCABULARY)]


def test_linear_rope_scaling_of_a_gemma_3_file_goes_to_its_full_layers(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    rope = {"full_attention": scaled, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    shape = {"num_hidden_layers": 6, "head_dim": 32, "query_pre_attn_scalar": 32, "rope_parameters": rope}
    model = random_model("gemma3", **shape)
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", model, "gemma3", fields=fields))
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)


def test_a_tied_matrix_stored_twice_is_tied_again_at_its_finer_precision(tmp_path: Path) -> None:
    model = random_model("qwen2", tie_word_embeddings=True)
    kinds = {"token_embd.weight": "Q4_0", "output.weight": "Q8_0"}
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", model, "qwen2", kinds=kinds)).model
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert (loaded.lm_head.weight - model.lm_head.weight).abs().max() < 0.01  # 4 bits are off by 0.06


def test_an_untied_output_layer_stays_untied(tmp_path: Path) -> None:
    model = random_model("qwen2", tie_word_embeddings=False)
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", model, "qwen2")).model
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
    found = load_tiny(file).model.model.layers[0].mlp.up_proj.weight
    kind = GGMLQuantizationType.Q8_0
    exact = torch.from_numpy(
        dequantize(quantize(model.model.layers[0].mlp.up_proj.weight.detach().numpy(), kind), kind)
    )
    torch.testing.assert_close(found, exact, rtol=2**-11, atol=1e-7)


# --- GGUF: tokenizer --------------------------------------------------------------------------------------------------


def test_the_tokenizer_of_a_gguf_file_keeps_special_tokens_whole_and_its_template(folder: Path) -> None:
    tokenizer = load_tiny(folder).tokenizer
    ids = tokenizer("<|im_start|>hello<|im_end|>")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "hello", "<|im_end|>"]
    assert tokenizer.chat_template == TEMPLATE
    text = "  Grüße, 2024's 😀\n\n\tx"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_end_token_of_the_vocabulary_ends_an_answer(folder: Path) -> None:
    ends = load_tiny(folder).model.generation_config.eos_token_id
    assert ends == [2, 0]  # <|im_end|> named by the file, <|endoftext|>


def test_a_smollm_file_splits_digits_before_anything_else(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", split="smollm")
    tokenizer = load_tiny(file).tokenizer
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]  # GPT-2's rule would leave one space to the number


def test_a_falcon_file_splits_numbers_after_three_digits(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", split="falcon")
    split = load_tiny(file).tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a 12345, ...b")
    assert [part for part, _ in split] == ["a", "Ġ", "123", "45", ",", "Ġ", "...", "b"]


def test_a_llama_3_file_begins_a_text_with_bos_and_does_not_merge_inside_known_words(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama", split="llama-bpe")
    tokenizer = load_tiny(file).tokenizer
    assert tokenizer("hello")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.backend_tokenizer.model.ignore_merges


def test_a_foreign_tokenizer_beside_a_gguf_file_is_not_taken_for_its_own(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = load_tiny(write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama"))
    assert loaded.tokenizer.tokenize("hello") == ["hello"]


# --- GGUF: the cache of conversions -----------------------------------------------------------------------------------


def test_a_second_start_does_not_read_the_gguf_file_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    steps: list[str] = []
    first = load_tiny(file, progress=steps.append)
    monkeypatch.setattr(gguf, "read_header", unreachable)
    second = load_tiny(file, progress=steps.append)
    assert steps == ["Converting GGUF (once)", "Loading weights", "Loading weights"]
    assert torch.equal(logits(first.model), logits(second.model))
    assert [p.name for p in (tmp_path / "cache" / "converted").iterdir() if p.name.startswith(".partial")] == []


def test_a_changed_gguf_file_is_converted_anew(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", random_model("llama"), "llama")
    before = gguf.folder_for(file, tmp_path)
    os.utime(file, ns=(1, 1))
    assert gguf.folder_for(file, tmp_path) != before


RACE = """
import sys, time
from pathlib import Path
from zsmerge_llm.models import gguf

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
    ("architecture", "reason"),
    [("deci", "transformers has no model of this kind")],
)
def test_an_architecture_that_transformers_converts_wrongly_is_refused_with_the_reason(
    tmp_path: Path, architecture: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"holds a {architecture} model, .*{reason}.*safetensors format"):
        load(_refused_file(tmp_path, architecture, extra={}))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"fields": {"expert_count": 8}}, "mixture of experts"),
        ({"fields": {"attention.sliding_window": 16}}, "sliding window of 16"),
        ({"fields": {"rope.scaling.type": "longrope"}}, "scales positions by longrope"),
        ({"extra": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "unknown factors"),
        ({"extra": {"blk.0.attn_output.bias": np.zeros(64, np.float32)}}, "weights, but a llama model"),
    ],
    ids=["experts", "window", "longrope", "rope-factors", "tensor-without-a-place"],
)
def test_what_a_gguf_file_says_and_the_model_cannot_do_is_refused(
    tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        load(_refused_file(tmp_path, **more))
