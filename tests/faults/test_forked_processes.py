"""A fork of a process that uses a model: an error at once there, and nothing is lost here. Copies keep the settings."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat import SNAPSHOT_NBYTES, Chat, make_llm
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.errors import ConfigError, InputError

ROOT = Path(__file__).parents[2]
SHORT = SamplingParams(max_tokens=4)

FORKED = """
import asyncio, gc, os, signal, sys, tempfile
from tests.support.chat import SNAPSHOT_NBYTES, Chat, make_llm
from zsmerge_llm.aio import call
from zsmerge_llm.errors import ForkedProcessError
from zsmerge_llm.generation.loops import collect

llm = make_llm(session_memory=SNAPSHOT_NBYTES)
engine, store, idle = llm.engine, llm.store, make_llm()
Chat(llm, "it").ask("Hello")
Chat(llm, "other").ask("Hello")
store.flush()
stream = llm.stream("Hello")
next(stream)

def attempts():
    yield lambda: llm.chat("Hello")
    yield lambda: llm.chat("Hello", session="it")
    yield lambda: llm.complete("Hello")
    yield lambda: llm.session("it")
    yield lambda: store.get("it")
    yield lambda: store.flush()
    yield lambda: engine.read(engine.new_cache(), [1])
    yield lambda: list(stream)
    yield lambda: idle.chat("Hello")
    yield lambda: make_llm().chat("Hello")
    yield lambda: asyncio.run(call(lambda cancel: llm.chat("Hello")))

pid = os.fork()
if pid == 0:
    signal.alarm(30)
    failed = 0
    for number, attempt in enumerate(attempts()):
        try:
            attempt()
        except ForkedProcessError as error:
            assert "spawn" in str(error)
        else:
            failed = 100 + number
    llm.close()
    del llm, store, engine, stream, attempts, attempt
    gc.collect()
    sys.exit(failed)  # with all finalizers
print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print("folder", store.folder.exists())
store.flush()
print("tokens", len(store.get("it").tokens) > 10)
print(Chat(llm, "it").ask("Hello").usage.reuse)
"""


def run(program: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_gets_an_error_at_once_and_takes_nothing_from_its_parent() -> None:
    lines = run(FORKED).splitlines()
    assert lines[:3] == ["child 0", "folder True", "tokens True"]
    assert lines[3].startswith("reread")  # another conversation of that name


UNUSED = """
import os, signal
from tests.support.chat import Chat, make_llm
llm = make_llm()
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    os._exit(7 if Chat(llm, "it").ask("Hello").text is not None else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
Chat(llm, "it").ask("Hello")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_model_that_no_process_has_loaded_yet_works_in_a_fork_and_in_its_parent() -> None:
    assert run(UNUSED).strip() == "7"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer and chat template."""
    folder, llm = tmp_path_factory.mktemp("model"), make_llm()
    llm.engine.model.save_pretrained(folder)
    llm.tokenizer.save_pretrained(folder)
    return folder


def copies(llm: LLM) -> list[LLM]:
    return [copy.deepcopy(llm), pickle.loads(pickle.dumps(llm))]


def test_copies_of_a_model_keep_its_settings_and_load_it_anew(model_folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"cache": CacheConfig(slots=96, recent=16, stage=16), "dtype": "float32"}
    llm = LLM(str(model_folder), sessions_dir=tmp_path, max_input_tokens=100, **settings)
    unloaded = copies(llm)
    answer = llm.chat("Hello", sampling=SHORT).text
    for each in [*unloaded, *copies(llm)]:
        assert not each.loaded
        assert each.chat("Hello", sampling=SHORT).text == answer
        assert each.engine is not llm.engine
        assert each.engine.config == llm.cache
        assert each.store.folder == tmp_path
        with pytest.raises(InputError):
            each.chat("Hello " * 100)
        each.close()
    assert llm.chat("Hello", sampling=SHORT).text == answer


def test_a_model_object_is_not_copied() -> None:
    llm = make_llm()
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(ConfigError, match="model object cannot be copied"):
            copied(llm)
    assert copy.copy(llm).engine is llm.engine


def test_the_temporary_folder_goes_with_the_model_and_that_of_a_killed_process_with_the_next() -> None:
    llm = make_llm(session_memory=SNAPSHOT_NBYTES)
    for name in ("one", "two"):
        Chat(llm, name).ask("Hello")
    llm.store.flush()
    folder = llm.store.folder
    assert list(folder.iterdir())
    orphan = folder.with_name("zsmerge-sessions-orphan")
    orphan.mkdir(exist_ok=True)
    (orphan / "file").write_text("x")
    os.utime(orphan, (1, 1))
    os.utime(folder, (1, 1))  # in use for long

    other = make_llm()
    other.engine  # noqa: B018 - loaded now
    assert folder.exists()
    assert not orphan.exists()
    del llm
    gc.collect()
    assert not folder.exists()
