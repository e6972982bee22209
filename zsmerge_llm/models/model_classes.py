"""Which class of transformers makes the models of a config that generate text."""

from __future__ import annotations

from typing import Any


def generating_class(config: Any) -> Any:
    """Return the auto class for a config: of language models, or of models that read other things beside text.

    None where transformers has no model of this config that generates text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )

    kinds: list[tuple[Any, Any]] = [
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
        (AutoModelForMultimodalLM, MODEL_FOR_MULTIMODAL_LM_MAPPING),
    ]
    return next((kind for kind, configs in kinds if type(config) in configs), None)
