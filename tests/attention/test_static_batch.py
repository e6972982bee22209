"""A decode step, compressing and reading a chunk are tensor functions: nothing waits for the device, nothing is copied.

They run on the meta device, where reading a value on the host fails and so do shapes that depend on values.
"""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tests.support.presets import EVERY_LAYER_ITS_BUDGET, SMALL_PRESETS
from tests.support.tiny_models import FAMILIES, HYBRIDS, tiny_model
from zsmerge_llm.attention.backend import TorchBackend
from zsmerge_llm.attention.interface import ModelLayers, prepare_model
from zsmerge_llm.attention.static_batch import StaticBatch
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.engine.model_runner import ModelRunner
from zsmerge_llm.engine.position_remapping import PositionRemapper
from zsmerge_llm.engine.static_reader import ChunkShape, StaticReader
from zsmerge_llm.gpu.attention import GPUOps

META = torch.device("meta")


class GPUAttention(TorchBackend):
    """What a GPU computes attention with, without its graphs."""

    static_sizes = (1, 4)

    def __init__(self) -> None:
        super().__init__()
        self.torch_ops = GPUOps()


class HostTraffic(TorchDispatchMode):
    """Counts operations that copy between devices, and tensors that are made on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.host_tensors: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if len({each.device.type for each in [*made, *given]}) > 1:
            self.copies.append(str(func))
        self.host_tensors += [str(func) for each in made if each.device.type == "cpu"]
        return result

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if kind is None:
            assert not self.copies
            assert not self.host_tensors


def model_on_meta(family: str) -> tuple[PreTrainedModel, ModelLayers]:
    """A tiny model without values, and what its layers need there. In bfloat16, which a GPU computes in."""
    model = tiny_model(family).to(torch.bfloat16)
    layers = prepare_model(model)
    attention = tuple(replace(spec, device=META) for spec in layers.attention)
    recurrent = tuple(replace(spec, device=META) for spec in layers.recurrent)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(weight.to(META), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(META)
    return model, ModelLayers(attention, recurrent)


def test_host_traffic_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="item"):
        torch.zeros(1, device=META).item()
    with pytest.raises(AssertionError), HostTraffic():
        torch.tensor([1.0])
    with pytest.raises(AssertionError), HostTraffic():
        torch.zeros(1).to(META)


@pytest.mark.parametrize("preset", SMALL_PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_step_and_compressing_do_not_touch_the_host(family: str, preset: str) -> None:
    (model, (specs, _)), config = model_on_meta(family), SMALL_PRESETS[preset]
    batch = StaticBatch(config, specs, 97, model.dtype, rows=4, num_tokens=3, capacity=64)
    row, backend = torch.zeros(1, dtype=torch.long, device=META), GPUAttention()
    with HostTraffic():
        batch.step(model, backend, rows=4, num_tokens=1)
        batch.step(model, backend, rows=1, num_tokens=3)
        batch.commit(rows=2, num_tokens=1)
        for group in batch.groups if config.slots is not None else ():
            batch.compress(group, row)


@pytest.mark.parametrize("family", HYBRIDS)
@torch.inference_mode()
def test_a_step_of_a_hybrid_does_not_touch_the_host(family: str) -> None:
    (model, (specs, recurrent)), config = model_on_meta(family), SMALL_PRESETS["default"]
    batch = StaticBatch(config, specs, 97, model.dtype, rows=4, num_tokens=3, recurrent=recurrent)
    row, backend = torch.zeros(1, dtype=torch.long, device=META), GPUAttention()
    with HostTraffic():
        batch.step(model, backend, rows=4, num_tokens=1)
        batch.step(model, backend, rows=1, num_tokens=3)
        batch.commit(rows=1, num_tokens=3)
        batch.commit(rows=2, num_tokens=1)
        for group in batch.groups:
            batch.compress(group, row)


@pytest.mark.parametrize("voting", [False, True])
@pytest.mark.parametrize("preset", [name for name in SMALL_PRESETS if name != "full"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_reading_a_full_chunk_does_not_touch_the_host(family: str, preset: str, voting: bool) -> None:
    (model, (specs, _)), config = model_on_meta(family), SMALL_PRESETS[preset]
    if voting and preset not in ("default", "residual"):
        return  # these policies take no votes
    runner = ModelRunner(model, GPUAttention(), PositionRemapper(model, specs, None))
    reader, shape = StaticReader(runner, tuple(specs)), ChunkShape(64, 32 if voting else 0, 2**15, voting, voting)
    reader._replay(config, shape)
    with HostTraffic():
        reader._read(shape)


def test_layers_of_one_budget_are_stacked_and_others_apart() -> None:
    model = tiny_model("llama")
    specs = prepare_model(model).attention

    def groups(config: CacheConfig) -> list[list[int]]:
        batch = StaticBatch(config, specs, 97, model.dtype, rows=2, num_tokens=1)
        return [group.indices for group in batch.groups]

    assert groups(SMALL_PRESETS["default"]) == [[0, 1]]
    assert groups(EVERY_LAYER_ITS_BUDGET) == [[0], [1]]
