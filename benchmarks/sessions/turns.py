"""A long chat: time to the first token and memory, turn by turn, beside transformers reading the history again.

    python benchmarks/sessions/turns.py [--model smollm2] [--turns 100]

The same user messages go to both; each keeps its own answers (of a fixed number of tokens). transformers gets the whole
message list each turn, as a stateless server does, with its own full cache. Writes results/turns-MODEL.json and .png.
Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.common import plot, write
from zsmerge_llm import LLM, CacheConfig, SamplingParams

TOPICS = ("the sea", "old maps", "bread", "winter", "a small railway", "bees", "a lighthouse", "rivers", "tea", "chess")
ANSWER = 12


def question(turn: int) -> str:
    """Return user messages of nearly the same length, all different."""
    return f"Message {turn:03d}. In one sentence, tell me something about {TOPICS[turn % len(TOPICS)]}."


def rss() -> int:
    """Return the resident bytes of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def zsmerge_turns(llm: LLM, turns: int) -> list[dict[str, float]]:
    """Return time to the first token, tokens read and memory at each turn."""
    messages: list[dict[str, object]] = []
    rows = []
    params = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
    for turn in range(1, turns + 1):
        messages.append({"role": "user", "content": question(turn)})
        started, first, text = time.perf_counter(), None, ""
        for chunk in llm.stream(messages, sampling=params, session="bench"):
            if first is None:
                first = time.perf_counter() - started
            text += chunk.text
        usage = chunk.usage
        assert usage is not None
        assert first is not None
        messages.append({"role": "assistant", "content": text})
        rows.append(
            {
                "turn": turn,
                "first_token_seconds": first,
                "read_tokens": usage.prompt_tokens - usage.cached_tokens,
                "prompt_tokens": usage.prompt_tokens,
                "cache_bytes": usage.cache_bytes,
                "rss": rss(),
            }
        )
    return rows


@torch.inference_mode()
def transformers_turns(llm: LLM, turns: list[int]) -> list[dict[str, float]]:
    """Return transformers' time to the first token at some turns, with prefill of the whole history each time."""
    model, tokenizer, rows = llm.engine.model, llm.tokenizer, []
    model.set_attn_implementation("sdpa")
    filler = tokenizer.decode(tokenizer("Here is one sentence about it, told plainly. " * 5).input_ids[:ANSWER])
    for turn in turns:
        messages = []
        for past in range(1, turn):
            messages += [
                {"role": "user", "content": question(past)},
                {"role": "assistant", "content": filler},
            ]
        messages.append({"role": "user", "content": question(turn)})
        times = []
        for _ in range(3):
            started = time.perf_counter()
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            last = torch.tensor([ids.shape[1] - 1])  # given as a number it makes torch copy the whole output matrix
            model(ids, use_cache=True, logits_to_keep=last).logits.argmax().item()
            times.append(time.perf_counter() - started)
        rows.append({"turn": turn, "first_token_seconds": sorted(times)[1], "prompt_tokens": ids.shape[1]})
    model.set_attn_implementation("zsmerge")
    return rows


def around(rows: list[dict[str, float]], turn: int, key: str) -> float:
    """Return the median over the five turns around `turn`."""
    near = sorted(row[key] for row in rows if abs(row["turn"] - turn) <= 2)
    return near[len(near) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--turns", type=int, default=100)
    parser.add_argument("--slots", type=int, default=1024)
    arguments = parser.parse_args()
    llm = LLM(arguments.model, cache=CacheConfig(slots=arguments.slots))
    llm.chat("Hello.", sampling=SamplingParams(max_tokens=4))
    rows = zsmerge_turns(llm, arguments.turns)
    middle, last = min(50, arguments.turns), arguments.turns
    theirs = transformers_turns(llm, sorted({5, 10, 25, middle, last} & set(range(1, last + 1))))
    at = {int(row["turn"]): row for row in theirs}
    summary = {
        "first_token_turn_5": around(rows, 5, "first_token_seconds"),
        f"first_token_turn_{last}": around(rows, last - 2, "first_token_seconds"),
        "late_over_early": around(rows, last - 2, "first_token_seconds") / around(rows, 5, "first_token_seconds"),
        "cache_bytes_equal": len({row["cache_bytes"] for row in rows}) == 1,
        "rss_growth_mb_after_turn_20": (rows[-1]["rss"] - rows[min(19, last - 1)]["rss"]) / 1e6,
        f"transformers_over_zsmerge_turn_{middle}": at[middle]["first_token_seconds"]
        / around(rows, middle, "first_token_seconds"),
        f"transformers_over_zsmerge_turn_{last}": at[last]["first_token_seconds"]
        / around(rows, last - 2, "first_token_seconds"),
    }
    print(json.dumps(summary, indent=1))
    name = f"turns-{Path(arguments.model).stem}"
    write(name, {"model": Path(arguments.model).stem, "summary": summary, "zsmerge": rows, "transformers": theirs})
    series = {
        "transformers, re-reading the chat": (
            [row["turn"] for row in theirs],
            [row["first_token_seconds"] for row in theirs],
        ),
        f"zsmerge, {arguments.slots:,} slots": (
            [row["turn"] for row in rows],
            [row["first_token_seconds"] for row in rows],
        ),
    }
    plot(name, f"A chat with {Path(arguments.model).stem}", "turn", "seconds to the first token", series)


if __name__ == "__main__":
    main()
