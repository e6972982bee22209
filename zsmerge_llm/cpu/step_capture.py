"""What a package of decode steps is made of, seen in passes over the model: each layer's inputs, and their sources.

Nothing here needs a compiler. What is captured goes to the process that makes the package (`package_builder`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zsmerge_llm.attention.call import AttentionCall, AttentionHandler, dense_attention
from zsmerge_llm.attention.interface import forward
from zsmerge_llm.cpu.decoder_layers import flatten_call, is_tensor_tuple
from zsmerge_llm.cpu.patches import ForwardPatches
from zsmerge_llm.errors import UnsupportedModelError

FormName = Literal["single", "draft", "batch"]
"""A decode step of one conversation, of one with a draft, or of several conversations."""
HIDDEN = -1
"""As the source of an input: the output of the layer before."""
CONSTANTS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class StepForm:
    """Steps of one shape. batch: whether `rows` is an example, and the package takes 2 to `native.MAX_ROWS`."""

    name: FormName
    rows: int
    tokens: int

    @property
    def batch(self) -> bool:
        """Whether the package takes several numbers of rows."""
        return self.rows > 1


def step_forms(num_draft_tokens: int) -> tuple[StepForm, ...]:
    """Return the steps that a package has."""
    return (StepForm("single", 1, 1), StepForm("draft", 1, 1 + num_draft_tokens), StepForm("batch", 5, 1))


class OpaqueAttention(AttentionHandler):
    """Attention while a layer is exported: one operator, whatever is behind it."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Call the operator that attends to a layer's slots: [B, Hq, T, D]."""
        attend: Any = torch.ops.zsmerge.attend_slots
        softcap = call.softcap or 0.0
        output: Tensor = attend(call.query, call.key, call.value, call.scaling, softcap, call.sinks)
        return output


class _OwnTokens(AttentionHandler):
    """Attention of a pass's tokens to themselves."""

    def attend(self, call: AttentionCall) -> Tensor:
        return dense_attention(call, call.key, call.value, None)


@dataclass(frozen=True)
class LayerCall:
    """A layer's call in a pass: arguments with `OpaqueAttention` for the pass, and where its tensors come from."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[int]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, in order."""
        return flatten_call((*self.args, *self.kwargs.values()))[0]


@dataclass
class CapturedStep:
    """A pass over all layers.

    inputs: the tensors that come from outside of them, in order of their first use. num_results: None where a layer
    returns a tensor, else the length of the tuple that it returns, whose other items are None.
    """

    form: StepForm
    calls: list[LayerCall] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    num_results: int | None = None


@torch.inference_mode()
def capture_step(model: PreTrainedModel, layers: Sequence[nn.Module], form: StepForm) -> CapturedStep:
    """Run the model over one step without a cache, and record what its layers are given.

    Raises:
        UnsupportedModelError: arguments or results that a package cannot have.
    """
    captured = CapturedStep(form)
    ids = torch.zeros(form.rows, form.tokens, dtype=torch.long, device=model.device)
    positions = torch.arange(form.tokens, device=model.device).repeat(form.rows, 1)
    with ForwardPatches() as patches:
        recorder = _Recorder(captured)
        for layer in layers:
            patches.replace(layer, recorder.around(layer))
        forward(model, _OwnTokens(), input_ids=ids, position_ids=positions, logits_to_keep=1)
    if len(captured.calls) != len(layers):
        raise UnsupportedModelError(f"{type(model).__name__} does not call each of its layers once in a pass.")
    return captured


class _Recorder:
    """Records the calls of layers into a `CapturedStep`."""

    def __init__(self, captured: CapturedStep) -> None:
        self._captured = captured
        self._previous: Tensor | None = None

    def around(self, layer: nn.Module) -> Callable[..., Any]:
        """Return a forward that records its call and runs the layer's own."""
        own = layer.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self._record(type(layer).__name__, args, kwargs)
            result = own(*args, **kwargs)
            self._previous = self._output(result)
            return result

        return run

    def _record(self, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors, rest = flatten_call((*args, *kwargs.values()))
        strange = [type(value).__name__ for value in rest if not isinstance(value, CONSTANTS)]
        if strange:
            raise UnsupportedModelError(f"{kind} is given a {strange[0]} in each pass.")
        sources = [self._source(tensor) for tensor in tensors]
        if not args or args[0] is not tensors[0] or (self._captured.calls and sources[0] != HIDDEN):
            raise UnsupportedModelError(f"{kind} is not given the output of the layer before it first.")
        own = {name: _detached(each) for name, each in kwargs.items()}
        self._captured.calls.append(LayerCall(tuple(_detached(each) for each in args), own, sources))

    def _source(self, tensor: Tensor) -> int:
        if tensor is self._previous:
            return HIDDEN
        inputs = self._captured.inputs
        known = next((place for place, each in enumerate(inputs) if each is tensor), None)
        if known is None:
            inputs.append(tensor)
            return len(inputs) - 1
        return known

    def _output(self, result: Any) -> Tensor:
        """Return the hidden state that a layer returns, and note how it returns it."""
        many = result if isinstance(result, tuple) else (result,)
        if not many or not isinstance(many[0], Tensor) or any(each is not None for each in many[1:]):
            raise UnsupportedModelError("A layer returns more than its hidden state.")
        self._captured.num_results = len(many) if isinstance(result, tuple) else None
        return many[0]


def _detached(value: Any) -> Any:
    """Return a value that another process can have: plain tensors, and opaque attention for the pass."""
    if isinstance(value, Tensor):
        return torch.zeros_like(value)
    if is_tensor_tuple(value):
        return tuple(torch.zeros_like(each) for each in value)
    return OpaqueAttention() if isinstance(value, AttentionHandler) else value
