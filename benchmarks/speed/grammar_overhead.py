"""Grammar-constrained decoding: cost per token as a share of a decode step.

    python benchmarks/speed/grammar_overhead.py [--model smollm2] [--tokens 256] [--answers 4]

Counted are masks, state updates and forced tokens. `to begin` is the cost once per answer: compiling, and a plan for
ending within `max_tokens`. Where no such plan exists the search for one takes up to half a second.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import write
from zsmerge_llm import LLM, Grammar, SamplingParams
from zsmerge_llm.language.grammar import GrammarCompiler, GrammarConstraint

PEOPLE = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 20},
        "people": {
            "type": "array",
            "minItems": 2,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 8},
                    "age": {"type": "integer", "minimum": 0, "maximum": 120},
                    "role": {"enum": ["captain", "mate", "cook", "keeper"]},
                    "address": {"anyOf": [{"type": "string", "minLength": 12}, {"type": "null"}]},
                },
                "required": ["name", "age", "role", "address"],
            },
        },
    },
    "required": ["title", "people"],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "json schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "crew", "schema": PEOPLE}}},
    "free text with tools": {"tools": [TOOL]},
    "regular expression": {"grammar": Grammar.regex(r"([A-Z][a-z]+ ){20,200}")},
}


class Meter:
    """Adds up the seconds spent in methods."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.depth = 0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*given: Any) -> Any:
            self.depth += 1
            started = time.perf_counter()
            try:
                return function(*given)
            finally:
                self.depth -= 1
                if not self.depth:  # one method may call another
                    self.seconds += time.perf_counter() - started

        return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--answers", type=int, default=4)
    given = parser.parse_args()
    llm = LLM(given.model)
    llm.warm_up()
    per_token, begin = Meter(), Meter()
    for name in ("mask", "accept", "forced"):
        setattr(GrammarConstraint, name, per_token.timed(getattr(GrammarConstraint, name)))
    GrammarCompiler.constraint = begin.timed(GrammarCompiler.constraint)  # type: ignore[method-assign]
    question = "Write a long story about the crew of a ship."
    plain = llm.chat(question, sampling=SamplingParams(max_tokens=given.tokens, ignore_eos=True)).usage
    step = plain.decode_seconds / plain.completion_tokens
    print(f"a decode step without a grammar: {1000 * step:.1f} ms")
    result: dict[str, Any] = {"model": llm.name, "step_ms": 1000 * step}
    for name, options in GRAMMARS.items():
        shares, firsts, tokens = [], [], 0
        for _ in range(given.answers):
            per_token.seconds = begin.seconds = 0.0
            usage = llm.chat(question, sampling=SamplingParams(max_tokens=given.tokens), **options).usage
            shares.append(per_token.seconds / usage.completion_tokens / step)
            firsts.append(begin.seconds)
            tokens = usage.completion_tokens
        share = statistics.median(shares)
        result[name] = {"share": share, "tokens": tokens, "begin_ms": [1000 * first for first in firsts]}
        print(
            f"{name}: {1000 * share * step:.2f} ms per token of {tokens}, {100 * share:.1f} % of a step; "
            f"to begin, first {1000 * firsts[0]:.0f} ms, then {1000 * statistics.median(firsts[1:]):.1f} ms"
        )
    print(write(f"grammar-overhead-{llm.name}", result))


if __name__ == "__main__":
    main()
