"""Settings of a GGUF file's model that transformers does not read, or reads wrongly, one function each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import UnsupportedModelError
from zsmerge_llm.models.gguf_gemma4 import gemma4_config
from zsmerge_llm.models.gguf_header import REMEDY, Header

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""Layers of the largest models of architectures whose query scale no field has."""


def own_config(header: Header) -> PretrainedConfig | None:
    """Return the config of a file whose fields transformers cannot make one from; None: it can.

    Of gpt-oss it reads the lengths of the names of the YaRN fields in place of their values. A Llama file whose name is
    "mistral" becomes a Mistral model, whose tensors it then does not find. Of Gemma 4 it reads what
    all decoders have.
    """
    from transformers import GptOssConfig, LlamaConfig

    if header.architecture == "gpt-oss":
        return GptOssConfig(
            **_decoder_shape(header),
            intermediate_size=header.get("expert_feed_forward_length") or header.get("feed_forward_length"),
            num_local_experts=header.get("expert_count"),
            num_experts_per_tok=header.get("expert_used_count"),
        )
    if header.architecture == "gemma4":
        return gemma4_config(header, _decoder_shape(header))
    if header.architecture == "llama" and header.fields.get("general.name") == "mistral":
        return LlamaConfig(**_decoder_shape(header), intermediate_size=header.get("feed_forward_length"))
    return None


def _decoder_shape(header: Header) -> dict[str, Any]:
    get, heads = header.get, header.get("attention.head_count")
    ids = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return {
        "vocab_size": int(header.tensors["token_embd.weight"].shape[1]),
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv") or heads,
        "head_dim": get("attention.key_length") or get("rope.dimension_count") or get("embedding_length") // heads,
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": get("rope.freq_base") or 10000.0},
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{setting: header.fields.get(f"tokenizer.ggml.{name}_token_id") for name, setting in ids.items()},
    }


def overrides(header: Header) -> dict[str, Any]:
    """Return settings of the config that transformers reads wrongly."""
    get, tensors = header.get, header.tensors
    found: dict[str, Any] = {}
    if header.architecture in ("llama", "qwen3", "nemotron"):
        found["head_dim"] = get("attention.key_length")  # transformers uses its own default for Qwen3
    match header.architecture:
        case "llama" if "blk.0.attn_q.bias" in tensors:
            found["attention_bias"] = True  # else transformers ignores these biases
        case "qwen2moe" | "qwen3moe":
            found["moe_intermediate_size"] = get("expert_feed_forward_length")
            found["shared_expert_intermediate_size"] = get("expert_shared_feed_forward_length")
        case "gemma2":
            for name in ("attn_logit_softcapping", "final_logit_softcapping"):
                found[name] = get(name)
        case "falcon":
            found |= _falcon_shape(header)
        case "gpt2":
            found |= {"n_positions": get("context_length"), "n_inner": get("feed_forward_length")}
        case "minimax-m2":
            found["intermediate_size"] = get("expert_feed_forward_length")
        case "nemotron":
            found["norm_eps"] = get("attention.layer_norm_epsilon")
    return {name: value for name, value in found.items() if value is not None}


def _falcon_shape(header: Header) -> dict[str, Any]:
    """Return what tells Falcon-7B, 40B and 11B apart: transformers takes every file for a tied Falcon-7B."""
    kv_heads = header.get("attention.head_count_kv") or 1
    shape = {
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": kv_heads > 1,
        "ffn_hidden_size": header.get("feed_forward_length"),
        "layer_norm_epsilon": header.get("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    if kv_heads > 1:
        shape["num_ln_in_parallel_attn"] = 1 + ("blk.0.attn_norm_2.weight" in header.tensors)
    return shape


def set_rope(config: Any, header: Header) -> None:
    """Set the rotary positions' parameters: base, share of the head, scaling. Gemma 4's are read; GPT-2 has a table.

    Raises:
        UnsupportedModelError: a scaling that is not linear, YaRN or Llama 3.1's.
    """
    scaling = header.get("rope.scaling.type")
    parameters = getattr(config, "rope_parameters", None)
    if not parameters or header.architecture == "gemma4":
        return
    parameters = parameters.get("full_attention", parameters)  # Gemma 3 scales its full-attention layers only
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if header.architecture in ("phi3", "stablelm", "nemotron") and (rotary := header.get("rope.dimension_count")):
        parameters["partial_rotary_factor"] = rotary / head_dim
    if header.architecture in ("starcoder2", "stablelm") and (theta := header.get("rope.freq_base")):
        parameters["rope_theta"] = theta  # which transformers does not read of them
    if "rope_freqs.weight" in header.tensors:
        parameters.update(_llama3_rope(header, parameters["rope_theta"], head_dim))
    elif scaling in ("linear", "yarn"):
        parameters.update(rope_type=scaling, factor=header.get("rope.scaling.factor"))
        if original := header.get("rope.scaling.original_context_length"):
            parameters["original_max_position_embeddings"] = original
        if header.architecture == "gpt-oss":
            parameters["truncate"] = False  # its frequencies change between fractions of dimensions
    elif scaling not in (None, "none") or "rope_factors_long.weight" in header.tensors:
        raise UnsupportedModelError(f"{header.path} scales positions by {scaling or 'longrope'}: {REMEDY}.")


def _llama3_rope(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """Return Llama 3.1's RoPE parameters, from the file's factor per frequency, which transformers ignores."""
    import numpy as np

    found = header.tensors["rope_freqs.weight"].data.astype(np.float64)
    factor, low, high, original = float(found.max()), 1.0, 4.0, 8192
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelength - low) / (high - low), 0, 1)
    if found.shape != smooth.shape or not np.allclose(found, 1 / ((1 - smooth) / factor + smooth), rtol=1e-3):
        raise UnsupportedModelError(f"{header.path} scales positions by unknown factors: {REMEDY}.")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def set_window(config: Any, header: Header) -> None:
    """Set the size of sliding windows.

    Raises:
        UnsupportedModelError: an architecture whose sliding layers are not known.
    """
    window = header.get("attention.sliding_window")
    if not window or window >= (header.get("context_length") or window + 1):
        return
    if header.architecture not in ("gemma2", "gemma3", "gemma4", "phi3", "gpt-oss"):
        raise UnsupportedModelError(f"{header.path} has a sliding window of {window} tokens: {REMEDY}.")
    config.sliding_window = window


def set_query_scale(config: Any, header: Header) -> None:
    """Set Gemma's query scale, which no field has: the head size, or hidden size / heads in the 27B models."""
    if header.architecture in LAYERS_OF_27B:
        mean_head_dim = config.hidden_size // config.num_attention_heads
        is_27b = config.num_hidden_layers == LAYERS_OF_27B[header.architecture]
        config.query_pre_attn_scalar = mean_head_dim if is_27b else config.head_dim
