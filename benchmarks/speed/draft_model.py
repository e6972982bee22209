"""Whether a small model that drafts for a larger one could pay: costs and acceptance, and the speed-up they allow.

    python benchmarks/speed/draft_model.py --target TARGET.gguf --draft DRAFT.gguf [--quantization int4]

Greedy answers of the target to ten prompts, code and prose. What the draft model would have said at each of their
tokens tells exactly how many tokens of a draft are accepted. Costs: a decode step of both models, and a pass of the
target over 2 to 9 tokens. A cycle of k drafted tokens costs k steps of the draft model and a pass over k + 1 tokens; it
yields those accepted and one more. What a real implementation adds, such as reading accepted tokens into the draft
model's cache, is left out: the speed-up is the best that can be had. The models run one after another, each in a
process of its own. Writes results/draft-model-FORMAT.json. Run it with nothing else running.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.common import long_text, write
from zsmerge_llm import LLM, SamplingParams

PROMPTS = {
    "code": (
        "Write a Python function that merges two sorted lists.",
        "Write a Python class for a bank account with deposit, withdraw and transfer, with type hints.",
        "Write an SQL query that lists the ten customers with the highest revenue of the last year.",
        "Write a bash script that renames all .jpeg files of a folder to .jpg.",
        "Write a JavaScript function that debounces another function, and explain it.",
    ),
    "prose": (
        "Explain in two paragraphs why the sky is blue.",
        "Write a short story about a lighthouse keeper who finds a letter.",
        "What are the advantages and disadvantages of living in a large city?",
        "Write a polite letter to a landlord about a broken heating.",
        "Summarise the causes of the First World War.",
    ),
}
ANSWER_TOKENS = 64
HISTORY = 256
WIDTHS = tuple(range(1, 10))
REPEATS = 15


def answers_of(llm: LLM) -> dict[str, list[dict[str, Any]]]:
    """Return the ids of each prompt and of its greedy answer."""
    found: dict[str, list[dict[str, Any]]] = {}
    for topic, prompts in PROMPTS.items():
        for prompt in prompts:
            message = [{"role": "user", "content": prompt}]
            ids = llm.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS)
            answer = list(llm.engine.stream(llm.engine.new_cache(), ids, params))
            found.setdefault(topic, []).append({"prompt": ids, "answer": answer})
    return found


def pass_seconds(llm: LLM, ids: list[int]) -> dict[int, float]:
    """Return the median seconds of a pass over so many tokens behind `ids`, the widths by turns.

    All in this thread, before the engine's own has run: idle OpenMP threads of another one would slow it down.
    """
    before = llm.engine.new_cache()
    llm.engine.runner.run(before, torch.tensor([ids]))
    times: dict[int, list[float]] = {width: [] for width in WIDTHS}
    for repeat in range(REPEATS + 1):
        for width in WIDTHS:
            cache, tokens = before.clone(), torch.tensor([ids[:width]])
            started = time.perf_counter()
            llm.engine.runner.run(cache, tokens, all_logits=True).argmax(-1).tolist()
            if repeat:  # the first is a warm-up
                times[width].append(time.perf_counter() - started)
    return {width: statistics.median(each) for width, each in times.items()}


def agreement(llm: LLM, prompt: list[int], answer: list[int]) -> list[bool]:
    """Return for each token of an answer whether it is what this model says there."""
    cache = llm.engine.new_cache()
    first = int(llm.engine.read(cache, prompt).argmax())
    logits = llm.engine.runner.run(cache, torch.tensor([answer]), all_logits=True)[0]
    return [said == token for said, token in zip([first, *logits.argmax(-1).tolist()], answer, strict=False)]


def accepted_per_cycle(matches: list[bool], width: int) -> tuple[int, int]:
    """Return the cycles that an answer takes with drafts of `width` tokens, and its tokens."""
    at = cycles = 0
    while at < len(matches):
        run = next((n for n in range(width) if at + n >= len(matches) or not matches[at + n]), width)
        at, cycles = at + run + 1, cycles + 1
    return cycles, len(matches)


def measure_model(path: str, quantization: str | None, answers: Path) -> dict[str, Any]:
    """Measure one model. answers: a file that holds the target's, or that is written by it."""
    llm = LLM(path, quantization=quantization, compile=False)
    passes = pass_seconds(llm, llm.tokenizer(long_text())["input_ids"][:HISTORY])
    is_target = not answers.is_file()
    if is_target:
        answers.write_text(json.dumps(answers_of(llm)))
    found = json.loads(answers.read_text())
    tensors = [*llm.engine.model.parameters(), *llm.engine.model.buffers()]
    result: dict[str, Any] = {
        "weights_bytes": sum(tensor.nbytes for tensor in tensors),
        "pass_seconds": passes,
    }
    if not is_target:
        result["matches"] = {
            topic: [agreement(llm, each["prompt"], each["answer"]) for each in entries]
            for topic, entries in found.items()
        }
    return result


def speed_ups(target: dict[str, Any], draft: dict[str, Any]) -> dict[str, Any]:
    """Return the best speed-up by topic and length of the draft: as measured, and if verifying cost no more than a step
    and a step of the draft model no more than its share of the weights."""
    verify = {int(width): seconds for width, seconds in target["pass_seconds"].items()}
    step, draft_step = verify[1], draft["pass_seconds"]["1"]
    share = draft["weights_bytes"] / target["weights_bytes"]
    result: dict[str, Any] = {}
    for topic, answers in {**draft["matches"], "all": [*itertools.chain(*draft["matches"].values())]}.items():
        for width in WIDTHS[:-1]:
            cycles, tokens = map(sum, zip(*(accepted_per_cycle(each, width) for each in answers), strict=True))
            per_cycle = tokens / cycles
            result.setdefault(topic, {})[width] = {
                "tokens a cycle": per_cycle,
                "speed-up": per_cycle * step / (width * draft_step + verify[width + 1]),
                "limit": per_cycle / (width * share + 1),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--one", choices=("target", "draft"), help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        path = getattr(arguments, arguments.one)
        print(json.dumps(measure_model(path, arguments.quantization, arguments.answers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        answers = ["--answers", str(Path(folder) / "answers.json")]
        command = [sys.executable, __file__, *sys.argv[1:], *answers]
        target, draft = (
            json.loads(subprocess.run([*command, "--one", which], check=True, stdout=subprocess.PIPE).stdout)
            for which in ("target", "draft")
        )
    matches = [*itertools.chain(*itertools.chain(*draft["matches"].values()))]
    result = {
        "model": f"{Path(arguments.draft).stem} for {Path(arguments.target).stem}",
        "format": arguments.quantization or "bf16",
        "agreement": sum(matches) / len(matches),
        "draft step over target step": draft["pass_seconds"]["1"] / target["pass_seconds"]["1"],
        "draft weights over target weights": draft["weights_bytes"] / target["weights_bytes"],
        "pass over step": {width: s / target["pass_seconds"]["1"] for width, s in target["pass_seconds"].items()},
        "target step, ms": 1000 * target["pass_seconds"]["1"],
        "drafts": speed_ups(target, draft),
    }
    print(json.dumps(result, indent=1))
    print(write(f"draft-model-{result['format']}", result))


if __name__ == "__main__":
    main()
