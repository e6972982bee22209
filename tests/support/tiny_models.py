"""Tiny random models of every supported family: two or three layers, a vocabulary of 97, weights from a seed."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 8
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama"},
    "llama-mqa": {"model_type": "llama", "num_key_value_heads": 1},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral-sliding": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma2-softcap": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": None,
    },
    "phi3": {"model_type": "phi3", "sliding_window": None},
    "gpt_neox": {"model_type": "gpt_neox", "num_key_value_heads": None},
    "gpt_oss-sinks": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        "sliding_window": WINDOW,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "falcon-mqa": {"model_type": "falcon", "multi_query": True, "new_decoder_architecture": False, "alibi": False},
    "falcon-mha": {"model_type": "falcon", "multi_query": False, "new_decoder_architecture": False, "alibi": False},
    "falcon-new": {"model_type": "falcon", "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 4,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
HYBRIDS: dict[str, dict[str, object]] = {
    "qwen3_next": {
        **DELTA_NET,
        "model_type": "qwen3_next",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3_5": {**DELTA_NET, "model_type": "qwen3_5_text", "head_dim": 16},
    "olmo_hybrid": {**DELTA_NET, "model_type": "olmo_hybrid"},
    "lfm2": {
        "model_type": "lfm2",
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "granite-hybrid": {
        **MAMBA,
        "model_type": "granitemoehybrid",
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "shared_intermediate_size": 32,
    },
    "falcon_h1": {**MAMBA, "model_type": "falcon_h1", "mamba_d_ssm": 64},
    "nemotron_h": {
        "model_type": "nemotron_h",
        "num_hidden_layers": None,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "head_dim": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "jamba": {
        "model_type": "jamba",
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "mamba_d_state": 8,
    },
    "bamba": {**MAMBA, "model_type": "bamba", "num_hidden_layers": 3, "attn_layer_indices": [1]},
}
"""Families with recurrent layers beside attention."""


def tiny_model(
    family: str = "llama",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    vocab: int = VOCAB,
    intermediate_size: int = 64,
    **sizes: int,
) -> PreTrainedModel:
    """Return a random model whose attention is far from uniform, so that logits depend on which slots are evicted."""
    own = FAMILIES.get(family) or HYBRIDS[family]
    parameters = {**COMMON, "vocab_size": vocab, "intermediate_size": intermediate_size, **own, **sizes}
    settings = {name: value for name, value in parameters.items() if value is not None}
    if family.startswith("falcon-"):
        settings.pop("num_key_value_heads")
    if own.get("sliding_window", 0) is None:
        settings["sliding_window"] = None
    config = AutoConfig.for_model(str(settings.pop("model_type")), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    return randomized(model)


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """Give a model random weights with which attention is far from uniform."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.25)
            elif "sinks" in name or "bias" in name:
                weight.normal_(0, 0.5)
    return model


def tokens(count: int, seed: int = 0) -> list[int]:
    """Return random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()
