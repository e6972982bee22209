"""LangChain's own standard integration suite, on SmolLM2-135M-Instruct."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_zsmerge import ChatZSMerge


@pytest.mark.slow
class TestChatZSMergeStandardIntegration(ChatModelIntegrationTests):
    """Tools and structured output are switched off: `tool_choice` and schemas need grammar-constrained decoding."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatZSMerge

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2"}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False  # one object runs one model; another in a call is refused by name
