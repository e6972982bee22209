"""The ids with which a model's layer budgets are measured, in its own chat template."""

from __future__ import annotations

from importlib.resources import files

from zsmerge_llm.engine.layer_budgets import Calibration
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.query_probe import GENERIC_QUESTION, chat_probe


def calibration(template: ChatTemplate) -> Calibration:
    """Return the demo's text, a request to repeat it, and the probe of a document read ahead."""
    text = files("zsmerge_llm").joinpath("data").joinpath("marigold.txt").read_text(encoding="utf-8")
    request = template.encode("\n\nRepeat the text above.") + chat_probe(template, "")
    return Calibration(template.encode(text), request, chat_probe(template, GENERIC_QUESTION))
