"""Beside its peers: zsmerge-llm, llama.cpp, transformers and OpenVINO GenAI in one run.

    python benchmarks/speed/peers.py MODEL_FOLDER [--formats bf16 int8 int4] [--llama-cpp bf16=FILE.gguf q4=FILE.gguf]
        [--openvino int8=FOLDER] [--rows cold 64 4096 together loaded] [--repeats 3] [--minutes 6]

MODEL_FOLDER is a folder of transformers, which zsmerge-llm converts to --formats and transformers runs in bfloat16. The
others bring weights of their own, each with a name. Rows:

- cold: seconds from the start of the process to the first and the 32nd token; earlier ones have left what they cache.
- a number: tokens a second of decoding behind a prompt of so many tokens, and of reading it.
- together: tokens a second of eight answers at once, reading their prompts of 64 tokens included.
- loaded: tokens a second of decoding behind 64 tokens, while a busy loop runs on each core.

Each system and row runs in a process of its own (`peer_process`), in turns, after a warm-up process each. Figures are
medians of the rounds; no round begins that would end after --minutes. `over_best_peer` is the median over the rounds of
how many times as fast as the best peer a format of ours is. Writes results/peers-MODEL.json. Run it with nothing else
running. The peers need `pip install llama-cpp-python openvino-genai`; a peer that fails has its error in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import long_text, write
from benchmarks.speed.peer_systems import Setting

PROCESS = Path(__file__).with_name("peer_process.py")
OURS = "zsmerge"
CONTINUOUS = "transformers continuous"
ANSWERED = 32
SHORT = 64
CONVERSATIONS = 8
ROWS = ("cold", str(SHORT), "4096", "together", "loaded")
TIMEOUT = 300
SECONDS = ", s"
"""Ends the name of a figure of which less is better."""


@dataclass(frozen=True)
class Peer:
    """A system with its weights. kind: its name in `peer_systems`; source: the file or folder of its weights."""

    kind: str
    format: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.kind} {self.format}"

    def takes(self, row: str) -> bool:
        """Return whether a row is measured: transformers' continuous batching differs for several conversations."""
        return row == "together" or self.kind != CONTINUOUS


@dataclass
class Measured:
    """What the processes gave. runs: by figure and system, one value a round, None where it failed."""

    runs: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    errors: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, peer: Peer, row: str, result: dict[str, Any]) -> None:
        """Note what one process gave."""
        if "error" in result:
            self.errors[peer.name][row] = result["error"]
        self.versions |= {peer.name: result["versions"]} if "versions" in result else {}
        for key, name in figure_names(row).items():
            self.runs.setdefault(name, {}).setdefault(peer.name, []).append(result.get("figures", {}).get(key))

    def summary(self) -> dict[str, Any]:
        """Return medians and runs, how we stand to the best peer, errors and versions."""
        figures = {
            name: {system: {"median": statistics.median(known), "runs": runs}
                   for system, runs in systems.items() if (known := [run for run in runs if run is not None])}
            for name, systems in self.runs.items()
        }  # fmt: skip
        ahead = {name: over_best_peer(name, systems) for name, systems in figures.items()}
        return {"figures": figures, "over_best_peer": ahead, "errors": self.errors, "versions": self.versions}


def figure_names(row: str) -> dict[str, str]:
    """Return the figures of a row: what `peer_process` calls them, and their names in the results."""
    if row == "cold":
        return {"first": f"first token{SECONDS}", "last": f"token {ANSWERED}{SECONDS}"}
    if row == "together":
        return {"all": f"{CONVERSATIONS} at once"}
    if row == "loaded":
        return {"decode": "beside load"}
    return {"decode": f"decoding behind {row}", "prefill": f"reading {row}"}


def over_best_peer(name: str, systems: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return for each format of ours the peer with the best median, and the median ratio of the rounds to it."""
    sign = -1 if name.endswith(SECONDS) else 1
    peers = [system for system in systems if not system.startswith(OURS)]
    if not peers:
        return {}
    best = max(peers, key=lambda system: sign * systems[system]["median"])
    ratios = {
        system: [(mine / theirs) ** sign for mine, theirs in zip(row["runs"], systems[best]["runs"], strict=True)
                 if mine and theirs]
        for system, row in systems.items() if system.startswith(OURS)
    }  # fmt: skip
    return {"peer": best, **{system: statistics.median(each) for system, each in ratios.items() if each}}


def job(peer: Peer, row: str, threads: int, text: str, tokens: int) -> dict[str, Any]:
    """Return what a process is to do."""
    length = int(row) if row.isdigit() else SHORT
    context = max(length, 256) + tokens + ANSWERED
    setting = Setting(peer.source, peer.format, threads, context)
    kind = "history" if row.isdigit() or row == "loaded" else row
    answered = {"tokens": ANSWERED if row == "cold" else tokens, "conversations": CONVERSATIONS}
    return {
        "kind": peer.kind,
        "row": kind,
        "length": length,
        "loaded": row == "loaded",
        "text": text,
        "setting": asdict(setting),
        **answered,
    }


def warm_up_job(peer: Peer, threads: int) -> dict[str, Any]:
    """Return a job after which whatever a system keeps for later processes is there."""
    made = job(peer, "cold", threads, "", ANSWERED)
    return {**made, "setting": asdict(replace(Setting(**made["setting"]), compile=True))}


def in_a_process(work: dict[str, Any]) -> dict[str, Any]:
    """Run a job; its figures, or its error."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(work["setting"]["threads"])}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = time.time()
    with subprocess.Popen([sys.executable, str(PROCESS)], text=True, env=environment, **pipes) as child:
        try:
            output, errors = child.communicate(json.dumps({**work, "started": started}), timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            child.kill()
            return {"error": f"more than {TIMEOUT} s"}
    try:
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": f"exit status {child.returncode}: {' '.join(errors.splitlines()[-3:])}"}
    return result


def measure(peers: Sequence[Peer], rows: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Run every row of every system in turns, round by round."""
    text, measured, begun = long_text(options.text), Measured(), time.monotonic()
    for peer in peers:
        result = in_a_process(warm_up_job(peer, options.threads))
        print(f"{peer.name}: warm-up {result.get('error') or 'done'}", flush=True)
    longest, done = 0.0, 0
    while done < options.repeats and (not done or time.monotonic() - begun + longest < 60 * options.minutes):
        started = time.monotonic()
        for row in rows:
            for peer in (peer for peer in peers if peer.takes(row)):
                result = in_a_process(job(peer, row, options.threads, text, options.tokens))
                measured.add(peer, row, result)
                shown = {key: round(value, 2) for key, value in result.get("figures", {}).items()}
                print(f"{row}, {peer.name}: {result.get('error') or shown}", flush=True)
        longest, done = max(longest, time.monotonic() - started), done + 1
    return {"rounds": done, "minutes": round((time.monotonic() - begun) / 60, 1), **measured.summary()}


def chosen_peers(options: argparse.Namespace) -> list[Peer]:
    """Return the systems that the options name, ours first."""

    def named(kind: str, given: Iterable[str]) -> list[Peer]:
        pairs = [each.partition("=") for each in given]
        return [Peer(kind, name, source) for name, _, source in pairs]

    folder = str(options.model)
    peers = [Peer(OURS, format, folder) for format in options.formats]
    peers += named("llama.cpp", options.llama_cpp) + named("openvino", options.openvino)
    peers += [Peer(kind, "bf16", folder) for kind in ("transformers", CONTINUOUS)]
    only = options.systems
    return [peer for peer in peers if not only or peer.name in only or peer.kind in only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder of transformers, for zsmerge-llm and transformers")
    parser.add_argument("--formats", nargs="*", default=["bf16"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--llama-cpp", nargs="*", default=[], metavar="NAME=FILE", help="GGUF files")
    parser.add_argument("--openvino", nargs="*", default=[], metavar="NAME=FOLDER", help="folders of OpenVINO IR")
    parser.add_argument("--systems", nargs="*", help="only these, such as transformers or 'llama.cpp q4'")
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded, but in the cold row")
    parser.add_argument("--repeats", type=int, default=3, help="the most rounds")
    parser.add_argument("--minutes", type=float, default=6.0, help="no round begins that would end later")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", help="a text file for the prompts; repeated where it is too short")
    options = parser.parse_args()
    if wrong := [row for row in options.rows if row not in ROWS and not row.isdigit()]:
        parser.error(f"unknown rows: {', '.join(wrong)}")
    result = measure(chosen_peers(options), options.rows, options)
    print(json.dumps(result["over_best_peer"], indent=1))
    settings = {"model": options.model.name, "threads": options.threads, "tokens": options.tokens}
    print(write(f"peers-{options.model.name}", {**settings, **result}))


if __name__ == "__main__":
    main()
