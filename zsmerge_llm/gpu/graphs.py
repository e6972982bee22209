"""Capture work on fixed memory as CUDA graphs, which repeat it without Python or launches in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from zsmerge_llm.attention import adapters
from zsmerge_llm.attention.call import AttentionCall, AttentionHandler, RecurrentCall
from zsmerge_llm.attention.recurrent import CURRENT_PASS, MixerCache, mixers_of
from zsmerge_llm.kvcache.recurrent_state import RecurrentState

WARM_UP_RUNS = 2
"""Runs before a capture: libraries choose their kernels and allocate workspaces then, which a capture must not do."""
SEVERAL_DEVICES = "its layers are on several devices"
"""Why steps are not captured."""


class GraphCapture:
    """Captures work as CUDA graphs, all in one memory pool: they run one after another."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], None], warm_up: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats `run`, a graph. `warm_up` does the same work without a trace.

        Raises whatever a capture raises: host reads, copies between devices, no memory.
        """
        if not torch.cuda.is_available():
            raise RuntimeError("graphs need a CUDA device")
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP_RUNS):
                warm_up()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may copy conversations to the host meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            run()
        self._pool = graph.pool()
        return graph.replay


class _NoAttention(AttentionHandler):
    """Attention that computes nothing, for a pass that only shows what else a model does, with states of one row."""

    def __init__(self, model: PreTrainedModel) -> None:
        specs = {mixer.index: mixer.spec for mixer in mixers_of(model) if mixer.spec is not None}
        meta = torch.device("meta")
        self._states = {index: RecurrentState(replace(spec, device=meta), 1) for index, spec in specs.items()}

    def mix(self, call: RecurrentCall) -> Tensor:
        return call.run(call.hidden, MixerCache(self._states[call.index]))

    def attend(self, call: AttentionCall) -> Tensor:
        return call.query.new_empty(*call.query.shape[:3], call.value.shape[3])


@torch.inference_mode()
def capture_refusal(model: PreTrainedModel) -> str | None:
    """Return why a model's forward pass cannot be captured as a graph; None where nothing speaks against it.

    It is run on the meta device, where everything that waits for the device fails: reading a value on the host, shapes
    that depend on values. A failed capture could leave the device's random generators unusable. Quantized weights are
    not checked so: they do not exist there.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if len({tensor.device for tensor in tensors.values()}) > 1:
        return SEVERAL_DEVICES
    if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in tensors.values()):
        return None
    # In bfloat16, which a GPU computes in: some operators of mixtures of experts take nothing else.
    on_meta = {name: tensor.to("meta", _computed_dtype(tensor, model.dtype)) for name, tensor in tensors.items()}
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    inputs = {"input_ids": token, "position_ids": token, "use_cache": False, "logits_to_keep": 1}
    handler = _NoAttention(model)
    running = CURRENT_PASS.set(handler)
    try:
        functional_call(model, on_meta, kwargs={**inputs, adapters.keyword(model): handler}, tie_weights=False)
    except Exception as error:  # whatever a model does there, it runs without a graph
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return f"its forward pass reads values on the host ({type(error).__name__}: {first})"
    finally:
        CURRENT_PASS.reset(running)
    return None


def _computed_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return bfloat16 for a weight in the model's dtype; other tensors keep theirs."""
    return torch.bfloat16 if isinstance(tensor, nn.Parameter) and tensor.dtype == dtype else tensor.dtype
