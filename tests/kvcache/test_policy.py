"""The paper's algorithm: Figure 2, Algorithm 1 token by token, Theorem 3.1, and what half precision must not break."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.reference_algorithm import ReferenceHead
from zsmerge_llm.attention.backend import TorchBackend
from zsmerge_llm.attention.call import AttentionCall
from zsmerge_llm.attention.masks import PassLayout
from zsmerge_llm.attention.passes import ForwardPass
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.slots import LayerSpec

HEADS, GROUP, DIM = 2, 2, 4
FIGURE_2 = CacheConfig(
    slots=9, sink=0, recent=3, residual=2, alpha=0.6, decay=0.98, stage=1, policy="cumulative_attention"
)


def one_layer(config: CacheConfig, rows: int = 1, dtype: torch.dtype = torch.float32) -> Cache:
    return Cache(config, [LayerSpec(HEADS * GROUP, HEADS, DIM, DIM, None, dtype, torch.device("cpu"))], rows)


def feed(cache: Cache, query: Tensor, key: Tensor, value: Tensor, valid: Tensor | None = None) -> Tensor:
    """Run a forward pass of a one-layer model: query [B, Hq, n, D], key and value [B, H, n, D]."""
    rows, new = key.shape[0], key.shape[2]
    lengths = torch.tensor(cache.lengths)
    counts = torch.full((rows,), new) if valid is None else valid.sum(-1)
    layout = PassLayout(new, lengths[:, None] + torch.arange(new), valid, counts.tolist(), lengths + counts)
    step = ForwardPass(cache, layout, TorchBackend())
    output = step.attend(AttentionCall(0, query, key, value, DIM**-0.5, None, None, None))
    cache.lengths = layout.seen.tolist()
    return output


def random_qkv(num_tokens: int, seed: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS * GROUP, num_tokens), (HEADS, num_tokens), (HEADS, num_tokens))
    query, key, value = (torch.randn(rows, *shape, DIM, generator=generator) for shape in shapes)
    return query * 2, key, value


def reference_heads(config: CacheConfig) -> list[ReferenceHead]:
    return [
        ReferenceHead(config.sink, config.num_context, config.recent, config.residual, config.alpha, config.decay)
        for _ in range(HEADS)
    ]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sink=st.integers(0, 2),
    context=st.integers(1, 5),
    recent=st.integers(1, 4),
    residual=st.integers(0, 3),
    decay=st.sampled_from([0.5, 0.98, 1.0]),
)
def test_tensor_code_agrees_with_algorithm_1_token_by_token(
    seed: int, sink: int, context: int, recent: int, residual: int, decay: float
) -> None:
    config = CacheConfig(
        slots=sink + context + recent + residual,
        sink=sink,
        recent=recent,
        residual=residual,
        decay=decay,
        stage=1,
        policy="cumulative_attention",
    )
    cache, heads = one_layer(config), reference_heads(config)
    query, key, value = random_qkv(30, seed)
    for t in range(30):
        output = feed(cache, query[:, :, t : t + 1], key[:, :, t : t + 1], value[:, :, t : t + 1])
        for h, head in enumerate(heads):
            group = slice(h * GROUP, (h + 1) * GROUP)
            expected = head.step(query[0, group, t].tolist(), key[0, h, t].tolist(), value[0, h, t].tolist(), DIM**-0.5)
            torch.testing.assert_close(output[0, group, 0], torch.tensor(expected), rtol=1e-4, atol=1e-4)
    layer = cache.layers[0]
    for h, head in enumerate(heads):
        merged = [slot.multiplicity for slot in head.merged] + [0.0] * (residual - len(head.merged))
        assert layer.multiplicity[0, h, :residual].tolist() == merged
        kept = layer.multiplicity[0, h, residual:] > 0
        assert sorted(layer.position[0, h, residual:][kept].tolist()) == sorted(s.position for s in head.kept)


def test_figure_2_from_12_to_17_tokens_keeps_nine_slots_and_accounts_for_every_token() -> None:
    cache = one_layer(FIGURE_2)
    query, key, value = random_qkv(17, seed=3)
    for t in range(17):
        feed(cache, query[:, :, t : t + 1], key[:, :, t : t + 1], value[:, :, t : t + 1])
        multiplicity, position = cache.layers[0].multiplicity[0], cache.layers[0].position[0]
        assert multiplicity.sum(-1).tolist() == [t + 1] * HEADS
        assert ((multiplicity > 0).sum(-1) == min(t + 1, 9)).all()
        if t + 1 in (12, 17):
            for h in range(HEADS):
                verbatim = position[h, 2:][multiplicity[h, 2:] > 0].tolist()
                assert verbatim[-3:] == [t - 2, t - 1, t], "B_p = 3 newest tokens"
                assert len(verbatim) == 3 + 4, "B_c = 4 context tokens beside them"
            assert multiplicity[:, :2].sum(-1).tolist() == [t + 1 - 7] * HEADS, "B_r = 2 slots hold the merged rest"


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000), alpha=st.floats(0.0, 1.0), residual=st.integers(1, 4), num_evicted=st.integers(1, 12)
)
def test_theorem_3_1_unmerged_tokens_keep_at_least_their_attention(
    seed: int, alpha: float, residual: int, num_evicted: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept, evicted = (torch.randn(1, 1, n, DIM, generator=generator) for n in (5, num_evicted))
    query = torch.randn(1, 1, 1, 3, DIM, generator=generator)
    empty = torch.zeros(1, 1, residual, DIM)
    (keys, _, multiplicity), _ = equations.merge(
        (empty, empty, torch.zeros(1, 1, residual)), (evicted, evicted, torch.ones(1, 1, num_evicted))
    )
    full = equations.attention_weights(query, torch.cat([kept, evicted], 2), torch.zeros(()), 1.0)[..., :5]
    bias = equations.slot_bias(torch.cat([torch.ones(1, 1, 5), multiplicity], -1), alpha)[:, :, None, None, :]
    compressed = equations.attention_weights(query, torch.cat([kept, keys], 2), bias, 1.0)[..., :5]
    assert (compressed >= full * (1 - 1e-5)).all()


def test_merged_slots_are_the_means_of_their_tokens() -> None:
    _, key, value = random_qkv(40, seed=1)
    empty, none = torch.zeros(1, HEADS, 3, DIM), torch.zeros(1, HEADS, 3)
    (keys, values, multiplicity), target = equations.merge((empty, empty, none), (key, value, torch.ones(1, HEADS, 40)))
    for h in range(HEADS):
        for slot in range(3):
            members = target[0, h] == slot
            assert multiplicity[0, h, slot] == members.sum()
            torch.testing.assert_close(keys[0, h, slot], key[0, h, members].mean(0))
            torch.testing.assert_close(values[0, h, slot], value[0, h, members].mean(0))


def test_padding_is_never_merged() -> None:
    _, key, value = random_qkv(6, seed=2)
    multiplicity = torch.tensor([1.0, 0, 1, 0, 0, 1]).expand(1, HEADS, 6)
    padded = torch.where(multiplicity[..., None] > 0, key, 1e9)
    empty, none = torch.zeros(1, HEADS, 2, DIM), torch.zeros(1, HEADS, 2)
    (keys, _, total), _ = equations.merge((empty, empty, none), (padded, value, multiplicity))
    assert total.sum(-1).tolist() == [[3.0] * HEADS]
    assert keys.abs().max() < 1e3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_multiplicities_and_means_do_not_saturate_in_half_precision(dtype: torch.dtype) -> None:
    config = CacheConfig(slots=6, sink=0, recent=2, residual=1, stage=1, policy="cumulative_attention", decay=0.98)
    cache = one_layer(config, dtype=dtype)
    steps = 3000
    key = torch.full((1, HEADS, 1, DIM), 300.0, dtype=dtype)  # K-biases of Qwen2.5 are of this size
    for t in range(steps):
        value = torch.full((1, HEADS, 1, DIM), float(t >= steps // 2), dtype=dtype)
        query = torch.zeros(1, HEADS * GROUP, 1, DIM, dtype=dtype)
        feed(cache, query, key, value)
    layer = cache.layers[0]
    assert layer.multiplicity[0, :, 0].tolist() == [steps - 5] * HEADS
    assert torch.isfinite(layer.keys).all()
    torch.testing.assert_close(layer.values[0, :, 0].float().mean().item(), 0.5, atol=0.01, rtol=0)


def test_sinks_are_never_merged_even_without_any_attention() -> None:
    config = CacheConfig(slots=10, sink=3, recent=2, residual=2, stage=1, policy="cumulative_attention", decay=0.5)
    cache = one_layer(config)
    query, key, value = random_qkv(60, seed=4)
    key[:, :, :3] = -10 * query[:, ::GROUP].mean(2, keepdim=True)
    for t in range(60):
        feed(cache, query[:, :, t : t + 1], key[:, :, t : t + 1], value[:, :, t : t + 1])
    for h in range(HEADS):
        assert cache.layers[0].position[0, h, 2:5].tolist() == [0, 1, 2]
        torch.testing.assert_close(cache.layers[0].keys[0, h, 2:5], key[0, h, :3])


def test_the_bias_of_a_slot_is_alpha_log_multiplicity_and_minus_infinity_if_empty() -> None:
    bias = equations.slot_bias(torch.tensor([0.0, 1.0, 10.0]), 0.6)
    assert bias[0] == -math.inf
    assert bias[1] == 0
    assert bias[2] == pytest.approx(0.6 * math.log(10))


def test_scores_of_a_chunk_equal_those_of_its_tokens_one_by_one() -> None:
    """Eq. 5 over a chunk, as long as nothing is evicted."""
    config = CacheConfig(slots=40, sink=0, recent=2, policy="cumulative_attention", decay=0.9, stage=4)
    whole, single = one_layer(config), one_layer(config)
    query, key, value = random_qkv(24, seed=5)
    chunk_output = feed(whole, query, key, value)
    steps = [feed(single, *(x[:, :, t : t + 1] for x in (query, key, value))) for t in range(24)]
    torch.testing.assert_close(chunk_output, torch.cat(steps, 2))
    torch.testing.assert_close(whole.layers[0].score, single.layers[0].score)


def test_a_probe_decides_which_tokens_are_kept_and_is_not_cached() -> None:
    config = CacheConfig(
        slots=12, sink=0, recent=2, stage=1, observation_window=4, pool_kernel=1, policy="observation_window"
    )
    cache = one_layer(config)
    _, key, value = random_qkv(40, seed=6)
    key = key / key.norm(dim=-1, keepdim=True)
    query = torch.zeros(1, HEADS * GROUP, 40, DIM)
    attended = [3, 9, 17, 25]
    probe = 20 * key[:, :, attended].repeat_interleave(GROUP, 1)
    key_probe = torch.full((1, HEADS, 4, DIM), 100.0)
    position = torch.arange(44)[None]
    step = ForwardPass(cache, PassLayout(40, position, None, [40], torch.tensor([40])), TorchBackend())
    tensors = torch.cat([query, probe], 2), torch.cat([key, key_probe], 2), torch.cat([value, key_probe], 2)
    step.attend(AttentionCall(0, *tensors, DIM**-0.5, None, None, None))
    layer = cache.layers[0]
    assert layer.keys.max() < 50, "the probe's own keys are not cached"
    for h in range(HEADS):
        assert set(attended) <= set(layer.position[0, h][layer.multiplicity[0, h] > 0].tolist())
