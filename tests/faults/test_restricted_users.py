"""A user without rights, and a read-only file system: turns go on, and the rest is an error of ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat import Chat, make_llm
from tests.support.gguf_writer import random_model, write_gguf

ROOT = Path(__file__).parents[2]
NOBODY = 65534
PROGRAM = [sys.executable, "-W", "ignore", "-m", "tests.faults.restricted_process"]
REMOUNT = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="users and mounts are those of Linux"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can reach, with a conversation and a model in it."""
    path = Path(tempfile.mkdtemp(prefix="zsmerge-test-"))
    path.chmod(0o755)
    chat = Chat(make_llm(sessions_dir=path / "kept", retrieval_tokens=0), "it")
    for turn in range(2):
        chat.ask(f"Hello {turn}")
    (path / "messages").write_text(json.dumps(chat.messages))
    write_gguf(path / "model.gguf", random_model("llama"), "llama")
    (path / "closed").mkdir(mode=0o700)
    yield path
    shutil.rmtree(path)


def run(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the program in front of which the command stands; skip where the system does not allow that."""
    environment = {**os.environ, "HOME": "/nonexistent", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "ZSMERGE_CACHE_DIR": str(folder / "kept" / "cache"), "HF_HOME": "/nowhere"}
    tried = subprocess.run([*command, sys.executable, "-c", "import zsmerge_llm"], env=environment, capture_output=True)
    if tried.returncode:
        pytest.skip(f"not possible here: {tried.stderr.decode(errors='replace').strip().splitlines()[-1:]}")
    done = subprocess.run(
        [*command, *PROGRAM, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_turns_go_on_and_the_rest_is_refused(found: dict[str, Any]) -> None:
    assert found["go on"] == ["continued"] * 3
    assert found["more than fits into memory"] == [True] * 8
    assert found["still there"] is True
    assert found["load"] == "done"
    refused = {"remove": "SessionStorageError", "save": "SessionStorageError", "page": "InputError"}
    refused |= {"new folder": "ConfigError", "model to convert": "ZSMergeError"}
    assert {name: error for name, error in refused.items() if error not in found[name]} == {}, found


def test_a_user_who_may_write_nowhere(folder: Path) -> None:
    for path in (folder / "kept", *(folder / "kept").iterdir()):
        path.chmod(0o555 if path.is_dir() else 0o444)
    to_nobody = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("no setpriv, and root may write everywhere")
    found = run(to_nobody if os.getuid() == 0 else [], folder)
    (folder / "kept").chmod(0o755)

    assert_turns_go_on_and_the_rest_is_refused(found)
    if os.getuid() == 0:
        assert "ConfigError" in found["closed folder"]


def test_a_read_only_file_system(folder: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("no unshare")
    found = run(["unshare", "-rm", "sh", "-c", REMOUNT, str(folder)], folder)

    assert_turns_go_on_and_the_rest_is_refused(found)


def test_files_of_conversations_that_the_user_may_not_read(folder: Path) -> None:
    for path in (folder / "kept").iterdir():
        path.chmod(0o600)
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can make files of another user")
    (folder / "kept").chmod(0o755)
    found = run(["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"], folder)

    assert found["go on"] == ["new", "continued", "continued"]
    assert "SessionError" in found["load"]
