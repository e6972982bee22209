"""Fuzz for as long as you like: portions of all kinds of input by turns, until so many have been tried.

    python -m tests.fuzz [--inputs 100000] [--seconds 7200] [--portion 500]

Kinds: requests (messages, tools, formats, templates, sampling, both integrations), headers and settings of model files,
calls of the C++ kernels. Prints the counts after each portion as JSON: inputs by kind, and failed portions, each of
which is an input that ended in an error of another type.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from tests.fuzz import kernel_fuzzer, test_fuzz_requests, test_model_headers
from zsmerge_llm.cpu import native


def portions(root: Path, size: int) -> Iterator[tuple[str, Callable[[], int]]]:
    """Yield kinds of input, by turns, and what tries a portion of one and returns how many it tried."""
    headers = [name for name in vars(test_model_headers) if name.startswith("test_")]
    for seed in count(1):
        for area in test_fuzz_requests.AREAS:
            yield area, partial(_try_requests, area, size)
        for name in headers:
            yield name.removeprefix("test_").partition("_end_in")[0], partial(_try_headers, name, size, root)
        yield "calls of the kernels", partial(_call_kernels, size, seed)


def _try_requests(area: str, size: int) -> int:
    return test_fuzz_requests.fuzz(area, size, seeded=False).total()


def _try_headers(name: str, size: int, root: Path) -> int:
    getattr(test_model_headers, name)(size, root)
    return test_model_headers.OUTCOMES.total()


def _call_kernels(size: int, seed: int) -> int:
    for sources in (native.DECODE_SOURCES, native.PREFILL_SOURCES):
        native.build(sources)
    return sum(kernel_fuzzer.fuzz(size, seed).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=7200.0)
    parser.add_argument("--portion", type=int, default=500)
    arguments = parser.parse_args()
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    ends = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder, test_model_headers.tiny_models(Path(folder)) as root:
        for kind, run in portions(root, arguments.portion):
            if tried.total() >= arguments.inputs or time.monotonic() > ends:
                break
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    tried[kind] += run()
            except Exception:
                failed[kind] += 1
                traceback.print_exc()
            print(json.dumps({"total": tried.total(), "tried": tried, "failed": failed}), flush=True)


if __name__ == "__main__":
    main()
