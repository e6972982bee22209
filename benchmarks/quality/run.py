"""Answer quality of cache policies at equal bytes: documents, chats, needles, summaries.

    python benchmarks/quality/run.py --data FILE.jsonl... [--model M] [--policies A,B] [--budgets 512 1024 10%]

Each (policy, budget, setting, document) is measured once and appended to results/quality-MODEL.jsonl; a restart
continues where it was. Afterwards (or with --report alone) the summary, the intervals and the plots are made from it.

Settings: `unknown`, the document is read before any question is asked; `known`, each question is read with its
document, and follow-up questions come afterwards (`followup`). Chats (`messages`) are read message by message. Records
with a `prompt` are continued (`summary`). `--needles FILE` hides secret codes in excerpts of a text.

NLL: mean negative log-likelihood per token of the gold answer. Exact: greedy decoding gives the gold answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import RESULTS
from benchmarks.policies import POLICIES
from benchmarks.quality.evaluator import Budget, Evaluator
from benchmarks.quality.report import report
from benchmarks.quality.tasks import item, load, needles, rephrased, summary
from zsmerge_llm import LLM
from zsmerge_llm.language.chat_template import ChatTemplate

DEFAULT = (
    "full,truncate,streaming,h2o,snapkv,pyramidkv,tova,keydiff,knorm,expected,cam,paper,zsmerge-uniform-budgets,"
    "value-weighted-mean"
)
REFERENCE = ["zsmerge-question", "zsmerge-layer-budgets", "zsmerge-uniform-budgets"]
Cell = tuple[str, str, str, str, str, int]
UNBOUNDED = "full"


def cell(line: dict[str, Any]) -> Cell:
    """Return the key of what is measured at once, and skipped once it is there."""
    setting = "known" if line["setting"] == "followup" else line["setting"]
    return line["policy"], line["budget"], setting, line["task"], line["item"], line["asked"]


def done(path: Path) -> set[Cell]:
    """Return the cells of a file of measured lines; a torn last line is removed."""
    if not path.exists():
        return set()
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]), encoding="utf-8")
        lines.pop()
    return {cell(json.loads(line)) for line in lines}


def records(arguments: argparse.Namespace, evaluator: Evaluator) -> Iterator[dict[str, Any]]:
    loaded = load(arguments.data, arguments.documents, arguments.join)
    yield from loaded if arguments.rephrased is None else rephrased(loaded, Path(arguments.rephrased))
    if arguments.needles:
        yield from needles(
            Path(arguments.needles), evaluator.template, arguments.documents or 6, arguments.needle_tokens
        )


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Measure what is missing and append it, one cell at a time."""
    llm = LLM(arguments.model)
    evaluator = Evaluator(llm.engine, ChatTemplate(llm.tokenizer), rouge=not arguments.no_rouge)
    finished = done(path)
    for record in records(arguments, evaluator):
        plain = "prompt" in record
        read = summary(evaluator.template, record) if plain else item(evaluator.template, record, arguments.questions)
        for setting in ["summary"] if plain else arguments.settings:
            for name in arguments.policies.split(","):
                for budget in arguments.budgets:
                    label = UNBOUNDED if name == "full" else str(budget)
                    key = (name, label, setting, read.task, read.id, len(read.questions))
                    if key in finished:
                        continue
                    rows = list(getattr(evaluator, setting)(POLICIES[name], budget, read))
                    with path.open("a", encoding="utf-8") as file:
                        fields = dict(zip(("policy", "budget", "setting", "task", "item", "asked"), key, strict=True))
                        file.writelines(json.dumps({**fields, **row}) + "\n" for row in rows)
                    finished.add(key)
                    mean = sum(row["nll"] for row in rows) / len(rows)
                    print(*key, f"n={len(rows)} NLL {mean:.2f} {rows[0]['seconds']:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", nargs="*", default=[], help="JSON lines")
    parser.add_argument(
        "--rephrased", help="JSON: document → question's number → the question in other words (asks only those)"
    )
    parser.add_argument("--needles", help="a long text to hide secret codes in")
    parser.add_argument("--needle-tokens", type=int, default=4000)
    parser.add_argument("--policies", default=DEFAULT, help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--budgets", nargs="*", type=Budget.parse, default=[Budget(512)], help="slots, or percent")
    parser.add_argument("--settings", nargs="*", default=["unknown"], choices=["unknown", "known"])
    parser.add_argument("--documents", type=int, help="of each file (default: all)")
    parser.add_argument("--join", type=int, default=1, help="documents of a file that become one")
    parser.add_argument("--questions", type=int, default=24, help="of each document, spread over it")
    parser.add_argument(
        "--reference", nargs="*", default=REFERENCE, help="compare with the first of these that a table has"
    )
    parser.add_argument("--no-rouge", action="store_true", help="score the references of summaries, generate none")
    parser.add_argument("--name", help="of the results (default: the model's)")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    name = f"quality-{arguments.name or Path(arguments.model).name.removesuffix('.gguf')}"
    path = RESULTS / f"{name}.jsonl"
    if not arguments.report:
        measure(arguments, path)
    print(report(path, arguments.reference, Path(arguments.model).stem))


if __name__ == "__main__":
    main()
