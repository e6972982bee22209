"""What llama.cpp's converter makes of Gemma 4 and Qwen3.5: fields, and the order of values' heads."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np


def write_gemma4_fields(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write what Gemma 4 has beside other decoders: sizes of both kinds of layers, which of them, shared keys."""
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    layers = [config.per_layer_config[number] for number in range(config.num_hidden_layers)]
    full, local = layers[sliding.index(False)], layers[sliding.index(True)]
    rope = config.rope_parameters
    writer.add_head_count_kv([layer.num_key_value_heads for layer in layers])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(full.head_dim)
    for add in (writer.add_key_length_swa, writer.add_value_length_swa, writer.add_rope_dimension_count_swa):
        add(local.head_dim)
    writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(config.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(config.hidden_size_per_layer_input)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def gemma4_widths(config: Any) -> int | list[int]:
    """Return the width of the feed-forward layers, one for each layer if those that borrow keys are twice as wide."""
    width, borrowing = config.intermediate_size, config.num_hidden_layers - config.num_kv_shared_layers
    if not config.use_double_wide_mlp:
        return int(width)
    return [width if number < borrowing else 2 * width for number in range(config.num_hidden_layers)]


def gemma4_rope_factors(config: Any) -> np.ndarray:
    """Return what the frequencies of full attention are divided by: 1, or so much that nothing rotates."""
    full = config.layer_types.index("full_attention")
    pairs = config.per_layer_config[full].head_dim // 2
    rotated = int(pairs * config.rope_parameters["full_attention"]["partial_rotary_factor"])
    return np.array([1.0] * rotated + [1e30] * (pairs - rotated), np.float32)


def write_qwen35_fields(writer: gguf.GGUFWriter, config: Any) -> None:
    """Write the shape of the gated delta nets, and which layers are some."""
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_value_head_dim * config.linear_num_value_heads)
    writer.add_full_attention_interval(config.layer_types.index("full_attention") + 1)
    writer.add_rope_dimension_sections([*config.rope_parameters["mrope_section"], 0])


def tiled_value_heads(array: np.ndarray, name: str, config: Any) -> np.ndarray:
    """Return a weight of a gated delta net with the values' heads in llama.cpp's order: the first of each key head,
    then the second of each.
    """
    sizes = {"in_proj_qkv": config.linear_value_head_dim, "in_proj_z": config.linear_value_head_dim}
    sizes |= {"conv1d": config.linear_value_head_dim, "out_proj": config.linear_value_head_dim}
    sizes |= dict.fromkeys(("in_proj_a", "in_proj_b", "A_log", "dt_proj"), 1)
    part = next((part for part in sizes if f"linear_attn.{part}" in name), None)
    if part is None:
        return array
    axis = 1 if part == "out_proj" else 0
    rows = np.moveaxis(array, axis, 0)
    first = 2 * config.linear_key_head_dim * config.linear_num_key_heads if part in ("in_proj_qkv", "conv1d") else 0
    values = rows[first:].reshape(config.linear_num_key_heads, -1, sizes[part], *rows.shape[1:])
    tiled = values.swapaxes(0, 1).reshape(rows[first:].shape)
    return np.moveaxis(np.concatenate([rows[:first], tiled]), 0, axis)
