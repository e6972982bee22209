"""Decoding beside other programs and in a CPU quota: tokens a second as a share of one quiet thread's.

    python benchmarks/speed/under_load.py [--model smollm2] [--tokens 150] [--rounds 3]

Conditions: a quiet machine, a busy loop on each core, a quota of one core that begins while the process runs, and one
that it is started in (the last two need a cgroup that can be written to, else they are left out). In each: as the
engine chooses its threads, one thread, and as many as PyTorch has (as it was before the engine chose). All take turns;
the figures are medians of the rounds. Writes results/under-load-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.common import write
from benchmarks.speed.busy_loops import busy_loops
from zsmerge_llm import LLM, SamplingParams
from zsmerge_llm.cpu.threads import read_core_times
from zsmerge_llm.engine.engine import Engine

PROMPT = "The history of lighthouses begins with fires on hills, "
PERIOD = 100_000
PAUSE = 1.5
"""Seconds between two measurements, of which the cores must be idle: the engine sees that, and others are done."""
LONGEST_PAUSE = 6.0
LONGEST = 5.0
"""Seconds after which a measurement ends before its last token."""
REFERENCE = ("quiet", "one thread")


def quota_folder() -> Path | None:
    """Make a cgroup with a quota of one core, of version 1 or 2; None where that is not possible."""
    for mount, name, value in (
        ("cpu", "cpu.cfs_quota_us", f"{PERIOD}"),
        ("cpu,cpuacct", "cpu.cfs_quota_us", f"{PERIOD}"),
        (".", "cpu.max", f"{PERIOD} {PERIOD}"),
    ):
        folder = Path("/sys/fs/cgroup") / mount / f"zsmerge-under-load-{os.getpid()}"
        try:
            folder.mkdir()
            (folder / name).write_text(value)
        except OSError:
            if folder.is_dir():
                folder.rmdir()
            continue
        return folder
    return None


@contextmanager
def quota(folder: Path) -> Iterator[None]:
    """Put this process into the cgroup for a while."""
    try:
        (folder / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (folder.parent / "cgroup.procs").write_text(str(os.getpid()))


def wait_until_idle() -> None:
    """Pause until nearly all cores have been idle for a while; not for ever, where others work on the machine."""
    deadline = time.perf_counter() + LONGEST_PAUSE
    while time.perf_counter() < deadline:
        before = read_core_times()
        time.sleep(PAUSE)
        after = read_core_times()
        if before is None or after is None or (after - before).idle > 0.9 * (os.cpu_count() or 1) * PAUSE:
            return


def decode_rate(engine: Engine, ids: list[int], tokens: int) -> float:
    """Return the tokens a second of one answer, from its first token on."""
    cache = engine.new_cache()
    engine.read(cache, ids)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, lookup=False)
    started, count = time.perf_counter(), 0
    for _ in engine.decode(cache, [params], [ids]):
        count += 1
        if time.perf_counter() - started > LONGEST:
            break
    return count / (time.perf_counter() - started)


def measure(
    model: str, tokens: int, rounds: int, conditions: dict[str, Callable[[], AbstractContextManager[None]]]
) -> dict[str, Any]:
    """Return the rates of every condition and way of choosing threads, all in turns."""
    llm = LLM(model, compile=True)
    engine, ids, threads = llm.engine, llm.tokenizer.encode(PROMPT), torch.get_num_threads()
    chosen = engine.backend.running
    ways: dict[str, tuple[int, Any]] = {
        "as chosen": (threads, chosen),
        "one thread": (1, chosen),
        "all threads": (threads, lambda threads: nullcontext()),
    }
    decode_rate(engine, ids, 32)
    rates: dict[str, dict[str, list[float]]] = {name: {way: [] for way in ways} for name in conditions}
    used: dict[str, list[Any]] = {name: [] for name in conditions}
    for _ in range(rounds):
        for name, condition in conditions.items():
            for way, (count, running) in ways.items():
                wait_until_idle()
                torch.set_num_threads(count)
                engine.backend.running = running
                with condition():
                    rates[name][way].append(decode_rate(engine, ids, tokens))
                if way == "as chosen":
                    used[name].append(engine.backend.thread_choice())
    return {name: {"tokens_per_second": each, "at_the_end": used[name]} for name, each in rates.items()}


def in_quota(folder: Path, model: str, tokens: int, rounds: int) -> dict[str, Any]:
    """Return what a process measures that is started in the quota."""
    command = [sys.executable, __file__, "--model", model, "--tokens", str(tokens), "--rounds", str(rounds)]
    with quota(folder):
        child = subprocess.Popen([*command, "--inside"], stdout=subprocess.PIPE, text=True)
    output, _ = child.communicate()
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    setting = (given.model, given.tokens, given.rounds)
    if given.inside:
        print(json.dumps(measure(*setting, {"started in a quota of one core": nullcontext})))
        return
    conditions = {"quiet": nullcontext, "a busy loop on each core": busy_loops}
    folder = quota_folder()
    try:
        if folder is not None:
            conditions["a quota of one core that begins"] = lambda: quota(folder)
        result = measure(*setting, conditions)
        if folder is not None:
            result |= in_quota(folder, *setting)
    finally:
        if folder is not None:
            folder.rmdir()
    condition, way = REFERENCE
    reference = statistics.median(result[condition]["tokens_per_second"][way])
    for name, each in result.items():
        medians = {way: statistics.median(rates) for way, rates in each["tokens_per_second"].items()}
        each["share_of_one_quiet_thread"] = {way: round(rate / reference, 2) for way, rate in medians.items()}
        shown = ", ".join(f"{way} {rate:.1f} ({rate / reference:.2f})" for way, rate in medians.items())
        print(f"{name}: {shown}; at the end {each['at_the_end']}")
    write(f"under-load-{given.model}", {"tokens": given.tokens, "rounds": given.rounds, "conditions": result})


if __name__ == "__main__":
    main()
