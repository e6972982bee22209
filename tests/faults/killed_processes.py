"""A program that kills processes in the middle of their turns, and looks for everything that they had answered.

Each process is a fork of this one, which computes nothing itself: so none pays for the imports.

Usage: python -m tests.faults.killed_processes FOLDER KILLS SECONDS. Writes one JSON object with the counts.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.chat import SNAPSHOT_NBYTES, Chat, make_llm
from zsmerge_llm import LLM
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.cache_state import cache_state

NAMES = ["one", "two", "three", None]
KILLS_OF_A_FOLDER = 25
"""After so many, a new folder with new conversations: those of the old one have become long."""


def start(folder: Path) -> LLM:
    return make_llm(sessions_dir=folder, retrieval_tokens=0, compile=False, session_memory=3 * SNAPSHOT_NBYTES)


def digest(cache: Cache) -> str:
    """Return a digest of all tensors of a cache."""
    content = hashlib.sha256()
    for name, tensor in sorted(cache_state(cache)[0].items()):
        content.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return content.hexdigest()


def take_turns(folder: Path, answered: Path, seed: int) -> None:
    """Take turns for ever. Each is written down in `answered` once its answer is there."""
    choices, llm = random.Random(seed), start(folder)
    chats = [Chat(llm, name, messages) for name, messages in zip(NAMES, last_answered(answered), strict=True)]
    with answered.open("a", encoding="utf-8") as record:
        while True:
            index = choices.randrange(len(chats))
            chat = chats[index]
            chat.ask(f"Question {choices.random()}")
            state: dict[str, Any] = {"index": index, "messages": chat.messages}
            if chat.session is not None:
                session = llm.session(chat.session)
                state |= {"tokens": session.tokens, "digest": digest(session.cache)}
            record.write(json.dumps(state) + "\n")
            record.flush()


def last_answered(answered: Path) -> list[list[dict[str, Any]]]:
    """Return the messages of each conversation as they were answered last."""
    return [state.get("messages", []) for state in states(answered)]


def states(answered: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{} for _ in NAMES]
    lines = answered.read_text(encoding="utf-8").splitlines() if answered.exists() else []
    for line in lines:
        try:
            state = json.loads(line)
        except ValueError:  # killed while it was written down: nobody has got that answer
            continue
        found[state["index"]] = state
    return found


def check(folder: Path, answered: Path) -> dict[str, int]:
    """Return counts of what was answered: found as it was, with a turn more, lost, or with another content.

    It looks at a copy: a question to a conversation without a name would go on with it, and may displace others.
    """
    counts = {"equal": 0, "newer": 0, "lost": 0, "wrong": 0, "leftovers": 0}
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    llm = start(shutil.copytree(folder, copy))
    llm.engine  # noqa: B018 - the folder is looked through now
    now = time.time()
    counts["leftovers"] = sum(now - path.stat().st_mtime > 5 for path in copy.glob(".saving-*"))
    for name, state in zip(NAMES, states(answered), strict=True):
        if not state:
            continue
        if name is not None:
            if name not in llm.store:
                counts["lost"] += 1
                continue
            session = llm.session(name)
            if session.tokens == state["tokens"]:
                counts["equal" if digest(session.cache) == state["digest"] else "wrong"] += 1
                continue
            counts["newer" if session.tokens[: len(state["tokens"])] == state["tokens"] else "wrong"] += 1
        else:
            usage = Chat(llm, name, state["messages"]).ask("Go on").usage
            counts["equal" if usage.reuse in ("continued", "restored") else "lost"] += 1
    return counts


def write_check(kept: Path, answered: Path, report: Path) -> None:
    report.write_text(json.dumps(check(kept, answered)))


def forked(work: Callable[[], Any]) -> int:
    """Start a fork that does the work, and return its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


def main(folder: Path, kills: int, seconds: float) -> None:
    totals: dict[str, int] = {"killed": 0, "failed": 0}
    choices, deadline = random.Random(0), time.monotonic() + seconds
    report = folder / "report"
    for number in range(kills):
        if time.monotonic() > deadline:
            break
        kept, answered = (folder / f"{name}-{number // KILLS_OF_A_FOLDER}" for name in ("kept", "answered"))
        pid = forked(partial(take_turns, kept, answered, number))
        before = answered.stat().st_size if answered.exists() else 0
        while not answered.exists() or answered.stat().st_size == before:  # until a turn of its own is answered
            if os.waitpid(pid, os.WNOHANG)[0]:
                raise SystemExit("A process ended by itself.")
            time.sleep(0.005)
        time.sleep(choices.uniform(0, 0.4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        report.unlink(missing_ok=True)
        checking = forked(partial(write_check, kept, answered, report))
        totals["killed"] += 1
        totals["failed"] += os.waitpid(checking, 0)[1] != 0
        for key, count in (json.loads(report.read_text()) if report.exists() else {}).items():
            totals[key] = totals.get(key, 0) + count
    print(json.dumps(totals))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
