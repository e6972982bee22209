"""Shared fixtures. Real models are loaded by zsmerge_llm itself and converted once for each machine."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from platformdirs import user_cache_dir

from zsmerge_llm import LLM
from zsmerge_llm.cpu.compiled_steps import CompiledSteps
from zsmerge_llm.cpu.step_capture import step_forms
from zsmerge_llm.cpu.threads import PassThreads

if "PYTEST_XDIST_WORKER" in os.environ:  # workers compete for cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes that tests start
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # this one, which has imported PyTorch

settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")

STARTED = pytest.StashKey[float]()

SESSION_MEMORY = "1GiB"
"""For each model that stays loaded: two workers with several of them have to fit into 16 GB."""

LARGE = 2 << 30
"""Bytes of a worker from which on it gives free memory back."""

FETCH = Path(__file__).parents[1] / "shared" / "models.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    about = "begin no test later than this: those that are left are skipped, and counted"
    parser.addoption("--time-limit", type=float, metavar="MINUTES", help=about)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STARTED] = time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = item.config.getoption("--time-limit")
    if limit is not None and time.monotonic() - item.config.stash[STARTED] > 60 * limit:
        pytest.skip("no time is left for this test: --time-limit")


class GGUFFiles(dict[str, Path]):
    """GGUF files by model name, for the slow tests: from the folder ZSMERGE_TEST_MODELS, or fetched into the cache."""

    def __missing__(self, name: str) -> Path:
        folder = Path(os.environ.get("ZSMERGE_TEST_MODELS") or Path(user_cache_dir("zsmerge-llm")) / "test-models")
        path = folder / f"{name}.gguf"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):  # several workers of pytest-xdist
            if not path.is_file():
                if not FETCH.is_file():
                    pytest.fail(f"The slow tests need {name}.gguf in the folder that ZSMERGE_TEST_MODELS names.")
                subprocess.run([sys.executable, str(FETCH), name, str(folder)], check=True, stdout=sys.stderr)
        self[name] = path
        return path


@pytest.fixture(scope="module", autouse=True)
def _free_memory_given_back() -> Iterator[None]:
    """Give the memory of a module's models back to the system: the C library keeps it for the threads that had it."""
    yield
    if psutil.Process().memory_info().rss > LARGE:
        gc.collect()
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session", autouse=True)
def _temporary_layer_budgets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Store measured layer budgets in a temporary folder, not in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zsmerge_llm.engine.layer_budgets.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_packages_of_their_own_accord() -> Iterator[None]:
    """Let no engine compile, or use what was compiled, unless its test says so: rounding may depend on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledSteps, "watch", lambda self: setattr(self, "_steps_left", 100_000))
        yield


@pytest.fixture(scope="session", autouse=True)
def _threads_as_many_under_load() -> Iterator[None]:
    """Keep the number of threads whatever else runs: PyTorch's own attention rounds otherwise with another number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassThreads, "_observe", lambda self, used: None)
        yield


@pytest.fixture(autouse=True)
def _packages_of_one_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile steps of one token only, a third of the work, but in modules that say `ALL_FORMS = True`."""
    if not getattr(request.module, "ALL_FORMS", False):
        monkeypatch.setattr("zsmerge_llm.cpu.compiled_steps.step_forms", lambda num_draft: step_forms(num_draft)[:1])


@pytest.fixture(scope="session")
def smollm2() -> LLM:
    """SmolLM2-135M-Instruct in float32, with the default cache."""
    return LLM("smollm2", dtype="float32", session_memory=SESSION_MEMORY)


@pytest.fixture(scope="session")
def gguf() -> GGUFFiles:
    """GGUF files of other real models, by name."""
    return GGUFFiles()


@pytest.fixture(scope="session")
def qwen_coder(gguf: GGUFFiles) -> LLM:
    """Qwen2.5-Coder-0.5B-Instruct, with the default cache: the file ZSMERGE_TEST_QWEN, or one of the GGUF files.

    Never compiled: its text would depend on rounding, and so on how many tokens other tests have decoded before.
    """
    path = os.environ.get("ZSMERGE_TEST_QWEN") or gguf["qwen2.5-coder-0.5b-instruct"]
    return LLM(path, compile=False, session_memory=SESSION_MEMORY)
