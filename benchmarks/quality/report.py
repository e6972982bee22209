"""Tables, paired bootstrap intervals and plots of a file of measured lines."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import provenance

Key = tuple[Any, ...]
Rows = dict[Key, dict[str, Any]]
DRAWS = 2000
DEPTHS = 5


def interval(differences: Sequence[float], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean of paired differences."""
    draw, size = random.Random(seed), len(differences)
    means = sorted(sum(draw.choices(differences, k=size)) / size for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws) - 1]


def groups(lines: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Rows]]:
    """Return (task, setting, budget) → policy → question → line.

    Lines of an unbounded cache stand in the tables of every budget. Policies that ignore the question were measured
    once for all questions: they stand in the tables of known questions too.
    """
    found: dict[tuple[str, str, str], dict[str, Rows]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        asked = (line["item"], line["question"], line.get("after"))
        found[line["task"], line["setting"], line["budget"]][line["policy"]][asked] = line
    unbounded = {key: policies for key, policies in found.items() if key[2] == "full"}
    for (task, setting, _), policies in unbounded.items():
        for key in found:
            if key[:2] == (task, setting) and key[2] != "full":
                found[key].update(policies)
            elif key[:2] == (task, "known") and setting == "unknown" and key[2] != "full":
                for name, rows in policies.items():
                    found[key].setdefault(name, rows)
    for (task, setting, budget), policies in found.items():
        if setting == "known":
            for name, rows in found.get((task, "unknown", budget), {}).items():
                policies.setdefault(name, rows)
    return {key: policies for key, policies in sorted(found.items()) if key[2] != "full"}


def summarise(policies: dict[str, Rows], preferred: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row per policy, lowest NLL first, over the questions shared with the reference policy: the
    first of `preferred` that was measured."""
    reference = next((name for name in preferred if name in policies), preferred[0])
    full = policies.get("full", {})
    table = []
    for name, rows in policies.items():
        shared = sorted(set(rows) & set(policies.get(reference, rows)), key=str)
        if not shared:
            continue
        lines = [rows[asked] for asked in shared]
        result = {
            "policy": name,
            "n": len(lines),
            "documents": len({line["item"] for line in lines}),
            "nll": _mean([line["nll"] for line in lines]),
            "exact": _mean([line["exact"] for line in lines]),
            "cache_mb": _mean([line["cache_bytes"] for line in lines]) / 1e6,
            "reading_mb": _mean([line["reading_bytes"] for line in lines]) / 1e6,
            "depths": by_depth(lines),
        }
        pairs = [(rows[asked]["nll"], full[asked]["nll"]) for asked in shared if asked in full]
        if pairs:
            result["of_full"] = sum(own for own, _ in pairs) / sum(exact for _, exact in pairs)
        for score in ("rouge1", "rouge2", "rougeL"):
            if score in lines[0]:
                result[score] = _mean([line[score] for line in lines])
        if name != reference and reference in policies:
            gaps = [rows[asked]["nll"] - policies[reference][asked]["nll"] for asked in shared]
            result["gap"] = {"mean": _mean(gaps), "interval": interval(gaps)}
        table.append(result)
    return sorted(table, key=lambda result: result["nll"])


def by_depth(lines: Sequence[dict[str, Any]]) -> list[float | None]:
    """Return the mean NLL of the answers in each fifth of the document."""
    bins: list[list[float]] = [[] for _ in range(DEPTHS)]
    for line in lines:
        bins[min(int(line["depth"] * DEPTHS), DEPTHS - 1)].append(line["nll"])
    return [_mean(values) if values else None for values in bins]


def report(path: Path, preferred: Sequence[str], model: str) -> str:
    """Write PATH.json and the plots beside a file of measured lines; return the tables as text."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tables = {" / ".join(key): summarise(policies, preferred) for key, policies in groups(lines).items()}
    result = {**provenance(), "model": model, "reference": list(preferred), "tables": tables}
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plots(path, tables)
    return "\n\n".join(f"### {title}\n\n{as_text(table)}" for title, table in tables.items())


def as_text(table: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table."""
    extra = [score for score in ("rouge1", "rouge2", "rougeL") if score in table[0]]
    titles = ["policy", "n (documents)", "NLL", "over full", "exact", "gap", "cache MB", "prefill MB", *extra]
    rows = [titles, ["---"] * len(titles)]
    for result in table:
        gap = result.get("gap")
        shown = "" if gap is None else f"{gap['mean']:+.2f} [{gap['interval'][0]:+.2f}, {gap['interval'][1]:+.2f}]"
        share = f"{result['of_full']:.2f}" if "of_full" in result else ""
        figures = [f"{result['n']} ({result['documents']})", f"{result['nll']:.2f}", share]
        figures += [f"{result['exact']:.0%}", shown]
        figures += [f"{result['cache_mb']:.1f}", f"{result['reading_mb']:.0f}"]
        rows.append([result["policy"], *figures, *(f"{100 * result[score]:.1f}" for score in extra)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plots(path: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Plot NLL by cache bytes (PATH-memory.png) and by the depth of the answer in the document (PATH-depth.png)."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for title, table in tables.items():
        for result in table:
            series[title.rpartition(" / ")[0]][result["policy"]].append((result["cache_mb"], result["nll"]))
    _panels(path.with_name(f"{path.stem}-memory.png"), "cache, MB", {
        title: {name: sorted(set(points)) for name, points in lines.items()} for title, lines in series.items()
    })  # fmt: skip
    depths = {
        title: {
            result["policy"]: [
                ((place + 0.5) / DEPTHS, nll) for place, nll in enumerate(result["depths"]) if nll is not None
            ]
            for result in table
        }
        for title, table in tables.items()
        if "summary" not in title
    }
    _panels(path.with_name(f"{path.stem}-depth.png"), "depth of the answer in the document", depths)


def _panels(path: Path, x_label: str, panels: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not panels:
        return
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 4 * len(panels)), squeeze=False)
    for (title, lines), panel in zip(panels.items(), axes[:, 0], strict=True):
        for name, points in lines.items():
            style = "-" if name.startswith(("zsmerge", "full")) else "--"
            panel.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
        panel.set(title=title, xlabel=x_label, ylabel="NLL of the answer, per token")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
