"""LangChain's own standard unit suite."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.load import load as loading
from langchain_tests.unit_tests import ChatModelUnitTests
from langchain_zsmerge import ChatZSMerge


class TestChatZSMergeStandard(ChatModelUnitTests):
    @pytest.fixture(autouse=True)
    def _allow_loading(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """LangChain's `allowed_objects="all"`, which `test_serdes` passes, admits its own list of partners only."""
        path = tuple(ChatZSMerge.lc_id())
        module = sys.modules[loading.__module__]
        monkeypatch.setitem(module.ALL_SERIALIZABLE_MAPPINGS, path, path)
        monkeypatch.setattr(module, "_default_class_paths_cache", {})

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatZSMerge

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "smollm2"}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supports_anthropic_inputs(self) -> bool:
        return True

    @property
    def init_from_env_params(self) -> tuple[dict[str, str], dict[str, Any], dict[str, Any]]:
        return (
            {"ZSMERGE_MODEL": "env-model", "ZSMERGE_DEVICE": "cpu"},
            {},
            {"model": "env-model", "device": "cpu"},
        )
