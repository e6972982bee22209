"""LoRA adapters on a model object (peft): which ones an engine can carry, and what tells one from another.

peft is never imported here: where nobody has imported it, no model has an adapter.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import InputError, UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

_STATE = ("disable_adapters", "active_adapters", "merged_adapters", "scaling")
"""What peft's layers keep outside of their weights that changes what they compute."""


def without_wrapper(model: Any) -> Any:
    """Return the transformers model inside a `PeftModel`, adapters included; anything else as it is.

    Raises:
        UnsupportedModelError: the wrapper itself takes part in the computation (prompt tuning, X-LoRA, aLoRA).
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    tuner = model.base_model
    for name in model.active_adapters:
        config = model.peft_config[name]
        injected = isinstance(tuner, sys.modules["peft.tuners.tuners_utils"].BaseTuner)
        if not injected or _computes(tuner) or getattr(config, "alora_invocation_tokens", None):
            kind = getattr(config.peft_type, "value", config.peft_type)
            kind = "ALORA" if getattr(config, "alora_invocation_tokens", None) else kind
            raise UnsupportedModelError(
                f"The adapter {name!r} ({kind}) does more than change weights of the model: use a LoRA adapter, or "
                "merge it into the model (`merge_and_unload`) where peft can."
            )
    return model.get_base_model()


def _computes(tuner: Any) -> bool:
    """Return whether a tuner of peft changes what goes into the model or comes out of it."""
    base: Any = sys.modules["peft.tuners.tuners_utils"]
    return type(tuner).forward is not base.BaseTuner.forward and type(tuner).__name__ != "AdaLoraModel"


class AdapterState:
    """The adapters of one model: what of them is not in its weights.

    peft may switch, scale, disable or merge adapters at any time. Compiled layers and sessions belong to one state.
    """

    def __init__(self, model: nn.Module) -> None:
        tuners, other = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
        kinds = tuple(
            kind
            for kind in (getattr(tuners, "BaseTunerLayer", None), getattr(other, "AuxiliaryTrainingWrapper", None))
            if kind is not None
        )
        self._model = model
        self._layers = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
        self._before = self.text() if self._layers else ""

    def text(self) -> str:
        """Return the state as text: "" for a model without adapters."""
        return "\n".join(
            f"{name} {type(module).__name__} {[_plain(getattr(module, each, None)) for each in _STATE]}"
            for name, module in self._layers
        )

    def check(self) -> None:
        """Refuse to go on after a change.

        Raises:
            InputError: adapters were switched, scaled, disabled or merged since.
        """
        if self._layers and self.text() != self._before:
            raise InputError(
                "The model's adapters were switched, scaled, disabled or merged since this engine was made: switch "
                "back, or close it and make another LLM or engine for the new state."
            )


def _plain(value: Any) -> Any:
    """Return settings in an order that does not depend on when an adapter was loaded."""
    return sorted(value.items()) if isinstance(value, dict) else value
