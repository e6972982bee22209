"""The HTTP server under load, and one long conversation over it.

    python benchmarks/sessions/http_server.py [--model smollm2] [--streams 50] [--minutes 10] [--turns 200]

Starts `zsmerge-llm serve` as a process. First `--turns` turns of an agent's conversation, each with a tool result of
300 tokens: seconds to the first token and bytes of the cache by turn. Then `--streams` clients for `--minutes`: each
holds conversations, asks on, and leaves a quarter of its streams at a random time. Counts: requests by outcome,
requests of conversations that were read again though they were answered before (lost), seconds to the first token by
percentile, and the memory of the server's process by time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import TEXTS, write
from benchmarks.sessions.server_process import serving

SLOTS = 1024
RESULT_WORDS = 220
QUESTIONS = ("Name a tree and say why you like it.", "And a river?", "What would a child ask next?", "Sum it up.")


@dataclass
class Reply:
    """What came of one request: its text so far, seconds to the first piece, and the usage if it is complete."""

    text: str = ""
    first: float | None = None
    usage: dict[str, Any] | None = None


def ask(client: httpx.Client, body: dict[str, Any], leave_after: int | None = None) -> Reply:
    """Send a request and read its stream. leave_after: pieces after which the client is gone."""
    reply, began, pieces = Reply(), time.perf_counter(), 0
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            reply.usage = event.get("usage") or reply.usage
            text = event["choices"][0]["delta"].get("content") if event["choices"] else None
            if text:
                reply.first = reply.first or time.perf_counter() - began
                reply.text += text
                pieces += 1
                if pieces == leave_after:
                    return reply
    return reply


# -- one long conversation -------------------------------------------------------------------------------------------


def long_conversation(address: str, model: str, turns: int) -> dict[str, Any]:
    """Return seconds to the first token and bytes of the cache by turn, of an agent that reads a tool result each."""
    words = (TEXTS / "marigold.txt").read_text(encoding="utf-8").split()
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You are the clerk of a harbour. Be brief."}]
    first, sizes, reread, tokens = [], [], 0, 0
    with httpx.Client(base_url=address, timeout=600) as client:
        for turn in range(turns):
            start = turn * RESULT_WORDS % (len(words) - RESULT_WORDS)
            result = " ".join(words[start : start + RESULT_WORDS])
            call = {"id": f"call{turn:05d}", "type": "function", "function": {"name": "log", "arguments": "{}"}}
            messages += [
                {"role": "user", "content": f"({turn}) What does page {turn} of the log say?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": call["id"], "content": result},
            ]
            reply = ask(client, {"model": model, "messages": messages, "max_tokens": 24, "session_id": "agent"})
            assert reply.usage is not None
            assert reply.first is not None
            messages.append({"role": "assistant", "content": reply.text})
            first.append(reply.first)
            sizes.append(reply.usage["zsmerge"]["cache_bytes"])
            reread += turn > 0 and reply.usage["zsmerge"]["reuse"] != "continued"
            tokens = reply.usage["total_tokens"]
    late, early = statistics.median(first[-10:]), statistics.median(first[5:15])
    return {
        "turns": turns,
        "tokens": tokens,
        "turns_not_continued": reread,
        "first_token_seconds": {"turns 6 to 15": round(early, 3), "last ten": round(late, 3)},
        "ratio_of_first_tokens": round(late / early, 3),
        "cache_bytes": {"turn 10": sizes[min(9, turns - 1)], "last": sizes[-1]},
    }


# -- many streams ----------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """What all clients together saw. Guarded by its lock."""

    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    first: list[float] = field(default_factory=list)
    lost: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def hold_conversations(address: str, model: str, number: int, until: float, load: Load) -> None:
    """Ask until the time is up, and leave a quarter of the streams."""
    chance = random.Random(number)
    with httpx.Client(base_url=address, timeout=600) as client:
        messages: list[dict[str, Any]] = []
        while time.monotonic() < until:
            if len(messages) > 12:
                messages = []
            question = QUESTIONS[chance.randrange(len(QUESTIONS))]
            asked = [*messages, {"role": "user", "content": f"({number}) {question}"}]
            leave_after = chance.randrange(1, 12) if chance.random() < 0.25 else None
            try:
                reply = ask(client, {"model": model, "messages": asked, "max_tokens": 32}, leave_after)
            except Exception as error:  # counted by its type
                with load.lock:
                    load.errors[f"{type(error).__name__}: {error}"[:120]] += 1
                continue
            with load.lock:
                load.outcomes["left" if reply.usage is None else "answered"] += 1
                if reply.first is not None:
                    load.first.append(reply.first)
                if reply.usage is not None:
                    load.lost += bool(messages) and reply.usage["zsmerge"]["reuse"] not in ("continued", "restored")
            if reply.usage is not None:
                messages = [*asked, {"role": "assistant", "content": reply.text}]


def many_streams(address: str, model: str, process: psutil.Process, streams: int, minutes: float) -> dict[str, Any]:
    """Return the counts and times of many clients, and the server's memory by time."""
    load, until = Load(), time.monotonic() + 60 * minutes
    clients = [
        threading.Thread(target=hold_conversations, args=(address, model, number, until, load))
        for number in range(streams)
    ]
    for client in clients:
        client.start()
    memory = []
    while time.monotonic() < until:
        memory.append(round(process.memory_info().rss / 1e6))
        time.sleep(max(1.0, 60 * minutes / 40))
    for client in clients:
        client.join()
    first = sorted(load.first)
    percentiles = {f"p{at}": round(first[min(len(first) - 1, len(first) * at // 100)], 3) for at in (50, 90, 99)}
    return {
        "streams": streams,
        "minutes": minutes,
        "outcomes": dict(load.outcomes),
        "errors": dict(load.errors),
        "lost": load.lost,
        "first_token_seconds": percentiles,
        "server_megabytes": memory,
    }


def main() -> None:
    """Run both parts and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--turns", type=int, default=200)
    options = parser.parse_args()
    found: dict[str, Any] = {"model": options.model, "slots": SLOTS}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("--model", options.model, "--slots", str(SLOTS), "--sessions-dir", folder) as (address, process),
    ):
        if options.turns:
            found["long_conversation"] = long_conversation(address, options.model, options.turns)
        if options.minutes:
            found["load"] = many_streams(address, options.model, process, options.streams, options.minutes)
    print(json.dumps(found, indent=1))
    write(f"http-server-{Path(options.model).stem}", found)


if __name__ == "__main__":
    main()
