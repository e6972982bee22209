"""How long the event loop is blocked: 20 gathered calls in each framework beside a task that ticks every 2 ms.

    python benchmarks/speed/event_loop.py [--model smollm2] [--calls 20] [--tokens 16] [--rounds 5]

`control` is the same work started from plain threads: what the machine and the interpreter cost without asyncio.
`first use` is one call on a model that is not loaded yet, in a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from zsmerge_llm import LLM, SamplingParams

QUESTION = "Why is the sky blue?"


async def tick_delays(work: Callable[[], Awaitable[Any]]) -> list[float]:
    """Return the milliseconds between ticks while `work` runs, longest first."""
    gaps: list[float] = []

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.002)
            gaps.append(1000 * (time.perf_counter() - before))

    task = asyncio.create_task(tick())
    await asyncio.sleep(0.02)
    await work()
    task.cancel()
    return sorted(gaps, reverse=True)


def langchain(llm: LLM | None, model: str, tokens: int) -> Callable[[], Awaitable[Any]]:
    from langchain_zsmerge import ChatZSMerge

    chat = ChatZSMerge(model=model, max_tokens=tokens) if llm is None else ChatZSMerge(llm=llm, max_tokens=tokens)
    return lambda: chat.ainvoke(QUESTION)


def llamaindex(llm: LLM | None, model: str, tokens: int) -> Callable[[], Awaitable[Any]]:
    from llama_index.llms.zsmerge import ZSMergeLLM

    chat = ZSMergeLLM(model, max_tokens=tokens) if llm is None else ZSMergeLLM(llm=llm, max_tokens=tokens)
    return lambda: chat.acomplete(QUESTION)


def control(llm: LLM, tokens: int, calls: int) -> Callable[[], Awaitable[None]]:
    """Run the same calls in threads that wait already: only the interpreter's own switching is left."""

    async def work() -> None:
        go, params = threading.Event(), SamplingParams(max_tokens=tokens)

        def one() -> None:
            go.wait()
            llm.chat(QUESTION, sampling=params)

        threads = [threading.Thread(target=one) for _ in range(calls)]
        for thread in threads:
            thread.start()
        go.set()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.05)

    return work


def first_use(framework: str, model: str) -> None:
    """Print the gaps over 50 ms of one call that loads the model."""
    ask = {"langchain": langchain, "llamaindex": llamaindex}[framework](None, model, 4)
    gaps = asyncio.run(tick_delays(ask))
    print(json.dumps([round(gap) for gap in gaps if gap > 50]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-use", choices=["langchain", "llamaindex"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.first_use:
        first_use(given.first_use, given.model)
        return
    llm = LLM(given.model)
    llm.warm_up()
    gc.collect()
    gc.freeze()  # else the collector's walk over PyTorch's modules falls into some rounds (docs/research/sessions)

    def gathered(ask: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
        return lambda: asyncio.gather(*(ask() for _ in range(given.calls)))

    work = {
        "control": control(llm, given.tokens, given.calls),
        "langchain": gathered(langchain(llm, given.model, given.tokens)),
        "llamaindex": gathered(llamaindex(llm, given.model, given.tokens)),
    }
    for name, each in work.items():
        for turn in range(given.rounds):
            gaps = asyncio.run(tick_delays(each))
            ranks = {"longest": gaps[0], "99 %": gaps[len(gaps) // 100], "median": gaps[len(gaps) // 2]}
            shown = ", ".join(f"{rank} {gap:.1f} ms" for rank, gap in ranks.items())
            print(f"{name} {turn + 1}: {len(gaps)} ticks, {shown}", flush=True)
    for framework in ("langchain", "llamaindex"):
        command = [sys.executable, __file__, "--first-use", framework, "--model", given.model]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{framework}, first use, gaps over 50 ms: {done.stdout.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
