"""Write the suites' figures into docs/quality.md, between its markers, from benchmarks/results/suite-*.json.

    python benchmarks/quality/suite_table.py [--check]

--check writes nothing and exits with 1 where the page is not what the files give.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.common import RESULTS
from benchmarks.quality import locomo
from benchmarks.quality.suite_report import OURS, table

PAGE = Path(__file__).parents[2] / "docs" / "quality.md"
BEGIN, END = "<!-- suites: begin -->", "<!-- suites: end -->"
NAMES = {
    "ruler": "RULER",
    "scbench": "SCBench's synthetic kinds",
    "structured": "Documents of records",
    "updates": "Facts that change",
    "agents": "Agents",
    "locomo": "LoCoMo",
    "beam": "BEAM",
    "prefeval": "PrefEval",
}
SETTINGS = {"unknown": "each question of what was read", "turns": "each question behind the others"}


def part(folder: Path = RESULTS) -> str:
    """Return the generated part of the page."""
    sections = []
    for path in sorted(folder.glob("suite-*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        origin = f"{result['model']}, {result['date']}, commit {result['commit']}"
        for title, rows in result["cells"].items():
            sections.append(f"**{heading(title, rows)}** ({origin})\n\n{table(rows)}\n")
    return "\n".join(sections)


def heading(title: str, rows: dict[str, dict[str, Any]]) -> str:
    """Return what a cell is about: suite, length, setting, and the budget in slots, in % of the text and in bytes."""
    task, setting, budget = title.split(" / ")
    suite, _, length = task.partition("-")
    own = rows.get(OURS) or max(rows.values(), key=lambda row: float(row["slots"]))
    unit = " turns between" if suite == "prefeval" else " dialogues" if length == locomo.WHOLE else " tokens"
    size = f"{int(length):,}" if length.isdigit() else length
    slots = budget if budget.endswith("%") else f"{int(budget):,} slots"
    share = 100 * (own["tokens"] and float(own["slots"]) / own["tokens"])
    return (
        f"{NAMES.get(suite, suite)}, {size}{unit}, {slots} ({share:.0f} % of the text, "
        f"{own['cache_bytes'] / 1e6:.1f} MB), {SETTINGS.get(setting, setting)}"
    )


def page(text: str, folder: Path = RESULTS) -> str:
    """Return the page with the generated part in its place."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{part(folder)}\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the page with the files instead of writing it")
    check, text = parser.parse_args().check, PAGE.read_text(encoding="utf-8")
    if not check:
        PAGE.write_text(page(text), encoding="utf-8")
    elif text != page(text):
        sys.exit("docs/quality.md is out of date: run python benchmarks/quality/suite_table.py")


if __name__ == "__main__":
    main()
