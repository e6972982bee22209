"""Nothing is loaded from a folder that another user of the machine may write to, or has made."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from zsmerge_llm.cpu import native, package_process, trusted_files
from zsmerge_llm.cpu.package_builder import PackageJob
from zsmerge_llm.cpu.step_package import Manifest
from zsmerge_llm.errors import UntrustedFolderError
from zsmerge_llm.paths import cache_folder, check_folder, check_owner, private_folder

INDUCTOR = trusted_files.INDUCTOR_CACHE


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a path belong to another user."""
    if os.getuid() == 0:
        os.chown(path, 54321, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that is not there yet, and no folder for TorchInductor."""
    monkeypatch.setenv("ZSMERGE_CACHE_DIR", str(tmp_path / "home" / "cache"))
    monkeypatch.delenv(INDUCTOR, raising=False)
    return cache_folder()


def test_every_folder_that_is_made_is_closed_to_others(cache: Path) -> None:
    before = os.umask(0)
    try:
        private_folder(cache / "kernels")
    finally:
        os.umask(before)
    assert [mode(each) for each in (cache.parent, cache, cache / "kernels")] == [0o700] * 3


def test_a_cache_folder_stays_where_it_is_when_the_current_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZSMERGE_CACHE_DIR", "here")
    assert cache_folder() == tmp_path / "here"


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o702])
def test_a_folder_that_others_may_write_to_is_refused_with_the_remedy(cache: Path, bits: int) -> None:
    private_folder(cache).chmod(bits)
    with pytest.raises(UntrustedFolderError, match=f"chmod 700 {cache}"):
        check_folder(cache)


def test_a_folder_of_another_user_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_away(private_folder(cache), monkeypatch)
    with pytest.raises(UntrustedFolderError, match="belongs to another user"):
        private_folder(cache)


def test_a_folder_below_one_that_others_may_write_to_is_refused(cache: Path) -> None:
    private_folder(cache / "kernels")
    cache.parent.chmod(0o777)
    with pytest.raises(UntrustedFolderError, match=f"chmod go-w {cache.parent}"):
        check_folder(cache / "kernels")
    cache.parent.chmod(0o1777)  # as /tmp: nobody may rename another's folder
    check_folder(cache / "kernels")


def test_a_link_is_no_folder_of_the_users_own(cache: Path, tmp_path: Path) -> None:
    private_folder(cache)
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (cache / "kernels").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UntrustedFolderError, match="is a link"):
        check_folder(cache / "kernels")


def test_a_cache_folder_may_be_a_link_but_not_into_a_folder_of_everybody(cache: Path, tmp_path: Path) -> None:
    cache.parent.mkdir(mode=0o700)
    disk = tmp_path / "disk"
    (disk / "cache").mkdir(mode=0o700, parents=True)
    cache.symlink_to(disk / "cache")
    private_folder(cache / "kernels")
    disk.chmod(0o777)
    with pytest.raises(UntrustedFolderError, match="Others may replace"):
        check_folder(cache / "kernels")


def test_a_file_that_another_user_left_in_a_folder_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = private_folder(cache / "kernels") / "kernels.so"
    library.write_bytes(b"code")
    library.with_suffix(".sha256").write_text(trusted_files.digest(library))
    assert native._is_trusted(library)
    give_away(library, monkeypatch)
    assert not native._is_trusted(library)
    with pytest.raises(UntrustedFolderError):
        check_owner(library)


def test_kernels_are_compiled_elsewhere_with_a_warning_where_the_folder_is_not_the_users_own(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    private_folder(cache / "kernels").chmod(0o777)
    assert trusted_files.writable_folder(lambda: private_folder(cache / "kernels"), "Compiled elsewhere") is None
    assert "chmod 700" in caplog.text


def test_torch_inductor_keeps_nothing_in_the_shared_temporary_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trusted_files.compiler_cache() == cache / "inductor"
    assert mode(cache / "inductor") == 0o700
    default = Path(tempfile.gettempdir()) / "torchinductor_somebody"
    monkeypatch.setenv(INDUCTOR, str(default))  # as PyTorch itself sets it
    assert trusted_files.compiler_cache() == cache / "inductor"
    monkeypatch.setenv(INDUCTOR, str(tmp_path / "theirs"))
    (tmp_path / "theirs").mkdir(mode=0o777)
    (tmp_path / "theirs").chmod(0o777)
    with pytest.raises(UntrustedFolderError):
        trusted_files.compiler_cache()


def test_the_process_that_makes_a_package_compiles_in_the_users_own_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        package_process.subprocess, "Popen", lambda *_, env, cwd, **__: seen.extend([env[INDUCTOR], env["TMPDIR"], cwd])
    )
    job = PackageJob(private_folder(cache / "decode-steps") / "one", Manifest("", [], [], {}), [], 0)
    package_process.PackageProcess(job)
    (cache / "inductor").chmod(0o777)
    package_process.PackageProcess(job)
    assert seen == [str(cache / "inductor")] * 3 + [str(cache / "decode-steps" / "inductor")] * 3
    assert "chmod 700" in caplog.text


COMPILE = """
import os, torch
from torch.fx.experimental.proxy_tensor import make_fx
from zsmerge_llm.gpu.compiler import compile_and_keep

inputs = [torch.ones(4)]
graph = make_fx(lambda x: [x * 2 + 1])(*inputs)
assert compile_and_keep(graph, inputs)(*inputs)[0].tolist() == [3] * 4
"""


@pytest.mark.slow
def test_compiling_a_layer_or_a_package_leaves_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != INDUCTOR}
    environment |= {"TMPDIR": str(temporary), "ZSMERGE_CACHE_DIR": str(tmp_path / "cache")}
    native.build()
    shutil.copytree(native._library_path(native.DECODE_SOURCES).parent, tmp_path / "cache" / "kernels")
    for code in (COMPILE, PACKAGE):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        assert not [path for path in temporary.rglob("*") if not path.is_dir()]
    assert {each.name for each in (tmp_path / "cache").iterdir()} == {"decode-steps", "inductor", "kernels"}


PACKAGE = """
from tests.support.tiny_models import tiny_model
from zsmerge_llm import CacheConfig
from zsmerge_llm.cpu import compiled_steps
from zsmerge_llm.cpu.step_capture import step_forms
from zsmerge_llm.engine.engine import Engine

compiled_steps.step_forms = lambda num_draft: step_forms(num_draft)[:1]  # a third of the work
engine = Engine(tiny_model(), CacheConfig(slots=128), compile=False)
engine.backend.start()
cache = engine.new_cache()
engine.read(cache, [5, 17, 40])
engine.read(cache, [5])
assert engine.backend.compiled.enabled, engine.backend.disabled_reason
"""


def test_a_layer_is_not_compiled_in_a_folder_of_everybody(cache: Path) -> None:
    from zsmerge_llm.gpu.compiler import compile_and_keep

    nothing: Any = torch.fx.GraphModule({}, torch.fx.Graph())
    private_folder(cache / "inductor").chmod(0o777)
    with pytest.raises(UntrustedFolderError, match="chmod 700"):
        compile_and_keep(nothing, [])
