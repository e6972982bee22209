"""Settings of tiny configurations that the general rules do not find."""

from __future__ import annotations

from typing import Any

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SECTIONS = {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [2, 3, 3]}}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}

WITHOUT_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
ASSISTANT = {**WITHOUT_PER_LAYER_INPUT, "num_kv_shared_layers": 2}
DEFAULTS: dict[str, dict[str, Any]] = {"gemma4_assistant": {"text_config": WITHOUT_PER_LAYER_INPUT}}
"""By family, for a configuration that has no valid one of defaults alone."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}},
    "gemma4_assistant": {"text_config": ASSISTANT},
    "gemma4_unified_assistant": {"text_config": ASSISTANT},
    "granite4_vision": {"deepstack_layer_map": [], "spatial_target_layers": [], "downsample_rate": "1/2"},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 64}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "qwen2_5_omni": {"enable_audio_output": False},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 105},
    "qwen3_omni_moe": {"enable_audio_output": False, "thinker_config": {"vision_start_token_id": 105}},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 105},
}
"""By family, for its outermost configuration."""

TEXT_OVERRIDES: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"sliding_attention": PLAIN_ROPE, "full_attention": PLAIN_ROPE}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_layers": 2,
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "dots1": EXPERTS,
    "ernie4_5_vl_moe_text": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [3, 3, 2]}},
    "glm46v_text": SECTIONS,
    "glm4v_text": SECTIONS,
    "glm_ocr_text": SECTIONS,
    "glm4v_moe_text": {
        "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]},
    },
    "gptj": {"rotary_dim": 8},
    "hy_v4_vl_text": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [2, 1, 1]}},
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "paddleocr_vl_text": SECTIONS,
    "qwen2_5_omni_text": SECTIONS,
    "qwen2_5_vl_text": SECTIONS,
    "qwen2_vl_text": SECTIONS,
    "qwen4_exp_text": {
        "head_dim": 16,
        "num_key_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "step3p5": {"sliding_window": 16},
    "xlstm": {"hidden_size": 128},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hunyuan_vl_text": {"head_dim": 16, "rope_parameters": {**PLAIN_ROPE, "mrope_section": [2, 2, 2, 2]}},
}
"""By model type, for a configuration wherever it is nested."""
