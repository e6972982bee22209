"""One process at a time makes a package, also where those that have started it are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from zsmerge_llm.cpu import builder_lock, package_process
from zsmerge_llm.cpu.builder_lock import AwaitedPackage, lock_package, unlock
from zsmerge_llm.cpu.package_builder import PackageJob
from zsmerge_llm.cpu.package_process import PackageProcess
from zsmerge_llm.cpu.step_package import Manifest
from zsmerge_llm.errors import PackageError

pytestmark = pytest.mark.skipif(builder_lock.fcntl is None, reason="this system has no such locks")
BUILDER = "import pathlib, time\nwhile not pathlib.Path({end!r}).exists(): time.sleep(0.01)"
"""In place of the builder: it ends once there is a file."""
PARENT = """
import subprocess, sys
from pathlib import Path
from zsmerge_llm.cpu.builder_lock import lock_package
lock = lock_package(Path({folder!r}) / "package")
process = subprocess.Popen([sys.executable, "-c", {builder!r}], pass_fds=(lock,), stdout=subprocess.DEVNULL)
print("started", flush=True)
process.wait()
"""
"""Starts a builder as `PackageProcess` does, without its imports."""


def job(folder: Path) -> PackageJob:
    return PackageJob(folder / "package", Manifest("", [], [], {}), [], 0)


def replace_builder(folder: Path) -> None:
    """Let what is started wait for a file in the place of making a package."""
    real, code = subprocess.Popen, BUILDER.format(end=str(folder / "end"))
    changed: Any = package_process
    changed.subprocess.Popen = lambda command, **how: real([command[0], "-c", code], **how)


def is_locked(folder: Path) -> bool:
    return not AwaitedPackage(job(folder)).finished


def wait_until_free(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while is_locked(folder):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(package_process.subprocess, "Popen", subprocess.Popen)
    replace_builder(tmp_path)
    tmp_path.chmod(0o700)
    return tmp_path


def test_a_second_process_is_started_only_after_the_first_one_has_ended(folder: Path) -> None:
    first = PackageProcess(job(folder))
    for _ in range(3):
        with pytest.raises(BlockingIOError):
            PackageProcess(job(folder))
    (folder / "end").touch()
    first.wait()

    second = PackageProcess(job(folder))
    second.wait()
    first.check()
    second.check()


def test_packages_of_other_models_are_made_at_the_same_time(folder: Path) -> None:
    (folder / "end").touch()
    handle = lock_package(folder / "another")
    process = PackageProcess(job(folder))
    process.wait()
    process.check()
    unlock(handle)


def test_of_processes_that_are_killed_one_after_another_only_the_first_leaves_a_builder(tmp_path: Path) -> None:
    code = PARENT.format(folder=str(tmp_path), builder=BUILDER.format(end=str(tmp_path / "end")))
    said = []
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as parent:
            assert parent.stdout is not None
            said.append(parent.stdout.readline())
            parent.send_signal(signal.SIGKILL)

    assert said == [b"started\n", b"", b""]
    assert is_locked(tmp_path)
    (tmp_path / "end").touch()
    wait_until_free(tmp_path)


def test_a_builder_that_is_killed_frees_the_lock(folder: Path) -> None:
    process: Any = PackageProcess(job(folder))
    assert is_locked(folder)
    os.kill(process._process.pid, signal.SIGKILL)
    process.wait()

    assert not is_locked(folder)
    with pytest.raises(PackageError):
        process.check()


def test_who_waits_too_long_for_another_process_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder_lock, "MAX_SECONDS", 0.0)
    handle = lock_package(folder / "package")
    awaited = AwaitedPackage(job(folder))
    awaited.wait()
    with pytest.raises(PackageError, match="Another process"):
        awaited.check()
    unlock(handle)
    awaited.check()
