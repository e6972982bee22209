"""A download that breaks goes on where it stopped, and what is complete is not fetched again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.local_hub import REVISION, LocalHub, local_hub
from tests.support.tiny_models import tiny_model

CHUNK = 10 * 2**20
"""Bytes that huggingface_hub writes at a time, and what of a file it resumes by."""
FETCH = """
import sys
from pathlib import Path
from zsmerge_llm.errors import LoadError
from zsmerge_llm.models import hub

for attempt in range(int(sys.argv[2])):
    try:
        print(hub.hub_folder("owner/tiny", lambda step: None, Path(sys.argv[1])).name)
    except LoadError as error:
        print(error)
"""


def fetch(hub: LocalHub, where: Path, attempts: int = 1) -> list[str]:
    """Download in a process of its own: huggingface_hub reads its settings when it is imported."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(where / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", FETCH, str(where / "cache"), str(attempts)]
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model in several shards."""
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def test_a_download_goes_on_where_the_connection_broke(folder: Path, tmp_path: Path) -> None:
    with local_hub(folder) as hub:
        large = "large.safetensors"
        hub.files[large] = bytes(range(256)) * (3 * CHUNK // 256)
        hub.breaks[large] = 1
        assert fetch(hub, tmp_path) == [REVISION]
        assert [start for name, start in hub.requests if name == large] == [0, CHUNK]
        (copy,) = (tmp_path / "hf").rglob(large)
        assert copy.read_bytes() == hub.files[large]


def test_files_that_are_complete_are_not_fetched_again(folder: Path, tmp_path: Path) -> None:
    with local_hub(folder) as hub:
        last = [name for name in hub.files if name.endswith(".safetensors")][-1]
        hub.missing.add(last)
        failure = " ".join(fetch(hub, tmp_path))
        assert "download of owner/tiny was interrupted" in failure
        assert "files that are complete are not fetched again" in failure
        fetched = {name for name, _ in hub.requests} - {last}
        hub.missing.clear()
        hub.requests.clear()
        assert fetch(hub, tmp_path) == [REVISION]
        assert last in {name for name, _ in hub.requests}
        assert not fetched & {name for name, _ in hub.requests}
