"""docs/models.md says of every family of transformers what the checks find."""

from __future__ import annotations

import re

import pytest
import transformers

from tests.families.checks import check_family, quiet
from tests.families.page import PAGE, position_row, table_row
from tests.families.positions import KINDS, check_positions
from tests.families.tiny_configs import families

TEXT = PAGE.read_text(encoding="utf-8")
SOME = ["llama", "qwen3_next", "falcon_h1", "gpt2", "qwen2_vl", "gpt_oss", "deepseek_v3", "bart", "bloom"]
"""Rotary, learned, M-RoPE and own positions, recurrent layers, experts with sinks, latent keys, ALiBi."""
POSITIONS = ["dynamic NTK", "learned table", "ALiBi"]
ROW = re.compile(r"^\| `([^`]+)` \|.*$", re.MULTILINE)

written_for_this_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in TEXT, reason="docs/models.md is about another transformers"
)


@written_for_this_version
def test_the_table_has_one_row_for_each_family_and_no_other() -> None:
    assert sorted(match[1] for match in ROW.finditer(TEXT)) == families()


@written_for_this_version
@pytest.mark.parametrize("family", SOME)
def test_the_row_of_a_family_is_what_the_checks_find(family: str) -> None:
    with quiet():
        row = check_family(family)
    assert table_row(row) in TEXT


@written_for_this_version
def test_the_rows_of_positions_are_what_the_checks_find() -> None:
    with quiet():
        rows = [position_row(check_positions(kind)) for kind in KINDS if kind.name in POSITIONS]
    assert len(rows) == len(POSITIONS)
    assert [row for row in rows if row not in TEXT] == []


@pytest.mark.slow
@written_for_this_version
def test_the_row_of_every_family_is_what_the_checks_find() -> None:
    with quiet():
        rows = [table_row(check_family(family)) for family in families() if family not in SOME]
    assert [row for row in rows if row not in TEXT] == []


@written_for_this_version
def test_no_family_fails_or_is_untried() -> None:
    assert "## Failing" not in TEXT
    assert "## Not tried" not in TEXT
    assert int(re.search(r"(\d+) supported", TEXT)[1]) >= 60  # type: ignore[index]
