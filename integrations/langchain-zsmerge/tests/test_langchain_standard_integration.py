"""LangChain's own standard integration suite on two models, Qwen2.5-Coder-0.5B-Instruct and SmolLM2-135M-Instruct.

Each is the other's `model_override_value`. `ZSMERGE_TEST_QWEN` puts a larger file in the first one's place.
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


class Suite(ChatModelIntegrationTests):
    name: ClassVar[str]
    other: ClassVar[str]

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
        return self.other

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
    TestQwenCoder.name = TestSmolLM2.other = qwen
    return [ChatZSMerge(model=name, session_memory=SESSION_MEMORY) for name in (qwen, "smollm2")]


@pytest.mark.slow
class TestQwenCoder(Suite):
    other = "smollm2"


@pytest.mark.slow
class TestSmolLM2(Suite):
    """What a model of 135 million parameters fails at by itself is expected to fail: the calls are well formed."""

    name = "smollm2"

    @pytest.mark.xfail(reason="SmolLM2 answers without the tool")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(run=False, reason="SmolLM2 writes no Japanese")
    def test_unicode_tool_call_integration(self, model: BaseChatModel, **options: Any) -> None:
        super().test_unicode_tool_call_integration(model, **options)
