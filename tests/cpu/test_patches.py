"""`ForwardPatches` and `CPUBackend.close` give every module its own forward back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny_models import tiny_model, tokens
from zsmerge_llm import CacheConfig
from zsmerge_llm.cpu.patches import ForwardPatches
from zsmerge_llm.cpu.quantized_linear import quantize_model
from zsmerge_llm.engine.engine import Engine

CONFIG = CacheConfig(slots=24, sink=2, recent=6, stage=8, observation_window=4)
INPUTS = torch.arange(3.0)


class Doubling(nn.Module):
    """Map x to 2 x."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def constant(value: float) -> Callable[[Tensor], Tensor]:
    """Return a forward whose output is `value` everywhere."""
    return lambda x: torch.full_like(x, value)


def outputs(module: nn.Module) -> list[float]:
    """Return the outputs for `INPUTS`."""
    return list(module(INPUTS).tolist())


def patched_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that have a forward other than their class's."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_restored_modules_have_no_forward_of_their_own() -> None:
    modules, patches = [Doubling(), Doubling()], ForwardPatches()
    attributes = [dict(vars(module)) for module in modules]
    for module in modules:
        patches.replace(module, constant(7))
        assert outputs(module) == [7, 7, 7]
    assert len(patches) == 2

    patches.restore()

    assert len(patches) == 0
    assert [dict(vars(module)) for module in modules] == attributes
    assert all(outputs(module) == [0, 2, 4] for module in modules)


def test_a_forward_that_an_instance_had_before_is_put_back() -> None:
    module, patches, before = Doubling(), ForwardPatches(), constant(5)
    module.forward = before
    patches.replace(module, constant(7))

    patches.restore()

    assert vars(module)["forward"] is before
    assert outputs(module) == [5, 5, 5]


def test_patches_over_one_another_are_restored_in_the_opposite_order() -> None:
    module, first, second = Doubling(), ForwardPatches(), ForwardPatches()
    first.replace(module, constant(5))
    first.replace(module, constant(6))
    second.replace(module, constant(7))
    assert outputs(module) == [7, 7, 7]

    second.restore()
    assert outputs(module) == [6, 6, 6]
    first.restore()
    assert "forward" not in vars(module)
    assert outputs(module) == [0, 2, 4]


def test_restoring_twice_and_without_patches_changes_nothing() -> None:
    module, patches = Doubling(), ForwardPatches()
    patches.restore()
    patches.replace(module, constant(7))
    patches.restore()
    module.forward = constant(5)
    patches.restore()
    assert outputs(module) == [5, 5, 5]


def test_a_context_restores_its_modules_also_after_an_error() -> None:
    module = Doubling()
    with ForwardPatches() as patches:
        patches.replace(module, constant(7))
        assert outputs(module) == [7, 7, 7]
    assert "forward" not in vars(module)

    def fail() -> None:
        with ForwardPatches() as patches:
            patches.replace(module, constant(7))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "forward" not in vars(module)


def test_a_suspended_patch_is_put_back_also_after_an_error() -> None:
    module, patches, stand_in = Doubling(), ForwardPatches(), constant(7)
    patches.replace(module, stand_in)
    with patches.suspended(module):
        assert outputs(module) == [0, 2, 4]
    assert vars(module)["forward"] is stand_in

    with pytest.raises(ZeroDivisionError), patches.suspended(module):
        raise ZeroDivisionError
    assert vars(module)["forward"] is stand_in
    patches.restore()
    assert outputs(module) == [0, 2, 4]


def logits(engine: Engine) -> Tensor:
    """Return float32 [21, vocab]: the logits of a prefill beyond the budget and of 20 decode steps."""
    cache = engine.new_cache()
    prefill = engine.read(cache, tokens(40))
    return torch.stack([prefill, *(engine.read(cache, [token]) for token in tokens(20, seed=1))])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_closed_backend_leaves_the_model_as_if_it_had_never_started(bits: int | None) -> None:
    models = [tiny_model(hidden_size=128, intermediate_size=192) for _ in range(2)]
    if bits is not None:
        for model in models:
            quantize_model(model, bits, torch.float32)
    engine = Engine(models[0], CONFIG, compile=False)
    engine.backend.start()
    logits(engine)
    assert engine.backend.compiled.enabled, engine.backend.disabled_reason
    assert patched_modules(engine.model)

    engine.backend.close()

    assert not patched_modules(engine.model)
    reopened, untouched = (Engine(model, CONFIG, compile=False) for model in models)
    assert torch.equal(logits(reopened), logits(untouched))


def test_an_engine_whose_backend_was_closed_reads_as_one_that_never_started() -> None:
    closed, untouched = (Engine(tiny_model(), CONFIG, compile=False) for _ in range(2))
    closed.backend.start()
    logits(closed)
    closed.backend.close()

    torch.testing.assert_close(logits(closed), logits(untouched), atol=1e-5, rtol=1e-5)
