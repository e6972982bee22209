"""Tokens that the turns of a dialogue read whose last-but-one message keeps changing, as coding agents write it.

    python benchmarks/sessions/edited_dialogue.py [--turns 12]

Each request holds the dialogue so far, the newest text of a file, and the question. So it parts from the request before
where the file's text stood. A tiny random model is enough: what is read does not depend on its answers. Compared are
snapshots where requests part, and none of them. Writes results/edited-dialogue.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import write
from zsmerge_llm import CacheConfig, SamplingParams
from zsmerge_llm.testing import tiny_llm

SYSTEM = "You write Python code, and change as little as possible. " * 8
FILE = "def area(width, height):\n    return width * height\n" * 12
QUESTION = "Please change the function so that it checks its arguments, and say in one sentence why. "


def tokens_read(turns: int) -> tuple[list[int], list[int]]:
    """Return how many tokens each turn has read, and how many its prompt has."""
    llm = tiny_llm(cache=CacheConfig(slots=None))
    history: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    read, length = [], []
    for turn in range(turns):
        file = [{"role": "user", "content": f"{FILE}# {turn}"}, {"role": "assistant", "content": "Ok."}]
        question = {"role": "user", "content": f"{turn}. {QUESTION}"}
        result = llm.chat([*history, *file, question], sampling=SamplingParams(max_tokens=48, ignore_eos=True))
        history += [question, {"role": "assistant", "content": result.text}]
        length.append(result.usage.prompt_tokens)
        read.append(length[-1] - result.usage.cached_tokens)
    return read, length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12)
    turns = parser.parse_args().turns
    read, length = tokens_read(turns)
    with mock.patch("zsmerge_llm.sessions.conversations.branch_points", return_value=[]):
        before, _ = tokens_read(turns)
    result = {
        "turns": turns,
        "tokens of the last prompt": length[-1],
        "tokens of all prompts": sum(length),
        "read with snapshots where requests part": sum(read),
        "read without": sum(before),
        "read in the last turn with": read[-1],
        "read in the last turn without": before[-1],
    }
    print(result)
    print(write("edited-dialogue", result))


if __name__ == "__main__":
    main()
