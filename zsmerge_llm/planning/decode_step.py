"""How decode steps run, or will: through a captured graph, through compiled layers, or eagerly, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from zsmerge_llm.attention.backend import AttentionBackend, DecodeStep
from zsmerge_llm.cpu.backend import CPUBackend
from zsmerge_llm.cpu.decoder_layers import decoder_layers
from zsmerge_llm.cpu.native import find_compiler
from zsmerge_llm.errors import UnsupportedModelError
from zsmerge_llm.gpu.graphs import capture_refusal
from zsmerge_llm.models.device import is_host, packed_bits

Compile = bool | Literal["auto"]


@dataclass(frozen=True)
class StepChoice:
    """A kind of decode step, and why it is that one."""

    step: DecodeStep
    reason: str


def running_step(backend: AttentionBackend, compile: Compile) -> StepChoice:
    """Return how decode steps of a loaded model run now."""
    step = backend.decode_step
    if backend.disabled_reason is not None:
        return StepChoice(step, backend.disabled_reason)
    if step != "eager":
        return StepChoice(step, "ready")
    if compile is False:
        return StepChoice(step, "compile=False")
    left = backend.steps_until_start
    reason = "nothing faster on this device" if left is None else f"{backend.fastest_step} after {left} more tokens"
    return StepChoice(step, reason)


def planned_step(
    model: PreTrainedModel, device: torch.device, device_map: Any, quantization: str | None, compile: Compile
) -> StepChoice:
    """Return how decode steps of a model that is not loaded will run, as far as its layers tell."""
    if not is_host(device):
        reason = _not_captured(model, device_map)
        return StepChoice("captured", "as graphs") if reason is None else StepChoice("eager", reason)
    if compile is False:
        return StepChoice("eager", "compile=False")
    if (reason := _obstacle(model, device, device_map, quantization)) is not None:
        return StepChoice("eager", reason)
    step = CPUBackend.fastest_step
    when = "while loading" if compile is True else "once compiled for this machine, eager until then"
    return StepChoice(step, f"compile={compile!r}: {when}")


def _not_captured(model: PreTrainedModel, device_map: Any) -> str | None:
    """Return why steps cannot be captured as graphs; None where nothing is known to be in the way."""
    if device_map is not None:
        return "its layers may be on several devices"
    return capture_refusal(model)


def _obstacle(model: PreTrainedModel, device: torch.device, device_map: Any, quantization: str | None) -> str | None:
    """Return why layers cannot be compiled; None where nothing is known to be in the way."""
    if device_map is not None:
        return "layers that accelerate moves between devices are not compiled"
    if quantization is not None and packed_bits(quantization, device, None) is None:
        return "weights of bitsandbytes are not compiled"
    if find_compiler() is None:
        return "there is no C++ compiler: install g++ or clang"
    try:
        decoder_layers(model, model.config.get_text_config().num_hidden_layers)
    except UnsupportedModelError as error:
        return str(error)
    return None
