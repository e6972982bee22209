"""benchmarks/make_results.py and the result files: RESULTS.md is what they give, small, and each names its origin."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import make_results
from benchmarks.common import provenance

MAX_BYTES = 1_500_000


def test_results_md_is_what_the_files_give() -> None:
    assert make_results.PAGE.read_text(encoding="utf-8") == make_results.page(), "run python benchmarks/make_results.py"


def test_each_result_names_its_commit_date_and_machine() -> None:
    for name, result in make_results.load().items():
        assert all(result[key] for key in ("commit", "date", "machine")), name


def test_result_files_stay_small_and_raw_lines_and_plots_are_not_kept() -> None:
    ignored = (make_results.RESULTS / ".gitignore").read_text().split()
    assert ignored == ["*.jsonl", "*.png"]
    kept = [path for path in make_results.RESULTS.iterdir() if path.suffix not in (".jsonl", ".png")]
    assert sum(path.stat().st_size for path in kept) < MAX_BYTES


def test_a_new_result_names_where_it_was_measured() -> None:
    origin = provenance()
    assert all(isinstance(origin[key], str) and origin[key] for key in ("commit", "date", "machine"))


def test_a_result_without_a_table_of_its_own_is_listed_by_its_figures(tmp_path: Path) -> None:
    origin = {"commit": "abc", "date": "2026-01-02", "machine": "m", "environment": {"threads": 1}}
    (tmp_path / "new.json").write_text(json.dumps({**origin, "turns": {"10": 1.25}}))
    assert "| turns.10 | 1.25 | abc | 2026-01-02 | m |" in make_results.page(tmp_path)
