"""Fixtures of the loading tests: a folder of cached models per test, no network, and a tiny model's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.tiny_folders import unreachable
from tests.support.gguf_writer import random_model, write_gguf
from zsmerge_llm.models import description, gguf, hub, loader
from zsmerge_llm.paths import cache_folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep models in a folder per test, compiled code where it always is; no network: the Hub is unreachable."""
    for module in (description, hub, loader):
        monkeypatch.setattr(module, "cache_folder", lambda chosen=None: cache_folder(chosen or tmp_path / "cache"))
    monkeypatch.setattr(hub, "_hub_copy", lambda hub_id: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer as a model folder."""
    where = tmp_path_factory.mktemp("models")
    file = write_gguf(where / "tiny.gguf", random_model("llama", tie_word_embeddings=True), "llama")
    return gguf.convert_once(file, where / "tiny", lambda step: None)
