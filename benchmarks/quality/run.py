"""Answer quality at equal bytes: one command for each suite.

    python benchmarks/quality/run.py SUITE [--model M] [--contenders A,B] [--budgets 512 1024 10%] [--lengths 4096 8192]

Suites: `ruler`, `scbench`, `structured`, `updates` and `agents` are generated at each length; `locomo` has dialogues up
to each length as documents; `beam` and `prefeval` are conversations. They are made from the folder that `--folder` or
ZSMERGE_EVALUATION_DATA names (`sources`). `files` takes documents, chats and prompts of any JSON lines (`--data
FILE.jsonl...`), and hides needles in a text (`--needles FILE`).

Each (contender, budget, setting, item) is measured once and appended to results/NAME.jsonl; a restart continues where
it was. Afterwards (or with --report alone) the tables with their intervals are made from it (`report`, `suite_report`).

Settings: `unknown`, the text is read before any question is asked; `turns`, the same, and each question comes behind
the others; `known`, each question is read with its document, and follow-up questions come afterwards (`followup`).
Chats are read message by message. Records with a `prompt` are continued (`summary`).

NLL: mean negative log-likelihood per token of the gold answer. Exact: greedy decoding gives the gold answer. Score: how
right the greedy answer is (`answers.METRICS`), or whether the right option is the likeliest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import RESULTS
from benchmarks.policies import POLICIES
from benchmarks.quality import agents, dialogues, locomo, ruler, scbench, structured_documents, suite_report, updates
from benchmarks.quality.contenders import contenders
from benchmarks.quality.evaluator import Budget, Evaluator
from benchmarks.quality.report import report
from benchmarks.quality.sources import Record, Sources
from benchmarks.quality.tasks import item, load, needles, rephrased, summary
from zsmerge_llm import LLM
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.passage_search import DEFAULT_TOKENS

FILES = (
    "full,truncate,streaming,h2o,snapkv,pyramidkv,tova,keydiff,knorm,expected,cam,paper,zsmerge-uniform-budgets,"
    "value-weighted-mean"
)
SUITE = "full,bm25,truncate-retrieval,ours"
AGENTS = "full,bm25,truncate,streaming-look-up,ours-cache-alone,ours"
REFERENCE = ["zsmerge-question", "zsmerge-layer-budgets", "zsmerge-uniform-budgets"]
SUITES = ("files", "ruler", "scbench", "structured", "updates", "agents", "locomo", "beam", "prefeval")
TASKS = {"ruler": ruler, "scbench": scbench, "structured": structured_documents, "updates": updates}
GENERATED = (*TASKS, "agents")
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


def records(arguments: argparse.Namespace, template: ChatTemplate) -> tuple[int | None, Iterable[Record]]:
    """Return how many records a suite has (None: not known), and the records, which are made one after another."""
    if arguments.suite == "files":
        loaded = load(arguments.data, arguments.documents, arguments.join)
        found = loaded if arguments.rephrased is None else rephrased(loaded, Path(arguments.rephrased))
        if not arguments.needles:
            return None, found
        hidden = (Path(arguments.needles), template, arguments.documents or 6, arguments.needle_tokens)
        return None, chain(found, needles(*hidden))
    sources = Sources.at(arguments.folder, lambda text: len(template.encode_text(text)))
    if arguments.suite == "beam":
        made = dialogues.beam(sources, arguments.most_messages, arguments.kinds)
        return None, islice(made, arguments.documents)
    if arguments.suite == "prefeval":
        count, together = arguments.documents or 100, arguments.together
        total = len(arguments.between) * -(-count // together)
        return total, dialogues.preferences(sources, arguments.between, count, together)
    if arguments.suite == "agents":
        count = arguments.documents or 8
        return len(arguments.lengths) * count * len(agents.FILES), agents.records(sources, arguments.lengths, count)
    if arguments.suite == "locomo":
        count = arguments.documents or 10
        return len(arguments.lengths) * count, locomo.records(sources, arguments.lengths, count)
    suite: Any = TASKS[arguments.suite]
    tasks = arguments.tasks.split(",") if arguments.tasks else tuple(suite.TASKS)
    texts = arguments.documents or 8
    made = suite.records(sources, arguments.lengths, texts, arguments.questions or 4, tasks=tasks)
    return len(arguments.lengths) * texts * len(tasks), made


def measure(arguments: argparse.Namespace, path: Path) -> None:
    """Measure what is missing and append it, one cell at a time."""
    llm = LLM(arguments.model, compile=False)
    evaluator = Evaluator(llm.engine, ChatTemplate(llm.tokenizer), rouge=not arguments.no_rouge)
    known, finished, first = contenders(evaluator, arguments.retrieval_tokens), done(path), 0
    started = time.monotonic()
    total, made = records(arguments, evaluator.template)
    for number, record in enumerate(made, start=1):
        plain, most = "prompt" in record, arguments.questions or (24 if arguments.suite == "files" else 1000)
        read = summary(evaluator.template, record) if plain else item(evaluator.template, record, most)
        for setting in ["summary"] if plain else arguments.settings:
            for name in arguments.contenders.split(","):
                for budget in arguments.budgets:
                    label = UNBOUNDED if name == "full" else str(budget)
                    key = (name, label, setting, read.task, read.id, len(read.questions))
                    if key in finished:
                        continue
                    finished.add(key)
                    first, started = (first, started) if first else (number, time.monotonic())
                    rows = list(getattr(known[name], setting)(budget, read))
                    append(path, key, {"kind": record["task"]} if arguments.suite in GENERATED else {}, rows)
                    print(progress(number, total, first, started), *key, *figures(rows), flush=True)


def append(path: Path, key: Cell, fields: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Append a cell's lines."""
    own = dict(zip(("policy", "budget", "setting", "task", "item", "asked"), key, strict=True))
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**own, **fields, **row}) + "\n" for row in rows)


def progress(number: int, total: int | None, first: int, started: float) -> str:
    """Return how much is done, and how long the rest takes at the pace since the record `first`."""
    if total is None:
        return f"[{number}]"
    pace = (time.monotonic() - started) / (number - first + 1)
    return f"[{number}/{total}, {pace * (total - number) / 60:.0f} min left]"


def figures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a cell's figures as text."""
    means = {name: [row[name] for row in rows if name in row] for name in ("nll", "score")}
    shown = [f"{name} {sum(values) / len(values):.2f}" for name, values in means.items() if values]
    return [f"n={len(rows)}", *shown, f"{rows[0]['seconds']:.0f} s"]


def tokens(text: str) -> int | str:
    """Parse a number of tokens, or the name of a rule for it."""
    return int(text) if text.isdigit() else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", nargs="?", default="files", choices=SUITES)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--contenders", "--policies", help=f"of bm25, ours, ours-cache-alone, {', '.join(POLICIES)}")
    parser.add_argument("--budgets", nargs="*", type=Budget.parse, default=[Budget(512)], help="slots, or percent")
    parser.add_argument("--settings", nargs="*", default=["unknown"], choices=["unknown", "turns", "known"])
    parser.add_argument("--documents", type=int, help="of each file, or of each task and length (default: all, or 8)")
    parser.add_argument("--questions", type=int, help="of each document, spread over it (default: 24; generated: 4)")
    parser.add_argument("--name", help="of the results (default: the suite's and the model's)")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    suites = parser.add_argument_group("suites")
    suites.add_argument("--folder", help="with the evaluation data (default: ZSMERGE_EVALUATION_DATA)")
    suites.add_argument(
        "--lengths", nargs="*", type=int, default=[4096], help="tokens of generated texts, of dialogues at most"
    )
    suites.add_argument("--tasks", help="of a generated suite (default: all)")
    suites.add_argument("--between", nargs="*", type=int, default=[2, 10, 30, 70], help="turns behind a preference")
    suites.add_argument(
        "--retrieval-tokens", type=tokens, default=DEFAULT_TOKENS, help="of `ours`, as for `LLM` (default: its own)"
    )
    suites.add_argument("--together", type=int, default=1, help="preferences that one conversation begins with")
    suites.add_argument("--most-messages", type=int, help="of each BEAM conversation, its first ones (default: all)")
    suites.add_argument("--kinds", nargs="*", help="of BEAM's questions, such as abstention (default: all)")
    files = parser.add_argument_group("files")
    files.add_argument("--data", nargs="*", default=[], help="JSON lines")
    files.add_argument(
        "--rephrased", help="JSON: document → question's number → the question in other words (asks only those)"
    )
    files.add_argument("--needles", help="a long text to hide secret codes in")
    files.add_argument("--needle-tokens", type=int, default=4000)
    files.add_argument("--join", type=int, default=1, help="documents of a file that become one")
    files.add_argument("--reference", nargs="*", default=REFERENCE, help="compare with the first that a table has")
    files.add_argument("--no-rouge", action="store_true", help="score the references of summaries, generate none")
    arguments = parser.parse_args()
    generic = arguments.suite == "files"
    arguments.contenders = arguments.contenders or {"files": FILES, "agents": AGENTS}.get(arguments.suite, SUITE)
    RESULTS.mkdir(exist_ok=True)
    model = Path(arguments.model).name.removesuffix(".gguf")
    name = arguments.name or (model if generic else f"{arguments.suite}-{model}")
    path = RESULTS / f"{'quality' if generic else 'suite'}-{name}.jsonl"
    if not arguments.report:
        measure(arguments, path)
    print(report(path, arguments.reference, model) if generic else suite_report.report(path, model))


if __name__ == "__main__":
    main()
