"""Figures of a suite: one cell for each task group, length, budget and contender, compared with `ours`.

Questions about one text are not independent, so the bootstrap draws texts, each with all its questions. Figures of a
suite with several kinds of tasks are means over the kinds.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import provenance

OURS = "ours"
DRAWS = 1000
Line = dict[str, Any]
Questions = dict[tuple[str, str, int], Line]
"""(kind, text, question) → its line."""
Figure = Callable[[Line], float]


def by_cell(lines: Sequence[Line]) -> dict[tuple[str, str, str], dict[str, Questions]]:
    """Return (task, setting, budget) → contender → its questions. An unbounded cache stands at every budget."""
    found: dict[tuple[str, str, str], dict[str, Questions]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        question = (line.get("kind", ""), line["item"], line["question"])
        found[line["task"], line["setting"], line["budget"]][line["policy"]][question] = line
    unbounded = {key: found.pop(key) for key in list(found) if key[2] == "full"}
    for (task, setting, _), policies in unbounded.items():
        for key in found:
            if key[:2] == (task, setting):
                found[key].update(policies)
    return dict(sorted(found.items()))


def mean(questions: Questions, figure: Figure) -> float:
    """Return the mean over the kinds of each kind's mean."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for (kind, _, _), line in questions.items():
        kinds[kind].append(figure(line))
    return sum(sum(values) / len(values) for values in kinds.values()) / len(kinds)


def interval(questions: Questions, figure: Figure, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of `mean`: texts are drawn, with all their questions.

    Each kind's texts are drawn among themselves, or all together where a kind has only one.
    """
    texts: dict[tuple[str, str], Questions] = defaultdict(dict)
    for key, line in questions.items():
        texts[key[:2]][key] = line
    strata = defaultdict(list)
    for (kind, _), own in texts.items():
        strata[kind].append(own)
    groups = list(strata.values())
    if min(map(len, groups)) == 1:
        groups = [[own for group in groups for own in group]]
    draw = random.Random(seed)
    means = sorted(mean(_drawn(draw, groups), figure) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def _drawn(draw: random.Random, groups: Sequence[Sequence[Questions]]) -> Questions:
    """Return as many texts of each group, drawn with replacement."""
    drawn = (text for group in groups for text in draw.choices(group, k=len(group)))
    return {
        (kind, f"{text} {number}", question): line
        for number, own in enumerate(drawn)
        for (kind, text, question), line in own.items()
    }


def gap(own: Questions, ours: Questions, name: str) -> dict[str, Any]:
    """Return how much a contender has more of a figure than `ours` on the same questions, with its interval."""
    pairs = {key: {"gap": own[key][name] - ours[key][name]} for key in own if key in ours}
    low, high = interval(pairs, lambda line: line["gap"])
    return {"mean": mean(pairs, lambda line: line["gap"]), "interval": [low, high]}


def summarise(own: Questions, ours: Questions, full: Questions) -> dict[str, Any]:
    """Return the figures of one contender in one cell, on the questions that `ours` has too."""
    own = {key: line for key, line in own.items() if not ours or key in ours}
    lines = list(own.values())
    scored = "score" in lines[0]
    figures = ["nll", *(["score"] if scored else [])]
    result: dict[str, Any] = {
        "n": len(lines),
        "texts": len({key[:2] for key in own}),
        "exact": mean(own, lambda line: line["exact"]),
        **{name: mean(own, lambda line, name=name: line[name]) for name in figures},
        "f1": mean(own, lambda line: line["f1"]) if "f1" in lines[0] else None,
        "tokens": mean(own, lambda line: line["tokens_read"]),
        **{
            name: mean(own, lambda line, name=name: line.get(name) or 0)
            for name in ("slots", "cache_bytes", "reading_bytes", "seconds", "question_seconds")
        },
        "retrieved_tokens": mean(own, lambda line: line.get("retrieved_tokens", 0)),
        "gaps": {name: gap(own, ours, name) for name in figures} if ours and own != ours else {},
        "kinds": {},
    }
    if scored:
        result["interval"] = list(interval(own, lambda line: line["score"]))
    shared = [key for key in own if key in full]
    if scored and shared and (whole := mean({key: full[key] for key in shared}, lambda line: line["score"])):
        result["of_full"] = mean({key: own[key] for key in shared}, lambda line: line["score"]) / whole
    for kind in sorted({kind for kind, _, _ in own}):
        some = {key: line for key, line in own.items() if key[0] == kind}
        values = {name: round(mean(some, lambda line, name=name: line[name]), 4) for name in figures}
        result["kinds"][kind] = {"n": len(some), **values}
    return result


def report(path: Path, model: str) -> str:
    """Write PATH.json beside a file of measured lines; return its figures as text."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    cells = {
        " / ".join(key): {
            name: summarise(own, policies.get(OURS, {}), policies.get("full", {})) for name, own in policies.items()
        }
        for key, policies in by_cell(lines).items()
    }
    path.with_suffix(".json").write_text(
        json.dumps({**provenance(), "model": model, "cells": rounded(cells)}, indent=1) + "\n"
    )
    return "\n\n".join(f"### {title}\n\n{table(rows)}" for title, rows in cells.items())


def rounded(value: Any) -> Any:
    """Return figures to five digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the figures of one cell as a Markdown table, the best score (else the least NLL) first."""
    titles = ["", "questions (texts)", "score", "of full", "gap", "exact", "F1", "NLL", "gap", "cache, MB",
              "peak, MB", "reading, s", "a question, s"]  # fmt: skip
    lines = [titles, ["---"] * len(titles)]
    for name, row in sorted(rows.items(), key=lambda each: (-each[1].get("score", 0), each[1]["nll"])):
        lines.append(
            [
                name,
                f"{row['n']} ({row['texts']})",
                _interval(row["score"], row["interval"]) if "score" in row else "",
                f"{row['of_full']:.2f}" if "of_full" in row else "",
                _gap(row, "score"),
                f"{row['exact']:.2f}",
                "" if row["f1"] is None else f"{row['f1']:.2f}",
                f"{row['nll']:.2f}",
                _gap(row, "nll"),
                *(f"{row[key] / 1e6:.1f}" for key in ("cache_bytes", "reading_bytes")),
                *(f"{row[key]:.1f}" for key in ("seconds", "question_seconds")),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _gap(row: dict[str, Any], name: str) -> str:
    found = row["gaps"].get(name)
    return "" if found is None else "{:+.2f} [{:+.2f}, {:+.2f}]".format(found["mean"], *found["interval"])
