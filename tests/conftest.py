"""Shared fixtures. Real models come through the product's own loader and are converted once per machine."""

from __future__ import annotations

import pytest

from zsmerge_llm import LLM


@pytest.fixture(scope="session")
def smollm2() -> LLM:
    """SmolLM2-135M-Instruct in float32, with the default cache."""
    return LLM("smollm2", dtype="float32")
