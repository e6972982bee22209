"""Which class of transformers makes the models of a config that generate text."""

from __future__ import annotations

from typing import Any


def generating_class(config: Any) -> Any:
    """Return the auto class for a config: of language models, or of models that read other things beside text.

    None where transformers has no model of this config that generates text.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    kinds: list[Any] = [AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
    return next((kind for kind in kinds if type(config) in kind._model_mapping), None)
