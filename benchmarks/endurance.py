"""Endurance: a book read far beyond the trained window in a cache of constant size, and chats that go on beyond it.

    python benchmarks/endurance.py --text BOOK [--model smollm2] [--tokens 65536] [--slots 1024] [--only NAME ...]

For every way of placing tokens: mean NLL of each block of 4,096 tokens, and a text written at the end. `fresh` is what
the text itself costs: some blocks, each in a new cache behind the 3,072 tokens before it. Then a chat: an instruction
in the system message, turns until the window is long passed, and how many of the late answers still obey. What the
result file knows already is not measured again. Writes results/endurance.json and results/endurance.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, book, plot, write

from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.cache import Cache
from zsmerge_llm.engine import Engine
from zsmerge_llm.horizon import Horizon, Shape

BLOCK, BEFORE, FRESH = 4096, 3072, (1, 15, 7, 11, 3)
WAYS: dict[str, Shape | None] = {
    "as is": None,
    "re-mapped": Shape(),
    "re-mapped, to a quarter": Shape(squeeze=0.25),
    "re-mapped, evenly": Shape(segments=1),
    "re-mapped, near 1/16": Shape(near=0.0625),
    "re-mapped, near 1/2": Shape(near=0.5),
}
SYSTEM = "You are a helpful assistant. Begin every answer with the word AHOY."
QUESTIONS = (
    "Name an animal that lives in the sea.",
    "What is the capital of France?",
    "Name a fruit.",
    "What do bees make?",
    "Which season comes after winter?",
    "Name a colour.",
    "What do we drink in the morning?",
    "Name a musical instrument.",
)


def place(engine: Engine, shape: Shape | None, window: int | None = None) -> None:
    """Let the engine's caches stand in the window as `shape` says; None: never move."""
    engine.horizon = Horizon(engine.model, engine.specs, (window or engine.window) if shape else None, shape)


def block_nll(engine: Engine, cache: Cache, ids: list[int]) -> float:
    nll = float(-engine.logprobs(cache, ids).mean())
    print(round(nll, 4), end=" ", flush=True)
    return nll


def endure(llm: LLM, ids: list[int]) -> dict[str, Any]:
    """NLL by block of one long reading, and what the model writes behind it."""
    engine = llm.engine
    cache = engine.new_cache()
    by_block = [block_nll(engine, cache, ids[start : start + BLOCK]) for start in range(0, len(ids), BLOCK)]
    written = list(engine.decode(cache, [SamplingParams(max_tokens=120, ignore_eos=True)], [[]]))
    text = llm.tokenizer.decode([token for (token,) in written])
    return {
        "blocks": list(range(len(by_block))),
        "nll": by_block,
        "written": text,
        "bytes": cache.nbytes,
        "parts": len(cache.places[0].knots),
    }


def fresh(llm: LLM, ids: list[int]) -> dict[str, Any]:
    """NLL of some blocks, each in a cache of its own: what the text itself costs there."""
    engine, by_block = llm.engine, {}
    for block in FRESH:
        start, cache = block * BLOCK, engine.new_cache()
        engine.read(cache, ids[start - BEFORE : start])
        by_block[block] = block_nll(engine, cache, ids[start : start + BLOCK])
    return {"blocks": sorted(by_block), "nll": [by_block[block] for block in sorted(by_block)]}


def talk(llm: LLM, name: str, text: list[str], window: int) -> dict[str, Any]:
    """A chat whose every turn brings a passage of the book and a question: which answers obey the system message."""
    messages, said = [{"role": "system", "content": SYSTEM}], []
    for turn, passage in enumerate(text):
        asked = QUESTIONS[turn % len(QUESTIONS)]
        messages.append({"role": "user", "content": f"Here is a passage.\n\n{passage}\n\n{asked}"})
        result = llm.chat(messages, session=name, sampling=SamplingParams(max_tokens=12))
        messages.append({"role": "assistant", "content": result.text})
        tokens = llm.session(name).cache.seen
        obeys = result.text.lstrip(" \"*'").upper().startswith("AHOY")
        said.append({"tokens": tokens, "obeys": obeys, "text": result.text})
        print(tokens, obeys, repr(result.text), flush=True)
    return {
        "slots": llm.engine.config.slots,
        "within": share([turn["obeys"] for turn in said if turn["tokens"] <= window]),
        "beyond": share([turn["obeys"] for turn in said if turn["tokens"] > window]),
        "turns": said,
    }


def share(obeyed: list[bool]) -> str:
    return f"{sum(obeyed)} of {len(obeyed)}"


def passages(llm: LLM, text: str, size: int, count: int) -> list[str]:
    ids = llm.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [llm.tokenizer.decode(ids[at * size : (at + 1) * size]) for at in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", help="a long text file")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--only", nargs="*", default=["fresh", *WAYS, "chat"], help="ways to measure")
    parser.add_argument("--window", type=int, help="pretend that the model was trained on fewer positions (chat)")
    parser.add_argument("--turns", type=int, default=48)
    parser.add_argument("--passage", type=int, default=400, help="tokens of the passage in each turn (chat)")
    arguments = parser.parse_args()
    path = RESULTS / "endurance.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    known.pop("machine", None)
    reading, chats = known.setdefault("reading", {}), known.setdefault("chats", {})
    llm = LLM(arguments.model, cache=CacheConfig(slots=arguments.slots))
    if set(arguments.only) != {"chat"}:
        known.update({"block": BLOCK, "slots": arguments.slots, "model": Path(llm.name).stem})
    ids = llm.tokenizer(book(arguments.text), add_special_tokens=False, verbose=False).input_ids[: arguments.tokens]
    for name in ("fresh", *WAYS):
        if name in arguments.only and name not in reading:
            print(name, flush=True)
            place(llm.engine, WAYS.get(name))
            reading[name] = fresh(llm, ids) if name == "fresh" else endure(llm, ids)
            write("endurance", known)
    if "chat" in arguments.only:
        window = arguments.window or llm.engine.window or 0
        texts = passages(llm, book(arguments.text), arguments.passage, arguments.turns)
        for name in ("re-mapped", "as is"):
            place(llm.engine, WAYS[name], window)
            key = f"{Path(llm.name).stem}, window {window}, {name}"
            if key not in chats:
                print(key, flush=True)
                chats[key] = talk(llm, name, texts, window)
                write("endurance", known)
    if reading:
        lines = {name: ([(n + 1) * BLOCK for n in way["blocks"]], way["nll"]) for name, way in reading.items()}
        title = f"A book in {known['slots']:,} slots ({known['model']})"
        plot("endurance", title, "tokens read", f"NLL of {BLOCK:,}", lines)


if __name__ == "__main__":
    main()
