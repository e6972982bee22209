"""Many conversations at once: gaps between tokens, tokens/s in all, fairness, and answers against one at a time.

    python benchmarks/sessions/many_conversations.py [--model smollm2] [--conversations 16] [--minutes 10]

Each conversation is a thread that waits a random time, asks, reads the stream, and asks on. Some questions bring a text
of 1,500 tokens, whose reading is interleaved with the answers of the others. Every answer is compared with that of the
same conversation alone, on another object. `fairness` is tokens/s of the slowest conversation over the fastest, each
measured while it streams.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import TEXTS, provenance, write
from zsmerge_llm import LLM, CacheConfig, SamplingParams, SchedulingConfig

QUESTIONS = ("Name a tree and say why you like it.", "And a river?", "What would a child ask next?", "Sum it up.")
TEXT_TOKENS = 1500
SAMPLING = SamplingParams(max_tokens=48, ignore_eos=True)


@dataclass
class Conversation:
    """What one thread asked and got."""

    number: int
    messages: list[dict[str, Any]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    tokens: int = 0
    stream_seconds: float = 0.0


def question(number: int, turn: int, text: str) -> str:
    """Return a conversation's question: every fourth one brings a text."""
    asked = f"({number}) {QUESTIONS[(number + turn) % len(QUESTIONS)]}"
    return f"{text}\n\n{asked}" if (number + turn) % 4 == 0 else asked


def run(llm: LLM, conversation: Conversation, text: str, until: float, mean_pause: float) -> None:
    """Hold a conversation until the time is up, with random pauses."""
    chance = random.Random(conversation.number)
    while time.monotonic() < until:
        time.sleep(chance.expovariate(1 / mean_pause))
        turn = len(conversation.answers)
        conversation.messages.append({"role": "user", "content": question(conversation.number, turn, text)})
        stamps = [time.perf_counter()]
        pieces = []
        for chunk in llm.stream(conversation.messages, sampling=SAMPLING):
            if chunk.finish_reason is None:
                stamps.append(time.perf_counter())
            if chunk.usage is not None:
                conversation.reused.append(chunk.usage.reuse)
            pieces.append(chunk.text)
        answer = "".join(pieces)
        conversation.first_token.append(stamps[1] - stamps[0])
        conversation.gaps += [later - earlier for earlier, later in itertools.pairwise(stamps[1:])]
        conversation.tokens += SAMPLING.max_tokens or 0
        conversation.stream_seconds += stamps[-1] - stamps[1]
        conversation.answers.append(answer)
        conversation.messages.append({"role": "assistant", "content": answer})


def wrong_answers(llm: LLM, conversations: list[Conversation]) -> tuple[list[str], int]:
    """Ask the same conversations one at a time: (the first answer of each that differs, answers).

    What follows a different answer is another conversation and is not asked.
    """
    wrong, total = [], 0
    for conversation in conversations:
        for at, answer in enumerate(conversation.answers):
            result = llm.chat(conversation.messages[: 2 * at + 1], sampling=SAMPLING)
            total += 1
            if result.text != answer:
                how = f"{conversation.reused[at]}; alone {result.usage.reuse}"
                wrong.append(f"conversation {conversation.number}, turn {at + 1} ({how})")
                break
    return wrong, total


def main() -> None:
    """Run the conversations and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--slots", type=int, default=1024)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--reading-share", type=float, default=0.5)
    parser.add_argument("--mean-pause", type=float, default=4.0, help="seconds between an answer and the next question")
    options = parser.parse_args()
    settings = {"dtype": options.dtype, "compile": True, "chunk": options.chunk, "retrieval_tokens": 0}
    llm = LLM(
        options.model,
        cache=CacheConfig(slots=options.slots),
        scheduling=SchedulingConfig(reading_share=options.reading_share),
        **settings,
    )
    ids = llm.tokenizer.encode(next(TEXTS.glob("*.txt")).read_text(encoding="utf-8"))[:TEXT_TOKENS]
    text = llm.tokenizer.decode(ids)
    llm.chat("Hello", sampling=SAMPLING)
    cache, started = llm.engine.new_cache(), time.perf_counter()
    llm.engine.read(cache, (ids * 4)[: options.chunk])
    chunk_seconds = time.perf_counter() - started

    conversations = [Conversation(number) for number in range(options.conversations)]
    began = time.monotonic()
    until = began + 60 * options.minutes
    arguments = [(llm, each, text, until, options.mean_pause) for each in conversations]
    threads = [threading.Thread(target=run, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began

    gaps = sorted(gap for each in conversations for gap in each.gaps)
    firsts = sorted(wait for each in conversations for wait in each.first_token)
    rates = [(each.tokens - len(each.answers)) / each.stream_seconds for each in conversations]
    alone = LLM(options.model, cache=CacheConfig(slots=options.slots), **settings)
    wrong, total = wrong_answers(alone, conversations)
    result = {
        **{name: getattr(options, name) for name in ("model", "dtype", "conversations", "minutes", "slots", "chunk")},
        "reading_share": options.reading_share,
        "chunk_seconds_alone": round(chunk_seconds, 3),
        "tokens_per_second": round(sum(each.tokens for each in conversations) / seconds, 1),
        "gap_seconds": {
            "median": round(statistics.median(gaps), 4),
            "99 %": round(gaps[int(len(gaps) * 0.99)], 3),
            "worst": round(gaps[-1], 3),
        },
        "first_token_seconds": {"median": round(statistics.median(firsts), 3), "worst": round(firsts[-1], 3)},
        "fairness": round(min(rates) / max(rates), 3),
        "answers": sum(len(each.answers) for each in conversations),
        "answers_compared": total,
        "turns_read_again": sum(not how.startswith("continued") for each in conversations for how in each.reused[1:]),
        "answers_that_differ_from_one_at_a_time": wrong,
    }
    for name, value in {**provenance(), **result}.items():
        print(f"{name}: {value}")
    print(write(f"many-conversations-{Path(options.model).name}-{options.dtype}", result))


if __name__ == "__main__":
    main()
