"""LangChain's standard integration suite for ChatOpenAI, against the server with SmolLM2-135M-Instruct."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.server.conftest import serving
from zsmerge_llm import LLM
from zsmerge_llm.server.settings import ServerSettings

# langchain-openai keeps its async client for all event loops
pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]


class TestChatOpenAI(ChatModelIntegrationTests):
    """What a model of 135 million parameters fails at by itself is expected to fail."""

    address: ClassVar[str]

    @pytest.fixture(scope="class", autouse=True)
    def _server(self) -> Iterator[None]:
        settings = ServerSettings(max_tokens=256, aliases=("other",))
        with LLM("smollm2", session_memory="512MiB") as llm, serving(llm, settings) as address:
            type(self).address = address
            yield

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        settings = {"repetition_penalty": 1.05}  # without it so small a model runs in circles in JSON mode
        return {
            "model": "smollm2",
            "base_url": f"{self.address}/v1",
            "api_key": "none",
            "stream_usage": True,
            "extra_body": settings,
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return False

    @property
    def model_override_value(self) -> str:
        return "other"

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": []}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        chat = ChatOpenAI(**self.chat_model_params, max_tokens=8)
        asked = HumanMessage("Name a colour, please.")
        return chat.invoke([asked, chat.invoke([asked]), HumanMessage("Another one?")])

    @pytest.mark.xfail(reason="SmolLM2 answers without the tool")
    def test_agent_loop(self, model: BaseChatModel) -> None:
        super().test_agent_loop(model)

    @pytest.mark.xfail(run=False, reason="SmolLM2 writes no Japanese")
    def test_unicode_tool_call_integration(self, model: BaseChatModel, **options: Any) -> None:
        super().test_unicode_tool_call_integration(model, **options)
