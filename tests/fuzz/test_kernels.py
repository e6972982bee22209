"""The C++ operators refuse what does not fit, and never read or write outside of their tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.kernel_fuzzer import fuzz
from zsmerge_llm.cpu import native

ROOT = Path(__file__).parents[2]
SANITIZED = (
    *("-O1", "-g", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "-fno-sanitize=alignment",  # values are loaded with memcpy, but PyTorch's own headers are not
)


def runtimes() -> list[str]:
    """Return the paths of the sanitizers' libraries, which must be loaded before Python's own."""
    compiler = shutil.which("gcc") or ""
    names = ("libasan.so", "libubsan.so") if compiler and sys.platform == "linux" else ()
    found = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in names
    ]
    return found if found and all(os.path.isabs(path) for path in found) else []


def test_operators_answer_what_fits_and_refuse_the_rest() -> None:
    try:
        native.build(native.DECODE_SOURCES)
        native.build(native.PREFILL_SOURCES)
    except native.UnsupportedModelError as error:
        pytest.skip(str(error))
    found = fuzz(600, seed=1)

    assert found["answered"] == 600
    assert found["refused"] > 300


@pytest.mark.slow
@pytest.mark.skipif(not runtimes(), reason="needs GCC with its sanitizers")
@pytest.mark.parametrize("sources", [native.DECODE_SOURCES, native.PREFILL_SOURCES], ids=["decode", "prefill"])
def test_sanitizers_find_nothing_in_thousands_of_calls(
    sources: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.build(native.PREFILL_SOURCES)
    if sources == native.PREFILL_SOURCES and not (native.has_bf16_products() or native.has_int8_products()):
        pytest.skip("needs a processor with bfloat16 or byte products, as the kernels for prefill do")
    monkeypatch.setattr(native, "FLAGS", SANITIZED)
    library = native._compile(native._source(sources), tmp_path)
    environment = {**os.environ, "LD_PRELOAD": " ".join(runtimes()), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.fuzz.kernel_fuzzer", "2000", str(library)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-4000:]
    assert "'answered': 2000" in done.stdout
