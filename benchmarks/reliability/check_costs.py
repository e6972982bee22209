"""What the checks of inputs and files cost: their processor time against that of a turn, and in a load.

    python benchmarks/reliability/check_costs.py [--model smollm2] [--turns 12] [--max-tokens 32]

Each check is timed by the processor time of its thread, so that other programs on the machine do not count. A turn is
the processor time of the whole process, model included. Writes results/check-costs-MODEL.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import write
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.generation import options
from zsmerge_llm.language import chat_template
from zsmerge_llm.language.control_tokens import ControlTokens
from zsmerge_llm.sessions import file_format, session
from zsmerge_llm.sessions.conversations import Conversations
from zsmerge_llm.sessions.store import Store

Checks = tuple[tuple[Any, str], ...]
OF_A_TURN: Checks = (
    *((options, name) for name in ("check_types", "plain_json")),
    *((chat_template, name) for name in ("_check_text", "check_jinja")),
    *((ControlTokens, name) for name in ("guard_message", "guard_values")),
    (Conversations, "check"),
    (Store, "refresh"),
)
OF_A_LOAD: Checks = tuple((session, name) for name in ("check_facts", "check_header", "check_tensors"))
DIGEST: Checks = ((file_format, "digest"),)


@contextmanager
def timed(checks: Checks) -> Iterator[Counter[str]]:
    """Add up the processor time of functions by name, while they run in this thread or others."""
    seconds: Counter[str] = Counter()

    def timing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.thread_time() - started

        return call

    with ExitStack() as patches:
        for owner, name in checks:
            patches.enter_context(mock.patch.object(owner, name, timing(name, getattr(owner, name))))
        yield seconds


def measure_turns(llm: LLM, turns: int, max_tokens: int) -> dict[str, Any]:
    """Return milliseconds of the checks and of a turn, each a median of the turns of one conversation."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You are a helpful assistant." * 10}]
    found: list[tuple[float, dict[str, float]]] = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Question {turn}: what do you know about lighthouses? " * 8})
        with timed(OF_A_TURN) as seconds:
            started = time.process_time()
            result = llm.chat(messages, session="it", sampling=SamplingParams(max_tokens=max_tokens))
            found.append((time.process_time() - started, dict(seconds)))
        messages.append({"role": "assistant", "content": result.text})
    whole = statistics.median(total for total, _ in found)
    names = sorted({name for _, each in found for name in each})
    checks = {name: statistics.median(each.get(name, 0.0) for _, each in found) for name in names}
    return {
        "turn, ms": 1000 * whole,
        "checks, ms": {name: round(1000 * seconds, 3) for name, seconds in checks.items()},
        "share of a turn, %": 100 * sum(checks.values()) / whole,
    }


def measure_load(llm: LLM, repeats: int = 20) -> dict[str, Any]:
    """Return milliseconds of the checks of a saved session, beside those of its digest and of the whole load."""
    with tempfile.TemporaryDirectory() as folder:
        path = llm.session("it").save(Path(folder) / "it")
        checks, digests, loads = [], [], []
        for _ in range(repeats):
            with timed(OF_A_LOAD) as of_checks, timed(DIGEST) as of_digest:
                started = time.thread_time()
                session.load_session(path)
                loads.append(time.thread_time() - started)
            checks.append(sum(of_checks.values()))
            digests.append(of_digest["digest"])
        size = path.stat().st_size
    figures = {"checks of facts and tensors, ms": checks, "digest, ms": digests, "load, ms": loads}
    return {"file, MB": size / 1e6, **{name: 1000 * statistics.median(each) for name, each in figures.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(arguments.model, cache=CacheConfig(slots=1024), sessions_dir=folder, compile=False)
        llm.warm_up()
        found = {"model": Path(llm.name).stem, "turns": measure_turns(llm, arguments.turns, arguments.max_tokens)}
        found["session file"] = measure_load(llm)
    print(found)
    print(write(f"check-costs-{found['model']}", found))


if __name__ == "__main__":
    main()
