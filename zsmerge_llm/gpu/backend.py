"""The backend for devices other than the CPU: PyTorch's attention, and decode steps through compiled layers."""

from __future__ import annotations

from transformers import PreTrainedModel

from zsmerge_llm.attention.backend import DecodeStep, TorchBackend
from zsmerge_llm.cpu.compiled_layers import CompiledLayers


class GPUBackend(TorchBackend):
    """Compiled layers for decode steps of one conversation.

    Args:
        num_layers: decoder layers of the model.
        automatic: whether layers are compiled once that pays, without `start`.
        num_draft_tokens: tokens of a speculative pass behind the first.
    """

    fastest_step: DecodeStep = "compiled"

    def __init__(self, model: PreTrainedModel, num_layers: int, automatic: bool, num_draft_tokens: int) -> None:
        super().__init__()
        self.compiled = CompiledLayers(model, num_layers, ((1, 1), (1, 1 + num_draft_tokens)), automatic)

    @property
    def disabled_reason(self) -> str | None:
        """Why layers are not compiled; None where nothing is wrong."""
        return self.compiled.disabled_reason

    @property
    def decode_step(self) -> DecodeStep:
        """How decode steps run now: through compiled layers once they are enabled."""
        return "compiled" if self.compiled.enabled and self.disabled_reason is None else "eager"

    @property
    def steps_until_start(self) -> int | None:
        """Decode steps after which layers are compiled of their own accord; None: never, or they have been."""
        return self.compiled.steps_left

    def on_pass(self, num_tokens: int) -> None:
        """Count a decode step, and compile once that pays."""
        if self.compiled.is_due(num_tokens):
            self.start()

    def start(self) -> None:
        """Compile layers from now on."""
        self.compiled.start()
