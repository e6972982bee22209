"""Endurance: a book read far beyond the trained window in a cache of constant size, and chats that continue beyond it.

    python benchmarks/sessions/endurance.py --text BOOK [--model smollm2] [--tokens 65536] [--slots 1024] [--only NAME]

For every layout of positions: mean NLL of each block of 4,096 tokens, and a text generated at the end. `new cache` is
what the text itself costs: some blocks, each in a new cache after the 3,072 tokens before it. Then three chats: facts
and instructions in the system message, turns until the window is long passed, and how many answers follow it. What the
result file has already is not measured again. Writes results/endurance-MODEL.json and .png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import RESULTS, long_text, plot, provenance, write
from zsmerge_llm import LLM, CacheConfig, SamplingParams
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.engine.position_remapping import PositionRemapper, RemapLayout
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.grammar import Grammar

BLOCK, CONTEXT, FRESH_BLOCKS = 4096, 3072, (1, 15, 7, 11, 3)
LAYOUTS: dict[str, RemapLayout | None] = {
    "growing positions": None,
    "remapped": RemapLayout(),
    "remapped, to a quarter": RemapLayout(squeeze=0.25),
    "remapped, evenly": RemapLayout(segments=1),
    "remapped, near 1/16": RemapLayout(near=0.0625),
    "remapped, near 1/2": RemapLayout(near=0.5),
}
FRESH = "new cache"
ASSISTANTS = {
    "shop": (
        "You are the assistant of the shop Miller & Sons. The phone number of the shop is 5512. Whenever somebody asks "
        "for the manager, say that the manager is Mr. Finch.",
        {
            "What is the phone number of the shop?": "5512",
            "What is the name of the shop?": "miller",
            "What is the manager's name?": "finch",
            "Who is the manager?": "finch",
        },
    ),
    "library": (
        "You are Marvin, the helper of the public library of Eastbrook. The library opens at nine. A lost book costs "
        "30 dollars. Always address the reader as Captain.",
        {
            "When does the library open?": "nine",
            "What does a lost book cost?": "30",
            "What is your name?": "marvin",
            "Good morning!": "captain",
            "In which town is the library?": "eastbrook",
        },
    ),
    "hotel": (
        "You answer the questions of guests of the Hotel Aurora. The password of the wireless network is bluefish. "
        "Breakfast is served in the Garden Room. If somebody asks for a doctor, send them to Dr. Keller.",
        {
            "What is the password of the wireless network?": "bluefish",
            "Where is breakfast served?": "garden",
            "I need a doctor. Whom should I see?": "keller",
            "What is the name of the hotel?": "aurora",
        },
    ),
}
"""A chat's system message, and for questions about it the word that a right answer has."""
ASK_AFTER = (1, 4, 8, 16, 32, 48)
"""Turns after which the questions are asked, beside the last."""


def use_layout(engine: Engine, layout: RemapLayout | None) -> None:
    """Remap positions by a layout; None: never remap."""
    window = engine.context_window if layout else None
    engine.runner.remapper = PositionRemapper(engine.model, engine.specs, window, layout)


def block_nll(engine: Engine, cache: Cache, ids: list[int]) -> float:
    nll = float(-engine.logprobs(cache, ids).mean())
    print(round(nll, 4), end=" ", flush=True)
    return nll


def read_on(llm: LLM, ids: list[int]) -> dict[str, Any]:
    """Return the NLL by block of one long prefill, and what the model generates after it."""
    engine = llm.engine
    cache = engine.new_cache()
    by_block = [block_nll(engine, cache, ids[start : start + BLOCK]) for start in range(0, len(ids), BLOCK)]
    generated = list(engine.decode(cache, [SamplingParams(max_tokens=120, ignore_eos=True)], [[]]))
    text = llm.tokenizer.decode([token for (token,) in generated])
    return {
        "blocks": list(range(len(by_block))),
        "nll": by_block,
        "generated": text,
        "bytes": cache.nbytes,
        "segments": len(cache.position_maps[0].knots),
    }


def read_fresh(llm: LLM, ids: list[int]) -> dict[str, Any]:
    """Return the NLL of some blocks, each in a new cache after a short context: what the text itself costs there."""
    engine, by_block = llm.engine, {}
    for block in FRESH_BLOCKS:
        start, cache = block * BLOCK, engine.new_cache()
        engine.read(cache, ids[start - CONTEXT : start])
        by_block[block] = block_nll(engine, cache, ids[start : start + BLOCK])
    return {"blocks": sorted(by_block), "nll": [by_block[block] for block in sorted(by_block)]}


def chat(llm: LLM, system: str, questions: dict[str, str], text: list[str]) -> list[dict[str, Any]]:
    """Run a chat whose turns bring a passage each, answered by "OK."; return answers about its system message.

    Questions are asked on a branch, so that no answer of its own tells the model later.
    """
    messages, found = [{"role": "system", "content": system}], []
    short = SamplingParams(max_tokens=24)
    for turn, passage in enumerate(text, start=1):
        messages.append({"role": "user", "content": f"Here is a passage.\n\n{passage}\n\nSay OK."})
        answer = llm.chat(messages, session="book", sampling=short, grammar=Grammar.choice("OK."))
        messages.append({"role": "assistant", "content": answer.text})
        if turn not in ASK_AFTER and turn < len(text):
            continue
        asked = {q: llm.chat([*messages, {"role": "user", "content": q}], sampling=short) for q in questions}
        answers = {q: answer.text for q, answer in asked.items()}
        right = sum(word in answers[question].lower() for question, word in questions.items())
        read = [answer.usage.prompt_tokens - answer.usage.cached_tokens for answer in asked.values()]
        found.append({"tokens": llm.session("book").cache.seen, "right": right, "read": read, "answers": answers})
        print(found[-1], flush=True)
    return found


def split_passages(llm: LLM, text: str, size: int, count: int) -> list[str]:
    ids = llm.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [llm.tokenizer.decode(ids[at * size : (at + 1) * size]) for at in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", help="a long text file")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--only", nargs="*", default=[FRESH, *LAYOUTS, "chat"], help="what to measure")
    parser.add_argument("--passage", type=int, default=1000, help="tokens of the passage in each turn (chat)")
    parser.add_argument("--retrieval-tokens", type=int, default=256, help="passage tokens read again at most (chat)")
    arguments = parser.parse_args()
    name = f"endurance-{Path(arguments.model).stem}"
    path = RESULTS / f"{name}.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for key in provenance():
        known.pop(key, None)
    reading, chats = known.setdefault("reading", {}), known.setdefault("chats", {})
    llm = LLM(arguments.model, cache=CacheConfig(slots=arguments.slots), retrieval_tokens=arguments.retrieval_tokens)
    if set(arguments.only) != {"chat"}:
        known.update({"block": BLOCK, "slots": arguments.slots, "model": Path(llm.name).stem})
    ids = llm.tokenizer(long_text(arguments.text), add_special_tokens=False, verbose=False).input_ids[
        : arguments.tokens
    ]
    for way in (FRESH, *LAYOUTS):
        if way in arguments.only and way not in reading:
            print(way, flush=True)
            use_layout(llm.engine, LAYOUTS.get(way))
            reading[way] = read_fresh(llm, ids) if way == FRESH else read_on(llm, ids)
            write(name, known)
    use_layout(llm.engine, RemapLayout())
    texts = split_passages(llm, long_text(arguments.text), arguments.passage, arguments.tokens // arguments.passage)
    retrieval = f"{arguments.retrieval_tokens} retrieval tokens"
    for assistant, (system, questions) in ASSISTANTS.items():
        key = f"{Path(llm.name).stem}, {assistant}, {arguments.tokens} tokens, {retrieval}"
        if "chat" in arguments.only and key not in chats:
            asked = chat(llm, system, questions, texts)
            chats[key] = {"slots": arguments.slots, "questions": len(questions), "asked": asked}
            write(name, known)
    if reading:
        lines = {way: ([(n + 1) * BLOCK for n in row["blocks"]], row["nll"]) for way, row in reading.items()}
        title = f"A book in {known['slots']:,} slots ({known['model']})"
        plot(name, title, "tokens read", f"NLL of {BLOCK:,}", lines)


if __name__ == "__main__":
    main()
