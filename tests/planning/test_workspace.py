"""The formula for the peak of a pass covers every tensor that lives then, and not much more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache.layer_cache import TENSORS
from zsmerge_llm.planning.shape import shape_of
from zsmerge_llm.planning.workspace import live_nbytes
from zsmerge_llm.retrieval.query_probe import MAX_QUESTION_TOKENS

SIZES = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside that are still alive. peak: the most after any operation."""

    def __init__(self, without: list[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._without = {tensor.untyped_storage()._cdata for tensor in without}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._without:
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: (ref, size) for key, (ref, size) in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def peak(engine: Engine, length: int, probe: bool) -> int:
    """Bytes above weights and cache while a text is read and eight tokens are decoded."""
    ids, cache = tokens(length), engine.new_cache()
    own = [getattr(layer, name) for layer in cache.layers for name in TENSORS]
    weights = [*engine.model.parameters(), *engine.model.buffers()]
    live = LiveBytes([*own, *weights])
    engine._device.call(live.__enter__)  # a dispatch mode is its thread's own
    engine.read(cache, ids, probe=tokens(MAX_QUESTION_TOKENS) if probe else None)
    list(engine.decode(cache, [SamplingParams(max_tokens=8, ignore_eos=True)], [ids]))
    engine._device.call(lambda: live.__exit__(None, None, None))
    return live.peak


@pytest.mark.parametrize("chunk", [64, 256])
@pytest.mark.parametrize("slots", [128, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_is_near_the_bytes_that_live(slots: int, chunk: int, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype, vocab=1000, intermediate_size=512, **SIZES)
    engine = Engine(model, CacheConfig(slots=slots), chunk, compile=False)
    planned = live_nbytes(shape_of(engine.model, engine.layers), engine.config, chunk, fused=True)
    measured = peak(engine, 4 * (slots + chunk), probe=True)
    assert 0.95 * measured <= planned <= 1.5 * measured


@pytest.mark.parametrize("config", [CacheConfig.paper(256), CacheConfig.h2o(256), CacheConfig.streaming(256)])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma2-softcap", "gpt_oss-sinks"])
def test_the_formula_covers_every_policy_and_kind_of_attention(config: CacheConfig, family: str) -> None:
    engine = Engine(tiny_model(family), config, 128, compile=False)
    planned = live_nbytes(shape_of(engine.model, engine.layers), config, 128, fused=True)
    assert planned >= 0.9 * peak(engine, 1000, probe=False)


def test_it_grows_with_chunk_and_budget_and_not_with_anything_else() -> None:
    engine = Engine(tiny_model(), compile=False)
    shape = shape_of(engine.model, engine.layers)

    def live(slots: int, chunk: int) -> int:
        return live_nbytes(shape, CacheConfig(slots=slots), chunk, fused=True)

    assert live(100, 64) < live(100, 256) < live(400, 256) < live(400, 512)
