"""One replica against two behind a router: throughput, the router's cost, and what it costs to move a conversation.

    python benchmarks/sessions/replicas.py [--model smollm2] [--streams 8] [--seconds 60]

Starts `zsmerge-llm serve` alone, and with `--replicas 2`. Every process computes on one thread. `--streams` clients ask
as fast as they are answered. The router's cost is the time of a request that computes nothing (`GET /v1/models`) and of
a streamed token, with it and without. A move is the first turn on another replica after the conversation's own was
killed, beside a turn that stays.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import TEXTS, write
from benchmarks.sessions.server_process import serving

SLOTS, ANSWER_TOKENS, REPEATS = 1024, 48, 300


@contextmanager
def serving_client(model: str, folder: str, replicas: int) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """Start a server; yield a client of it and its process."""
    options = ("--model", model, "--slots", str(SLOTS), "--sessions-dir", folder, "--replicas", str(replicas))
    with (
        serving(*options, OMP_NUM_THREADS="1") as (address, process),
        httpx.Client(base_url=address, timeout=600) as client,
    ):
        yield client, process


def ask(client: httpx.Client, model: str, messages: list[dict[str, Any]], max_tokens: int) -> dict[str, Any]:
    """Return an answer, which is appended to the messages. Asks again where a replica has just been lost."""
    body = {"model": model, "messages": messages, "max_tokens": max_tokens}
    while (reply := client.post("/v1/chat/completions", json=body)).status_code == 503:
        time.sleep(0.02)
    found: dict[str, Any] = reply.raise_for_status().json()
    messages.append(found["choices"][0]["message"])
    return found


def throughput(client: httpx.Client, model: str, streams: int, seconds: float) -> dict[str, float]:
    """Return answered tokens a second of all clients together, and answers."""
    counts, lock, until = [0, 0], threading.Lock(), time.monotonic() + seconds

    def hold(number: int) -> None:
        messages: list[dict[str, Any]] = []
        while time.monotonic() < until:
            if len(messages) > 8:
                messages = []
            messages.append({"role": "user", "content": f"({number}) Write about the sea, part {len(messages)}."})
            found = ask(client, model, messages, ANSWER_TOKENS)
            with lock:
                counts[0] += 1
                counts[1] += found["usage"]["completion_tokens"]

    began = time.monotonic()
    clients = [threading.Thread(target=hold, args=(number,)) for number in range(streams)]
    for each in clients:
        each.start()
    for each in clients:
        each.join()
    taken = time.monotonic() - began
    return {"answers": counts[0], "tokens_per_second": round(counts[1] / taken, 1)}


def cost(client: httpx.Client, model: str) -> dict[str, float]:
    """Return milliseconds of a request that computes nothing, and of a token in one stream."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        client.get("/v1/models").raise_for_status()
        times.append(1000 * (time.perf_counter() - began))
    body = {"model": model, "messages": [{"role": "user", "content": "Count to a thousand."}], "max_tokens": 64}
    tokens = []
    for _ in range(3):
        arrivals = []
        with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
            arrivals = [time.perf_counter() for line in reply.iter_lines() if '"content"' in line]
        tokens.append(1000 * (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1))
    return {"request_ms": round(statistics.median(times), 2), "token_ms": round(statistics.median(tokens), 2)}


def killed(router: psutil.Process, client: httpx.Client) -> None:
    """Kill the replica that holds the only conversation in memory."""
    text = client.get("/metrics").text
    sizes = re.findall(r'zsmerge_sessions{replica="(\d)",tier="host"} (\d+)', text)
    number = int(max(sizes, key=lambda each: int(each[1]))[0])
    children = [each for each in router.children() if any("spawn_main" in word for word in each.cmdline())]
    sorted(children, key=lambda each: each.create_time())[number].kill()


def moving(router: psutil.Process, client: httpx.Client, model: str) -> dict[str, Any]:
    """Return seconds of a turn that stays, of one that moves to another replica, and until the first is back."""
    text = (TEXTS / "marigold.txt").read_text(encoding="utf-8")
    messages: list[dict[str, Any]] = [{"role": "system", "content": text}]
    seconds, found = [], {}
    for turn in range(5):
        messages.append({"role": "user", "content": f"({turn}) What happened then?"})
        if turn == 4:
            killed(router, client)
        began = time.perf_counter()
        found = ask(client, model, messages, 1)
        seconds.append(round(time.perf_counter() - began, 3))
    began = time.perf_counter()
    while client.get("/health").json()["status"] != "ok":
        time.sleep(0.05)
    usage = found["usage"]
    return {
        "tokens": usage["total_tokens"],
        "cache_bytes": usage["zsmerge"]["cache_bytes"],
        "reuse": usage["zsmerge"]["reuse"],
        "first_turn_seconds": seconds[0],
        "turn_that_stays_seconds": statistics.median(seconds[1:4]),
        "turn_that_moves_seconds": seconds[4],
        "until_the_killed_one_answers_seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    found: dict[str, Any] = {"model": options.model, "slots": SLOTS, "streams": options.streams, "threads_each": 1}
    for replicas in (1, 2):
        with (
            tempfile.TemporaryDirectory() as folder,
            serving_client(options.model, folder, replicas) as (client, process),
        ):
            name = "one server, no router" if replicas == 1 else "two replicas"
            if replicas == 2:
                found["moving"] = moving(process, client, options.model)
            found.setdefault("cost", {})[name] = cost(client, options.model)
            found.setdefault("throughput", {})[name] = throughput(
                client, options.model, options.streams, options.seconds
            )
    print(json.dumps(found, indent=1))
    write(f"replicas-{Path(options.model).stem}", found)


if __name__ == "__main__":
    main()
