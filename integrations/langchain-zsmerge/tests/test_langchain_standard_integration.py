"""LangChain's own standard integration suite on Qwen2.5-Coder-0.5B-Instruct, with SmolLM2 as the model's override.

`ZSMERGE_TEST_QWEN` puts a larger file in its place. On SmolLM2 the suite runs against the server (`tests/server`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_zsmerge import ChatZSMerge

SESSION_MEMORY = "512MiB"
"""Some hundred conversations of two models: two workers have to fit into 16 GB."""


@pytest.mark.slow
class TestQwenCoder(ChatModelIntegrationTests):
    name: ClassVar[str]

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatZSMerge

    @property
    def chat_model_params(self) -> dict[str, Any]:
        # without any penalty so small a model runs in circles where JSON mode leaves it free to
        return {"model": self.name, "timeout": 900, "repetition_penalty": 1.05, "session_memory": SESSION_MEMORY}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return "smollm2"

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        chat = ChatZSMerge(**self.chat_model_params, max_tokens=8)
        history: list[BaseMessage] = [HumanMessage("Name a colour, please.")]
        history += [chat.invoke(history), HumanMessage("Another one?")]
        if not stream:
            return chat.invoke(history)
        whole: AIMessageChunk | None = None
        for chunk in chat.stream(history):
            whole = chunk if whole is None else whole + chunk
        assert whole is not None
        return whole


@pytest.fixture(scope="module", autouse=True)
def _loaded(gguf: Mapping[str, Path]) -> list[ChatZSMerge]:
    """Models stay loaded from test to test as long as something uses them."""
    qwen = os.environ.get("ZSMERGE_TEST_QWEN") or str(gguf["qwen2.5-coder-0.5b-instruct"])
    TestQwenCoder.name = qwen
    return [ChatZSMerge(model=name, session_memory=SESSION_MEMORY) for name in (qwen, "smollm2")]
