"""Tiny configurations of any family of transformers, shrunk from its defaults by the names of the settings.

A layer of each kind stays. Windows, chunks and other limits shrink below the length of the prompts that the checks
read, so that a cache which ignores them gives other logits.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto as auto

from tests.families.overrides import DEFAULTS, OVERRIDES, TEXT_OVERRIDES

VOCAB = 128
WINDOW = 16
HEAD_DIM = 16
SIZES: dict[str, int] = {
    "(.+_)?vocab_size(_per_layer_input)?": VOCAB,
    "hidden_size|d_model|n_embd|dim|model_dim|embed_dim|word_embed_proj_dim|embedding_size|attention_hidden_size": 64,
    "projection_dim|proj_dim|out_hidden_size|text_hidden_size|output_hidden_size|output_dim|input_dim|codebook_dim": 64,
    "intermediate_size|(en|de)coder_ffn_dim|ffn_dim|d_ff|ffn_hidden_size|dim_ff|dense_intermediate_size": 96,
    "(moe|expert|shared|routed).*(intermediate_size|ffn_hidden_size|dim)|moe_ffn_hidden_size": 32,
    "num_attention_heads|n_head|n_heads|num_heads|(en|de)coder_attention_heads": 4,
    "head_dim|global_head_dim|swa_head_dim|attention_head_dim|dim_head|kv_channels|attn_head_dim": 16,
    "v_head_dim|qk_nope_head_dim|swa_v_head_dim|q_lora_rank|kv_lora_rank|index_head_dim": 16,
    "qk_rope_head_dim": 8,
    "(num|n)(_routed|_local)?_experts|moe_num_experts|num_experts_total": 4,
    "(num_experts_per_tok|num_experts_per_token|moe_k|moe_topk|moe_top_k|num_selected_experts|index_n_heads)": 2,
    "n_group|topk_group|num_expert_group|num_limited_groups": 1,
    "first_k_dense_replace|moe_layer_start_index|num_dense_layers|num_kv_shared_layers|n_shared_experts": 1,
    "(sliding_)?window(_size)?|sliding_window(_size)?|attention_chunk_size|local_attention|attention_window": WINDOW,
    "index_topk|index_block_size|index_kpool": 8,
    "sliding_window_pattern|global_attn_every_n_layers|full_attention_interval|interleave_moe_layer_step": 2,
    "hidden_size_per_layer_input|laurel_rank|altup_dim": 16,
    "mamba_d_state|ssm_state_size|state_size|mamba_dt_rank|time_step_rank": 8,
    "mamba_n_groups|mamba_ngroups|n_groups": 1,
    "mamba_n_heads|n_mamba_heads|mamba_num_heads": 8,
    "mamba_d_head|mamba_head_dim|mamba_headdim": 16,
    "mamba_d_ssm": 128,
    "chunk_size|mamba_chunk_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim|linear_value_head_dim": 16,
    "lru_width": 64,
    "n_positions|n_ctx|max_position_embeddings|max_seq_len|max_sequence_length|seq_length": 512,
    "image_size|crop_size": 32,
    "patch_size": 16,
    "num_mel_bins": 16,
}
LAYERS = "num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|depth|num_blocks"
KV_HEADS = "(num_key_value_heads|num_kv_heads|n_kv_heads?|swa_num_key_value_heads|num_global_key_value_heads)"
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
FIRST_FREE_TOKEN = 100
"""Prompts have lower ids: placeholders of images and sounds are those from here on."""


def families() -> list[str]:
    """Return the model types that generate text from text, those of several modalities included."""
    mappings = [
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ]
    return sorted({name for mapping in mappings for name in mapping})


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a tiny model of a family, with some settings of its own."""
    kind = CONFIG_MAPPING[family]
    settings = shrunk(default := kind(**DEFAULTS.get(family, {})))
    if hasattr(default, "is_decoder"):  # else a BERT attends in both directions
        settings["is_decoder"] = True
    _merge(settings, OVERRIDES.get(family, {}))
    _merge(settings, changes)
    return kind(**settings)


def tiny_text_config(family: str) -> PretrainedConfig:
    """Return the configuration of a tiny model of a family's language model alone."""
    whole = CONFIG_MAPPING[family](**DEFAULTS.get(family, {}))
    text = whole.get_text_config(decoder=True)
    return tiny_config(family) if text is whole else type(text)(**shrunk(text))


def shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings of a configuration like `config`, as small as its kind allows."""
    kept = _kept_layers(config)
    settings: dict[str, Any] = {}
    for name in _names(config):
        value = _value(config, name)
        if isinstance(value, PretrainedConfig):
            settings[name] = {**shrunk(value), "model_type": value.model_type}
        elif (small := _small(name, value, config, kept)) is not None:
            settings[name] = small
    _merge(settings, TEXT_OVERRIDES.get(config.model_type, {}))
    return settings


def _names(config: PretrainedConfig) -> list[str]:
    own = [field.name for field in fields(config)]  # type: ignore[arg-type]
    return [name for name in own if not name.startswith("_")] + [
        name for name in config.sub_configs if name not in own and hasattr(config, name)
    ]


def _value(config: PretrainedConfig, name: str) -> Any:
    """Return a setting; None where there is none, or where each layer has its own."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _small(name: str, value: Any, config: PretrainedConfig, kept: list[int]) -> Any:
    """Return the small value of a setting, or None where the default stays."""
    if name.endswith("_token_id") or name.endswith("_token_index"):
        return TOKENS.get(name, FIRST_FREE_TOKEN + sum(map(ord, name)) % 28) if value is not None else None
    if isinstance(value, dict) and "mrope_section" in str(value):
        return _with_small_sections(value)
    if isinstance(value, list | tuple) and kept and len(value) == _num_layers(config):
        return [value[index] for index in kept]
    if value is None or isinstance(value, bool) or not isinstance(value, int):
        return None
    if re.fullmatch(LAYERS, name):
        return len(kept) or 2
    if re.fullmatch(KV_HEADS, name):
        return 4 if value == _value(config, "num_attention_heads") else min(value, 2)
    return next((size for names, size in SIZES.items() if re.fullmatch(names, name) and value > 0), None)


def _with_small_sections(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rotary settings whose sections of a head's dimensions, for M-RoPE, have small sums."""
    small = {key: _with_small_sections(each) if isinstance(each, dict) else each for key, each in parameters.items()}
    if sections := parameters.get("mrope_section"):
        pairs = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0)) // 2
        parts = [max(1, pairs * size // sum(sections)) for size in sections[1:]]
        small["mrope_section"] = [pairs - sum(parts), *parts]
    return small


def _num_layers(config: PretrainedConfig) -> int | None:
    return next((_value(config, name) for name in _names(config) if re.fullmatch(LAYERS, name)), None)


def _kept_layers(config: PretrainedConfig) -> list[int]:
    """Return the indices of layers that have each kind among them, at least two."""
    count = _num_layers(config)
    if not count or count < 2:
        return []
    lists = [value for name in _names(config) if isinstance(value := _value(config, name), list | tuple)]
    lists = [each for each in lists if len(each) == count]
    kinds = [tuple(str(each[index]) for each in lists) for index in range(count)]
    firsts = sorted({kinds.index(kind) for kind in kinds})[:6]
    return firsts if len(firsts) > 1 else [0, 1]


def _merge(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put changes into settings, those of nested configurations into theirs. None takes a setting away."""
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            _merge(settings[name], value)
        else:
            settings[name] = value
